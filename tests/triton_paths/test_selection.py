"""Block selection by the Triton kernels is that of the reference: every rule, layout, and rows in pieces."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.ops import path_counts
from hf_attn.ops.hfattn_sparse.launch import forced_config, interpreting

pytest.importorskip("triton")
if not (interpreting() or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU or the interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PIECES = {"scores": 64, "row": 2, "piece": 8, "num_warps": 4}
LENGTHS = [1, 2, 3, 7, 16, 31]


def draw(number: int) -> tuple[tuple[Tensor, Tensor], dict]:
    """A random call, small enough for the interpreter; every third has scores full of exact ties."""
    pick, generator = random.Random(number), torch.Generator().manual_seed(number)
    k_len, layout = pick.choice(LENGTHS), pick.choice(["full", "padded", "packed"])
    k_len = min(k_len, 16) if number % 3 == 0 else k_len
    q_len = pick.choice([k_len, max(1, k_len // 2), k_len + 3]) if layout == "full" else k_len
    kv_heads, group, dim = *pick.choice([(1, 1), (2, 1), (1, 3)]), pick.choice([8, 24])
    batch = 1 if layout == "packed" else pick.choice([1, 2])
    # bf16 is upcast right after the load, so it may be tested in the interpreter too.
    dtype = pick.choice([torch.float32, torch.float16, torch.bfloat16])
    query = torch.randn(batch, kv_heads * group, q_len, dim, generator=generator)
    key = torch.randn(batch, kv_heads, k_len, dim, generator=generator)
    options = {"block_q": pick.choice([3, 8, 16]), "block_k": pick.choice([1, 3, 8])}
    if number % 3 == 0:
        options = {"block_q": 8, "block_k": pick.choice([1, 2]), "scale": 0.25}
        query, key = query.round() / 2, key.round()
        if q_len % 8 or layout != "full":
            options["block_q"] = 1
            options["block_k"] = 1
    if layout == "padded":
        options["key_start"] = torch.randint(0, k_len, (batch,), generator=generator).to(DEVICE)
    elif layout == "packed":
        cuts = sorted(pick.choices(range(k_len + 1), k=2))
        options["cu_seqlens_q"] = torch.tensor([0, *cuts, k_len], device=DEVICE)
    rules = {"top_k": [1, 2, 5, 0.1, 0.5], "threshold": [0.0, 0.05, 0.3], "cumulative": [0.1, 0.6, 0.9, 1.0]}
    rule = pick.choice(list(rules))
    options[rule] = pick.choice(rules[rule])
    options |= {"causal": pick.random() < 0.6, "sinks": pick.choice([0, 0, 2]), "local": pick.choice([0, 0, 1, 2])}
    if number % 3 == 0 and rule != "top_k":
        # Equal weights sum to other last digits in another order; the sums must not come near the limit.
        options[rule] += 0.00123 if options[rule] < 1 else 0
    return (query.to(DEVICE, dtype), key.to(DEVICE, dtype)), options


def compare(number: int, monkeypatch) -> None:
    tensors, options = draw(number)
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    expected = ops.select_blocks(*tensors, **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    got = ops.select_blocks(*tensors, **options)
    assert torch.equal(got.indices, expected.indices), (number, options)


@pytest.mark.parametrize("number", range(12))
def test_random_calls(number, monkeypatch):
    compare(number, monkeypatch)
    assert path_counts()["select_blocks | triton"] == 1


@pytest.mark.parametrize("number", range(100, 104))
def test_random_calls_in_pieces(number, monkeypatch):
    with forced_config(select_blocks=PIECES):
        compare(number, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(200, 400))
def test_many_random_calls(number, monkeypatch):
    with forced_config(**({"select_blocks": PIECES} if number % 4 == 0 else {})):
        compare(number, monkeypatch)


@pytest.mark.parametrize("pieces", [False, True])
def test_programs_share_their_rows(pieces, monkeypatch):
    """More rows than programs, and more rows than one program takes."""
    from hf_attn.ops.hfattn_sparse.selection import triton_path

    monkeypatch.setattr(triton_path, "_PROGRAMS", 3)
    query, key = torch.randn(1, 1, 72, 8, device=DEVICE), torch.randn(1, 1, 24, 8, device=DEVICE)
    options = {"block_q": 4, "block_k": 4, "top_k": 2, "causal": False}
    expected = ops.select_blocks(query, key, **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    with forced_config(**({"select_blocks": PIECES} if pieces else {})):
        assert torch.equal(ops.select_blocks(query, key, **options).indices, expected.indices)


def test_strides_and_padding_with_nan(monkeypatch):
    query = torch.randn(2, 20, 2, 8, device=DEVICE).transpose(1, 2)
    key = torch.randn(2, 20, 1, 16, device=DEVICE).transpose(1, 2)[..., ::2]
    query[0, :, :5], key[0, :, :5] = float("nan"), float("nan")
    options = {"block_q": 4, "block_k": 4, "cumulative": 0.7, "key_start": torch.tensor([5, 0], device=DEVICE)}
    expected = ops.select_blocks(query, key, **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    assert torch.equal(ops.select_blocks(query, key, **options).indices, expected.indices)


def test_more_sequences_than_announced_get_no_blocks(monkeypatch):
    """Nothing waits for the device, so nothing can be raised; nothing is written out of bounds either."""
    from hf_attn.call import TokenLayout

    cu = torch.tensor([0, 6, 9, 20], device=DEVICE)
    tokens = TokenLayout.packed(cu, cu, 20, 20)
    query, key = torch.randn(1, 2, 20, 8, device=DEVICE), torch.randn(1, 1, 20, 8, device=DEVICE)
    options = {"block_q": 4, "block_k": 4, "top_k": 2, "tokens": tokens}
    expected = ops.select_blocks(query, key, **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    found = ops.select_blocks(query, key, **options, max_sequences=2)
    assert torch.equal(found.indices, expected.indices[:2])


def test_custom_op():
    from hf_attn.ops.hfattn_sparse.selection.triton_op import select_blocks_triton

    query, key = torch.randn(1, 2, 12, 8, device=DEVICE), torch.randn(1, 1, 12, 8, device=DEVICE)
    torch.library.opcheck(select_blocks_triton, (query, key, None, 4, 4, "top_k", 2.0, 0, 0, True, 0.5, 1))
