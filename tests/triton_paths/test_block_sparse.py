"""The Triton path of block-sparse attention, through the interpreter, against the fp64 reference."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.call import TokenLayout
from hf_attn.ops.hfattn_sparse.block_sparse import triton_lists, triton_path
from hf_attn.ops.hfattn_sparse.block_sparse.triton_op import block_sparse_attention_triton
from hf_attn.ops.hfattn_sparse.launch import forced_config, interpreting, recording
from hf_attn.pattern import BlockPattern
from tests.matrix.build import run, tensors
from tests.triton_paths.block_sparse_cases import NEG_INF, Setting, assert_matches, draw, evaluate, random_setting

needs_interpreter = pytest.mark.skipif(not interpreting(), reason="tests/gpu covers the compiled kernels")


@needs_interpreter
@pytest.mark.parametrize("seed", range(60))
def test_random_configuration(seed):
    assert_matches(random_setting(seed))


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60, 200))
def test_more_random_configurations(seed):
    assert_matches(random_setting(seed))


@needs_interpreter
@pytest.mark.parametrize("dim", [8, 16, 40, 64, 80, 128, 256])
def test_head_dimensions(dim):
    assert_matches(Setting(dim=dim, value_dim=256 if dim == 80 else dim, k_len=37, q_len=37))


@needs_interpreter
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("shared", [True, False], ids=["list a group", "list a head"])
def test_groups(group, shared):
    s = Setting(kv_heads=2, group=group, q_len=20, k_len=20, block_q=4 if shared else 16, block_k=8)
    assert_matches(replace(s, pattern_heads=2 if shared else s.heads, bias=2 if shared else s.heads))


@needs_interpreter
@pytest.mark.parametrize("length", range(1, 8))
def test_short_rows(length):
    assert_matches(Setting(q_len=length, k_len=length, block_q=3, block_k=2, group=2))


DECODE = Setting(batch=2, kv_heads=2, group=4, q_len=1, k_len=150, block_q=16, block_k=16, pattern_heads=2)


@needs_interpreter
@pytest.mark.parametrize(
    "s",
    [
        DECODE,
        replace(DECODE, q_len=5, block_k=20, bias=1, group=3),
        replace(DECODE, layout="static", pattern_heads=1),
        replace(DECODE, pattern_heads=8, causal=False, dtype="fp16"),
    ],
    ids=str,
)
def test_few_queries_split_their_lists(s, monkeypatch):
    started = []
    launch = triton_path.launch

    def spy(kernel, grid, *args, **meta):
        started.append(kernel.fn.__name__)
        launch(kernel, grid, *args, **meta)

    monkeypatch.setattr(triton_path, "launch", spy)
    assert_matches(s)
    assert "merge_kernel" in started


@needs_interpreter
def test_packed_decode():
    """Sequences of one query each share a row."""
    lengths = torch.tensor([70, 3, 41])
    cu_q, cu_k = torch.arange(4), torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    x = draw(Setting(q_len=3, k_len=114, group=2, block_q=1))
    x["index"] = TokenLayout.packed(cu_q, cu_k, 3, 114).index
    x["indices"] = torch.arange(8).view(1, 1, 1, 8).expand(1, 1, 3, 8)
    assert_matches(Setting(q_len=3, k_len=114, group=2, block_q=1), x)


@needs_interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), NEG_INF])
@pytest.mark.parametrize("steps", [(16, 16), (32, 64)], ids=["steps inside a block", "tokens listed"])
def test_hidden_keys_do_not_leak(poison, steps):
    """In the future of a row's own tile, in blocks nobody reads, behind a bias of -inf, in padding."""
    s = Setting(q_len=64, k_len=64, group=2, bias=1, block_q=32, block_k=32)
    x = draw(s)
    x["indices"] = torch.tensor([0, 1]).view(1, 1, 2, 1).int()
    x["bias"] = torch.zeros(1, 1, 64)
    x["bias"][..., 3] = NEG_INF
    tile = {"BLOCK_M": steps[0], "BLOCK_N": steps[1], "num_warps": 4, "num_stages": 1}
    names = ("forward", "decode", "backward_queries", "backward_keys", "repair")
    with forced_config(**{f"block_sparse_{name}": tile for name in names}):
        for bias in (x["bias"], None):
            dirty = {name: t.clone() if isinstance(t, Tensor) else t for name, t in x.items()} | {"bias": bias}
            clean = evaluate(block_sparse_attention_triton, s, x | {"bias": bias}, torch.float32)
            hidden = [3, 60] if bias is not None else [60]
            for name in ("key", "value"):
                dirty[name][:, :, hidden] = poison
            dirty["grad_out"][:, :, 60:] = 0
            dirty["grad_lse"][:, :, 60:] = 0
            calm = evaluate(
                block_sparse_attention_triton, s, {**dirty, "key": x["key"], "value": x["value"]}, torch.float32
            )
            got = evaluate(block_sparse_attention_triton, s, dirty, torch.float32)
            for name in ("out", "lse"):
                torch.testing.assert_close(got[name][:, :, :60], clean[name][:, :, :60], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(got["dq"][:, :, :60], calm["dq"][:, :, :60], rtol=1e-5, atol=1e-6)
            # The first query block shares no visible key with the poisoned rows.
            for name in ("dk", "dv"):
                torch.testing.assert_close(got[name][:, :, 4:32], calm[name][:, :, 4:32], rtol=1e-5, atol=1e-6)
            if poison != NEG_INF:  # a row that sees the poison says so
                assert not got["out"][:, :, 60:].isfinite().any(-1).all()


@needs_interpreter
def test_broken_queries_do_not_leak():
    """A later key's gradient does not see an earlier query that is NaN."""
    s = Setting(q_len=32, k_len=32, block_q=32, block_k=32)
    x = draw(s)
    x["indices"] = torch.zeros(1, 1, 1, 1).int()
    x["query"][:, :, 5] = float("nan")
    x["grad_lse"][:, :, 5] = 0
    got = evaluate(block_sparse_attention_triton, s, x, torch.float32)
    assert got["dk"][:, :, :6].isnan().all() and got["dk"][:, :, 6:].isfinite().all()
    assert got["dv"][:, :, 6:].isfinite().all() and got["out"][:, :, 6:].isfinite().all()


@needs_interpreter
def test_padding_may_hold_anything():
    s = Setting(batch=2, q_len=33, k_len=33, layout="left", group=2, seed=3)
    x = draw(s)
    expected = evaluate(block_sparse_attention_triton, s, x, torch.float32)
    padding = x["index"][:, 0, 33:] < 0
    assert padding.any()
    for name in ("query", "key", "value", "grad_out"):
        x[name] = torch.where(padding[:, None, :, None], float("nan"), x[name])
    x["grad_out"] = torch.where(x["grad_out"].isnan(), 0, x["grad_out"])  # the loss itself multiplies by it
    for name, value in evaluate(block_sparse_attention_triton, s, x, torch.float32).items():
        assert torch.equal(value, expected[name]), name


@needs_interpreter
def test_rows_that_see_nothing():
    s = Setting(q_len=40, k_len=20, group=2, batch=2)  # the first 20 queries stand before every key
    x = draw(s)
    x["indices"][:, :, -1] = -1
    got = assert_matches(s, x)
    for rows in (slice(0, 20), slice(32, 40)):
        assert got["out"][:, :, rows].eq(0).all() and got["dq"][:, :, rows].eq(0).all()
        assert got["lse"][:, :, rows].eq(NEG_INF).all()


@needs_interpreter
@pytest.mark.parametrize(("q_len", "k_len", "batch"), [(0, 5, 1), (5, 0, 1), (5, 5, 0)])
def test_empty(q_len, k_len, batch):
    s = Setting(q_len=q_len, k_len=k_len, batch=batch)
    x = draw(replace(s, q_len=5, k_len=5, batch=1))
    for name, length in (("query", q_len), ("key", k_len), ("value", k_len), ("grad_out", q_len)):
        x[name] = x[name][:batch, :, :length]
    x["indices"] = x["indices"][:, :, : 1 if q_len else 0]
    x["grad_lse"] = x["grad_lse"][:batch, :, :q_len]
    got = evaluate(block_sparse_attention_triton, s, x, torch.float32)
    assert all(t.eq(0).all() for name, t in got.items() if name != "lse") and got["lse"].eq(NEG_INF).all()


@needs_interpreter
def test_lists_in_any_form():
    s = Setting(q_len=40, k_len=40, block_k=3)
    x = draw(s)
    expected = evaluate(block_sparse_attention_triton, s, x, torch.float32)
    listed = x["indices"]
    shuffled = torch.cat([listed.flip(-1), torch.full_like(listed, -1), listed], -1)
    beyond = torch.cat([listed, torch.full_like(listed, 14), torch.full_like(listed, 2**31 - 1)], -1)
    long = listed.repeat(1, 1, 1, 20)
    assert long.shape[-1] > triton_lists._PAIRWISE
    for indices in (shuffled, beyond, long, listed.long(), listed.transpose(2, 3).contiguous().transpose(2, 3)):
        got = evaluate(block_sparse_attention_triton, s, x | {"indices": indices}, torch.float32)
        for name, value in got.items():
            assert torch.equal(value, expected[name]), name


@needs_interpreter
@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 128, 200])
def test_unique_lists(length):
    indices = torch.randint(-3, 80, (2, 1, 3, length))
    got = triton_lists.unique_lists(indices, 70)
    for row, listed in zip(indices.flatten(0, 2).tolist(), got.flatten(0, 2).tolist(), strict=True):
        kept = sorted({block for block in row if 0 <= block < 70})
        assert listed == kept + [2**31 - 1] * (length - len(kept))


