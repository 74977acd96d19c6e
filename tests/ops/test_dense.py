"""Dense attention in steps of query rows equals the whole call, and holds one small mask at a time."""

from __future__ import annotations

import pytest
import torch

from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.ops import dense

Q, K = 11, 17
MASK = torch.rand(2, 1, Q, K, generator=torch.Generator().manual_seed(0)) < 0.7
MASK[..., 0] = True


def windowed(layout: TokenLayout, low: int, high: int) -> TokenLayout:
    positions = layout.index[:, 1, : layout.q_len]
    window = torch.stack([positions - low, positions + high], 1)
    return TokenLayout(layout.batch, layout.q_len, layout.k_len, layout.index, window)


padded = TokenLayout.padded(torch.tensor([0, 2]), torch.tensor([K, K - 2]), Q, K)
LAYOUTS = {
    "full": (TokenLayout.full(2, Q), True),
    "behind a cache": (TokenLayout.full(2, Q, K), True),
    "cross": (TokenLayout.full(2, Q, K), False),
    "padded": (padded, True),
    "padded, both ways": (padded, False),
    "window": (windowed(padded, 3, 0), True),
    "window, both ways": (windowed(padded, 3, 4), False),
    "bool mask": (TokenLayout(2, Q, K, dense=MASK), True),
    "float mask": (TokenLayout(2, Q, K, dense=torch.zeros(MASK.shape).masked_fill(~MASK, -1e30)), True),
    "one row for all queries": (TokenLayout(2, Q, K, dense=MASK[:, :, :1]), False),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_steps_equal_the_whole(name, monkeypatch):
    tokens, causal = LAYOUTS[name]
    query = torch.randn(2, 4, Q, 8)
    key, value = torch.randn(2, 2, tokens.k_len, 8), torch.randn(2, 2, tokens.k_len, 6)
    call = AttentionCall(query, key, value, scale=0.3, causal=causal, tokens=tokens)
    whole = dense.dense_attention(call)
    sizes = []
    plain = dense.scaled_dot_product_attention

    def watched(*args, attn_mask, **options):
        sizes.append(0 if attn_mask is None else attn_mask.numel())
        return plain(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(dense, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(dense, "MAX_MASK", 2 * K * 3)
    torch.testing.assert_close(dense.dense_attention(call), whole)
    with torch.enable_grad():
        query.requires_grad_()
        torch.testing.assert_close(dense.dense_attention(call), whole)
    sizes = sizes[: len(sizes) // 2]
    assert max(sizes) <= 2 * K * 3
    assert len(sizes) == (1 if name in ("full", "cross") else 4)


def test_more_queries_than_keys_are_not_cut(monkeypatch):
    """The first rows see no key; they are not the last rows of anything."""
    call = AttentionCall(*(torch.randn(1, 1, n, 4) for n in (5, 3, 3)), 0.5, True, TokenLayout.full(1, 5, 3))
    whole = dense.dense_attention(call)
    monkeypatch.setattr(dense, "MAX_MASK", 4)
    torch.testing.assert_close(dense.dense_attention(call), whole, equal_nan=True)
