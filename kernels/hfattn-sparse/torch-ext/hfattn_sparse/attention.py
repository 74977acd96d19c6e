"""Exact attention behind transformers' attention interface, so that the kernel's name is an `attn_implementation`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .api import block_sparse_attention
from .device_sequences import check_alignment

BLOCK = 128
# Arguments of a host call that would change the result; each is refused unless it is None.
REFUSED = {
    "softcap": "soft-capping of the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "an additive position bias",
    "head_mask": "a mask of heads",
    "cu_seq_lens_q": "packed sequences without a mask",
    "cu_seq_lens_k": "packed sequences without a mask",
    "block_table": "a paged cache",
    "cache": "a paged cache",
}
_last_mask: tuple[weakref.ref, int, tuple[Tensor, bool]] | None = None


def flash_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Exact (dense) attention of one layer by the block-sparse kernel with every visible block selected.

    Args:
        module: its `is_causal` says whether the layer is causal where `is_causal` does not; default causal.
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`.
        attention_mask: None (full rows, queries are the last tokens), or bool `[B | 1, 1, Nq, Nk]`, True where visible:
            any mix of causality, padding, packed sequences and unused cache slots. Queries that are no real token
            give 0.
        dropout: must be 0.

    Returns the output `[B, Nq, Hq, Dv]` and None: weights are never formed.
    Raises ValueError for what it cannot honour: dropout, sliding windows shorter than the keys, other masks, and the
    arguments in `REFUSED`. Reading a mask waits for the device, once for all layers that get the same one.
    """
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(_cannot(what, f"{name}="))
    if dropout:
        raise ValueError(_cannot("dropout", f"dropout={dropout}"))
    if kwargs.get("output_attentions"):
        raise ValueError(_cannot("attention weights", "output_attentions=True"))
    q_len, k_len = query.shape[2], key.shape[2]
    if attention_mask is None:
        window = kwargs.get("sliding_window")
        if window is not None and window < k_len:
            raise ValueError(_cannot(f"a sliding window of {window} tokens over {k_len} keys", "sliding_window="))
        index = None
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    else:
        index, causal = _read_mask(attention_mask, query.shape[0], q_len, k_len)
    blocks = _all_blocks(q_len, k_len, causal and index is None, query.device)
    options = {"block_q": BLOCK, "block_k": BLOCK, "causal": causal, "scale": scaling, "index": index}
    out, _ = block_sparse_attention(query, key, value, blocks, **options)
    return out.transpose(1, 2).contiguous(), None


def _cannot(what: str, argument: str) -> str:
    return (
        f"this kernel computes exact attention without {what}, got {argument}; use attn_implementation='sdpa' or "
        "'eager' for this model"
    )


def _all_blocks(q_len: int, k_len: int, causal: bool, device: torch.device) -> Tensor:
    """int32 `[1, 1, nq, nk]`: every key block, or every one that the query block sees."""
    blocks = torch.arange(max(1, -(-k_len // BLOCK)), dtype=torch.int32, device=device)
    rows = torch.arange(-(-q_len // BLOCK), device=device)[:, None]
    last = (rows * BLOCK + BLOCK).clamp(max=q_len) - 1 + k_len - q_len
    reach = last if causal else torch.full_like(last, k_len - 1)
    return torch.where(blocks * BLOCK <= reach, blocks, -1)[None, None]


def _read_mask(mask: Tensor, batch: int, q_len: int, k_len: int) -> tuple[Tensor, bool]:
    """Token index and causality of a mask; what was found for the last mask is kept."""
    global _last_mask
    if _last_mask is not None and _last_mask[0]() is mask and _last_mask[1] == mask._version:
        return _last_mask[2]
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (q_len, k_len):
        raise ValueError(
            f"attention_mask must be None or bool [batch, 1, {q_len}, {k_len}], got {mask.dtype} {tuple(mask.shape)}"
        )
    found = token_index(mask[:, 0].expand(batch, q_len, k_len))
    check_alignment(found[0], q_len, k_len, found[1])
    _last_mask = weakref.ref(mask), mask._version, found
    return found


def token_index(mask: Tensor) -> tuple[Tensor, bool]:
    """The token index int32 `[B, 2, Nq + Nk]` that says the same as a mask bool `[B, Nq, Nk]`, and whether causally.

    A sequence is told by its first key. Raises ValueError when the mask is not made of sequences, each of them causal
    or each of them without order.
    """
    q_len, k_len = mask.shape[1:]
    if not mask.numel():
        return torch.full((mask.shape[0], 2, q_len + k_len), -1, dtype=torch.int32, device=mask.device), False
    sees, seen = mask.any(2), mask.any(1)
    of_query = torch.where(sees, mask.int().argmax(2), -1)
    of_key = torch.where(seen, of_query.gather(1, mask.int().argmax(1)), -1)
    newest = k_len - 1 - mask.flip(2).int().argmax(2)
    slots = torch.arange(k_len, device=mask.device)
    same = (of_query[:, :, None] == of_key[:, None]) & sees[:, :, None]
    if torch.equal(mask, same & (slots <= newest[:, :, None])):
        causal = True
    elif torch.equal(mask, same):
        causal = False
    else:
        raise ValueError(_cannot("arbitrary masks and sliding windows", f"attention_mask {tuple(mask.shape)}"))
    if causal:
        # Padding after a sequence sees what its last token sees, and is no token of it.
        repeated = torch.zeros_like(sees)
        repeated[:, 1:] = (newest[:, 1:] == newest[:, :-1]) & (of_query[:, 1:] == of_query[:, :-1])
        of_query = of_query.masked_fill(repeated, -1)
    segments = torch.cat([of_query, of_key], 1)
    positions = torch.cat([newest, slots.expand_as(of_key)], 1)
    return torch.stack([segments, positions], 1).to(torch.int32), causal