@needs_interpreter
def test_offsets_beyond_32_bits():
    """Rows so far apart that offsets pass 2**31 elements; the memory between them is never touched."""
    far = torch.empty(33 * 2**26, dtype=torch.float16).as_strided((1, 1, 33, 16), (0, 0, 2**26, 1))
    near = torch.randn(1, 1, 33, 16).half()
    far.copy_(near)
    x = draw(Setting(q_len=33, k_len=33, dtype="fp16"))
    options = (x["indices"], None, None, 16, 16, True, 0.3)
    for got, expected in zip(
        triton_path.forward(far, far, far, *options), triton_path.forward(*[near] * 3, *options), strict=True
    ):
        assert torch.equal(got, expected)


@needs_interpreter
@pytest.mark.parametrize("repeats", [20, pytest.param(250, marks=pytest.mark.slow)])
def test_repeats_are_bit_equal(repeats):
    s = Setting(q_len=16, k_len=32, group=2)
    x = draw(s)
    first = evaluate(block_sparse_attention_triton, s, x, torch.float32)
    for _ in range(repeats):
        again = evaluate(block_sparse_attention_triton, s, x, torch.float32)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@needs_interpreter
@pytest.mark.parametrize("layout", ["full", "left"])
@pytest.mark.parametrize("bias", [0, 1])
def test_the_op_keeps_the_rules_of_torch(layout, bias):
    s = Setting(batch=2, q_len=10, k_len=10, dim=8, value_dim=16, group=2, layout=layout, bias=bias)
    x = draw(s)
    tensors = [x[name].requires_grad_() for name in ("query", "key", "value")]
    bias_leaf = None if x["bias"] is None else x["bias"].requires_grad_()
    arguments = (*tensors, x["indices"], x["index"], bias_leaf, 16, 16, True, 0.5)
    torch.library.opcheck(block_sparse_attention_triton, arguments)


@pytest.fixture
def triton_backend(monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")


@needs_interpreter
def test_compiled_without_recompiling_for_a_length(triton_backend):
    def loss(query, key, value, indices):
        pattern = BlockPattern(indices, 16, 16, query.shape[2], key.shape[2])
        return ops.block_sparse_attention(query, key, value, pattern, causal=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (33, 40):
            leaves = [torch.randn(1, h, length, 16, requires_grad=True) for h in (2, 1, 1)]
            indices = torch.arange(3).view(1, 1, 1, 3).expand(1, 1, 3, 3).int()
            got = torch.autograd.grad(compiled(*leaves, indices), leaves)
            expected = torch.autograd.grad(loss(*leaves, indices), leaves)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_interpreter
def test_checkpointed_and_used_twice(triton_backend):
    leaves = [torch.randn(1, h, 33, 16, requires_grad=True) for h in (2, 1, 1)]
    pattern = BlockPattern.causal_blocks(block_q=16, block_k=16, q_len=33, k_len=33)

    def layer(query, key, value):
        query = ops.block_sparse_attention(query, key, value, pattern, causal=True)
        return ops.block_sparse_attention(query, key, value, pattern, causal=True)

    plain = torch.autograd.grad(layer(*leaves).sum(), leaves)
    kept = torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(kept.sum(), leaves), plain, strict=True))
    assert ops.path_counts()["block_sparse_attention | triton"] == 6


@needs_interpreter
@pytest.mark.parametrize("side", ["left", "right"])
def test_streaming_padded_equals_unpadded(side, triton_backend):
    from tests.cases import CASES

    case = next(c for c in CASES if c.id == "streaming")
    query, key, value = tensors(batch=2, q_len=40, dim=16)
    starts = [0, 15 if side == "left" else 0]
    tokens = TokenLayout.padded(torch.tensor(starts), torch.tensor([40, 25]), 40, 40)
    out = run(case, query, key, value, tokens=tokens)
    for b, (start, length) in enumerate(zip(starts, (40, 25), strict=True)):
        rows = slice(start, start + length)
        alone = run(case, *(t[b : b + 1, :, rows] for t in (query, key, value)))
        torch.testing.assert_close(out[b : b + 1, :, rows], alone, rtol=0, atol=1e-5)
    assert ops.path_counts()["block_sparse_attention | triton"] == 3


def attend(dtype=torch.float32, dim=16, indices=None, **options):
    query, key, value = (torch.randn(1, 1, 20, dim, dtype=dtype) for _ in range(3))
    indices = torch.zeros(1, 1, 2, 1).int() if indices is None else indices
    return ops.block_sparse_attention(query, key, value, BlockPattern(indices, 16, 16, 20, 20), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "Triton kernels take float16, bfloat16 and float32, got torch.float64"),
        ({"dim": 12}, "head dimensions that are multiples of 8 from 8 to 256, got 12"),
        ({"dim": 264}, "head dimensions that are multiples of 8 from 8 to 256, got 264"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(options, message, triton_backend):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        attend(**options)


def test_a_forced_triton_path_needs_a_device(triton_backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="Triton kernels need a GPU"):
        attend()


@needs_interpreter
def test_bad_patterns(triton_backend, monkeypatch):
    with pytest.raises(ValueError, match="the pattern has 3 rows; allowed are 1, the batch"):
        attend(indices=torch.zeros(3, 1, 2, 1).int())
    with pytest.raises(ValueError, match=re.escape("heads, 2, selected], got (1, 1, 3, 1)")):
        attend(indices=torch.zeros(1, 1, 3, 1).int())
    unknown = torch.tensor([0, 2]).view(1, 1, 2, 1)
    attend(indices=unknown)  # ignored, as finding it out would wait for the device
    monkeypatch.setenv("HF_ATTN_CHECK", "1")
    with pytest.raises(ValueError, match=re.escape("indices must lie in -1 (unused) to 1, got 0 to 2")):
        attend(indices=unknown)
    index = torch.zeros(1, 2, 40, dtype=torch.int32)
    index[:, 1] = torch.cat([torch.arange(20).flip(0), torch.arange(20)])
    with pytest.raises(ValueError, match="needs the queries of a sequence to be its last tokens"):
        attend(tokens=TokenLayout(1, 20, 20, index), causal=True)


RECORDED = {
    "prefill": Setting(q_len=4096, k_len=4096, dim=128, value_dim=128, block_q=128, block_k=128),
    "padded": Setting(q_len=300, k_len=300, layout="left", batch=2, group=4),
    "bias": Setting(bias=1, dim=64, value_dim=128, block_q=100, block_k=100),
    "decode": Setting(q_len=1, k_len=4096, group=8, dim=256, value_dim=256),
    "long": Setting(q_len=2**22, k_len=2**22, dim=128, value_dim=128, kv_heads=8, group=8, pattern_heads=64),
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_from_meta_tensors(name, target):
    """Meta tensors have no data: what can be recorded from them neither waits for the device nor depends on it."""
    s = RECORDED[name]

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key = meta(s.batch, s.heads, s.q_len, s.dim), meta(s.batch, s.kv_heads, s.k_len, s.dim)
    value = meta(s.batch, s.kv_heads, s.k_len, s.value_dim)
    indices = meta(1, s.pattern_heads, -(-s.q_len // s.block_q), 8, dtype=torch.int32)
    index = None if s.layout == "full" else meta(s.batch, 2, s.q_len + s.k_len, dtype=torch.int32)
    bias = meta(1, 1, s.k_len, dtype=torch.float32) if s.bias else None
    options = (indices, index, bias, s.block_q, s.block_k, s.causal, 0.1)
    with recording(target) as launches:
        out, lse = triton_path.forward(query, key, value, *options)
        grads = triton_path.backward(out, lse, query, key, value, *options[:3], out, lse, *options[3:])
    assert out.shape == (*query.shape[:3], s.value_dim) and [g.shape for g in grads[:3]] == [
        query.shape, key.shape, value.shape
    ]  # fmt: skip
    kernels = [launch.kernel.fn.__name__ for launch in launches]
    assert ("merge_kernel" in kernels) == (name == "decode")
    assert {"forward_kernel", "queries_kernel", "keys_kernel", "unique_kernel"} <= set(kernels)
