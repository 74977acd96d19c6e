"""The compiled CPU kernel against attention written out in fp64, and where it must not or need not run."""

from __future__ import annotations

import platform
import subprocess

import pytest
import torch

from hf_attn import ops
from hf_attn.bench.cpu_kernel import worst
from hf_attn.ops import path_counts
from hf_attn.ops.hfattn_sparse.native import library
from hf_attn.pattern import BlockPattern
from tests.budget import assert_as_good_as_eager

pytestmark = pytest.mark.needs_cxx
DTYPES = [torch.float32, torch.bfloat16]


def written_out(query, key, value, seen, scale, dtype=torch.float64):
    """out and lse of dense attention under the bool mask `seen`, everything in `dtype`."""
    group = query.shape[1] // key.shape[1]
    query, key, value = query.to(dtype), *(x.to(dtype).repeat_interleave(group, 1) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~seen, float("-inf"))
    lse = scores.double().logsumexp(-1)
    weights = (scores.double() - lse.masked_fill(lse.isinf(), 0)[..., None]).exp().to(dtype)
    return weights @ value, lse


def made(batch, heads, kv_heads, q_len, k_len, dim, value_dim, dtype):
    shapes = (batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, value_dim)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def tokens(blocks, block_q, block_k, q_len, k_len, causal):
    """Bool `[B, H, Nq, Nk]` of blocks `[B, H, nq, nk]`."""
    seen = blocks.repeat_interleave(block_q, 2)[:, :, :q_len].repeat_interleave(block_k, 3)[..., :k_len]
    if causal:
        seen = seen & (torch.arange(k_len) <= torch.arange(q_len)[:, None] + k_len - q_len)
    return seen


SHAPES = {
    # name: batch, heads, kv_heads, q_len, k_len, dim, value_dim, block_q, block_k
    "whole blocks": (1, 4, 4, 256, 256, 64, 64, 128, 128),
    "groups of two": (2, 4, 2, 200, 330, 64, 64, 64, 64),
    "groups of three, ends": (1, 6, 2, 77, 131, 128, 64, 32, 48),
    "one key head": (1, 8, 1, 65, 65, 32, 96, 16, 40),
    "odd head dims": (2, 2, 1, 50, 70, 40, 24, 16, 20),
    "tiny": (1, 2, 2, 3, 5, 8, 8, 2, 2),
    "more queries than keys": (1, 2, 1, 90, 40, 64, 32, 32, 16),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_block_sparse(shape, dtype, causal, native_kernel, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    *sizes, block_q, block_k = shape
    query, key, value = made(*sizes, dtype)
    q_len, k_len, scale = query.shape[2], key.shape[2], query.shape[3] ** -0.5
    blocks = torch.rand(query.shape[0], query.shape[1], -(-q_len // block_q), -(-k_len // block_k)) < 0.5
    pattern = BlockPattern.from_dense(blocks, block_q=block_q, block_k=block_k, q_len=q_len, k_len=k_len)
    out, lse = ops.block_sparse_attention(query, key, value, pattern, causal=causal, return_lse=True)
    assert path_counts()["block_sparse_attention | torch: native"] == 1
    seen = tokens(blocks, block_q, block_k, q_len, k_len, causal)
    oracle, plain = (written_out(query, key, value, seen, scale, d) for d in (torch.float64, dtype))
    nothing = ~seen.any(-1)
    assert torch.equal(lse.isinf(), nothing) and bool((out[nothing] == 0).all())
    for got, eager, right in zip((out, lse), plain, oracle, strict=True):
        eager, right = (x.masked_fill(nothing[..., None] if x.dim() == 4 else nothing, 0) for x in (eager, right))
        got = got.masked_fill(nothing[..., None] if got.dim() == 4 else nothing, 0)
        assert_as_good_as_eager(got, eager.to(got.dtype), right, what=str(shape))


LEVELS = torch.tensor([0, 1, 2, 4, 8], dtype=torch.uint8)


@pytest.mark.parametrize("tail", ["replicate", "exact"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_pyramid(dtype, causal, tail, native_kernel, monkeypatch):
    for batch, heads, kv_heads, q_len, k_len, dim, value_dim, block_q, block_k in (
        (1, 4, 2, 300, 300, 64, 64, 128, 128),
        (2, 2, 1, 70, 210, 32, 96, 32, 64),
        (1, 3, 3, 40, 40, 24, 8, 16, 8),
        (1, 2, 2, 5, 3, 64, 64, 8, 32),
    ):
        query, key, value = made(batch, heads, kv_heads, q_len, k_len, dim, value_dim, dtype)
        shape = batch, heads, -(-q_len // block_q), -(-k_len // block_k)
        levels = LEVELS[torch.randint(0, 5, shape)]
        levels[:, 0, 0] = 0

        def run(path, *tensors, levels=levels, block_q=block_q, block_k=block_k):
            monkeypatch.setenv("HF_ATTN_BACKEND", path)
            sizes = {"block_q": block_q, "block_k": block_k, "causal": causal, "tail": tail}
            return ops.pyramid_attention(*tensors, levels, return_lse=True, **sizes)

        before = path_counts().get("pyramid_attention | torch: native", 0)
        got = run("native", query, key, value)
        assert path_counts()["pyramid_attention | torch: native"] == before + 1
        plain = run("reference", query, key, value)
        # Half precision rounds pooled keys: no score moves by more than this.
        moved = 0.0 if dtype == torch.float32 else ((query.abs() @ key.abs().repeat_interleave(
            heads // kv_heads, 1).mT).max().item() * dim**-0.5 * 2**-9)  # fmt: skip
        oracle = run("reference", *(x.double() for x in (query, key, value)))
        for a, eager, right, floor in zip(got, plain, oracle, (0.0, moved), strict=True):
            assert_as_good_as_eager(a, eager, right, slack=4, floor=floor, what=f"{shape} {a.dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_sampled_importance(dtype, native_kernel, monkeypatch):
    from hf_attn.ops.hfattn_sparse.pyramid.selection import sample_offsets, sampled_importance

    for q_len, k_len, block_q, block_k, dim, kv_heads in (
        (300, 410, 128, 128, 64, 2),
        (177, 200, 128, 64, 64, 1),
        (100, 120, 32, 96, 96, 4),
        (64, 64, 256, 256, 32, 2),
        (33, 9, 8, 8, 64, 4),
    ):
        query, key, _ = made(2, 4, kv_heads, q_len, k_len, dim, dim, dtype)
        offsets = sample_offsets(query, block_q, block_k, 3)
        rule = {"block_q": block_q, "block_k": block_k, "scale": dim**-0.5, "estimator": "softmax", "reduce": "max"}
        monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
        plain = sampled_importance(query, key, *offsets, **rule)
        oracle = sampled_importance(query.double(), key.double(), *offsets, **rule)
        monkeypatch.setenv("HF_ATTN_BACKEND", "native")
        assert_as_good_as_eager(sampled_importance(query, key, *offsets, **rule), plain, oracle, slack=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_hidden_keys_stay_out_and_visible_ones_do_not(dtype, native_kernel, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    query, key, value = made(1, 2, 2, 128, 128, 64, 64, dtype)
    pattern = BlockPattern.from_dense(
        torch.ones(1, 1, 4, 4, dtype=torch.bool), block_q=32, block_k=32, q_len=128, k_len=128
    )
    clean = ops.block_sparse_attention(query, key, value, pattern, causal=True)
    for tensor, bad in ((key, float("nan")), (value, float("inf")), (value, float("nan"))):
        spoilt = [x.clone() for x in (key, value)]
        spoilt[0 if tensor is key else 1][:, :, 100] = bad
        out = ops.block_sparse_attention(query, *spoilt, pattern, causal=True)
        assert torch.equal(out[:, :, :96], clean[:, :, :96])
        assert torch.allclose(out[:, :, 96:100].float(), clean[:, :, 96:100].float(), atol=0.02, rtol=0.02)
        assert not out[:, :, 100:].isfinite().all(-1).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_large_scores(dtype, native_kernel, monkeypatch):
    """Scores of thousands, rising and falling along the keys: references follow, nothing overflows."""
    query, key, value = made(1, 2, 1, 64, 700, 64, 64, dtype)
    key = key * torch.linspace(-400, 400, 700)[:, None].to(dtype)
    pattern = BlockPattern.from_dense(
        torch.ones(1, 1, 1, 11, dtype=torch.bool), block_q=64, block_k=64, q_len=64, k_len=700
    )

    def run(path, *tensors):
        monkeypatch.setenv("HF_ATTN_BACKEND", path)
        return ops.block_sparse_attention(*tensors, pattern, return_lse=True)

    oracle, plain = (run("reference", *(x.to(d) for x in (query, key, value))) for d in (torch.float64, dtype))
    for got, eager, right in zip(run("native", query, key, value), plain, oracle, strict=True):
        assert_as_good_as_eager(got, eager, right, slack=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_layouts_threads_and_packed_rows(dtype, native_kernel, monkeypatch):
    """Heads-last memory, any number of threads and sequences of a packed row give what whole tensors give."""
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    query, key, value = made(1, 6, 2, 300, 300, 64, 64, dtype)
    pattern = BlockPattern.from_dense(torch.rand(1, 6, 5, 5) < 0.7, block_q=64, block_k=64, q_len=300, k_len=300)
    whole = ops.block_sparse_attention(query, key, value, pattern, causal=True, return_lse=True)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for tensors in ((query, key, value), turned):
                again = ops.block_sparse_attention(*tensors, pattern, causal=True, return_lse=True)
                assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    finally:
        torch.set_num_threads(before)
    bounds = torch.tensor([0, 130, 130, 300], dtype=torch.int32)
    full = BlockPattern.from_dense(
        torch.ones(1, 1, 5, 5, dtype=torch.bool), block_q=64, block_k=64, q_len=300, k_len=300
    )
    packed = ops.block_sparse_attention(query, key, value, full, causal=True, cu_seqlens_q=bounds)
    for start, end in ((0, 130), (130, 300)):
        parts = [x[:, :, start:end] for x in (query, key, value)]
        count = -(-(end - start) // 64)
        blocks = torch.ones(1, 1, count, count, dtype=torch.bool)
        own = BlockPattern.from_dense(blocks, block_q=64, block_k=64, q_len=end - start, k_len=end - start)
        assert torch.equal(packed[:, :, start:end], ops.block_sparse_attention(*parts, own, causal=True))


def test_gradients(native_kernel, monkeypatch):
    """The backward is that of the torch path, from the kernel's results."""
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    query, key, value = (x.requires_grad_() for x in made(1, 4, 2, 600, 600, 64, 64, torch.float32))
    pattern = BlockPattern.from_dense(
        torch.ones(1, 1, 10, 10).tril().bool(), block_q=64, block_k=64, q_len=600, k_len=600
    )
    out = ops.block_sparse_attention(query, key, value, pattern, causal=True)
    assert path_counts()["block_sparse_attention | torch: native"] == 1
    weight = torch.randn_like(out)
    got = torch.autograd.grad(out, (query, key, value), weight)
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    exact = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    right = torch.autograd.grad(exact, wide, weight.double())
    for a, b in zip(got, right, strict=True):
        assert torch.allclose(a.double(), b, atol=2e-5, rtol=1e-4)


def test_compiled_graph(native_kernel, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    pattern = BlockPattern.from_dense(
        torch.ones(1, 1, 10, 10).tril().bool(), block_q=64, block_k=64, q_len=600, k_len=600
    )
    tensors = made(1, 4, 2, 600, 600, 64, 64, torch.float32)

    def attend(query, key, value):
        return ops.block_sparse_attention(query, key, value, pattern, causal=True) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*tensors), attend(*tensors))
    assert path_counts()["block_sparse_attention | torch: native"] == 2


def test_what_it_does_not_take_stays_on_the_torch_path(native_kernel, monkeypatch):
    pattern = BlockPattern.from_dense(
        torch.ones(1, 1, 10, 10, dtype=torch.bool), block_q=64, block_k=64, q_len=600, k_len=600
    )
    tensors = made(1, 4, 2, 600, 600, 64, 64, torch.float32)
    cases = {
        "float32 and bfloat16, got torch.float64": ([x.double() for x in tensors], {}),
        "scale must be positive": (tensors, {"scale": -1.0}),
        "no key_bias": (tensors, {"key_bias": torch.zeros(1, 1, 600)}),
        "side by side": ([tensors[0].mT.contiguous().mT, *tensors[1:]], {}),
    }
    for words, (given, options) in cases.items():
        monkeypatch.setenv("HF_ATTN_BACKEND", "auto")
        ops.block_sparse_attention(*given, pattern, **options)
        assert "block_sparse_attention | torch: native" not in path_counts()
        monkeypatch.setenv("HF_ATTN_BACKEND", "native")
        with pytest.raises(RuntimeError, match=words):
            ops.block_sparse_attention(*given, pattern, **options)
    few = [x[:, :, :1] for x in tensors[:1]] + tensors[1:]
    short = BlockPattern.from_dense(
        torch.ones(1, 1, 1, 10, dtype=torch.bool), block_q=64, block_k=64, q_len=1, k_len=600
    )
    monkeypatch.setenv("HF_ATTN_BACKEND", "auto")
    ops.block_sparse_attention(*few, short)
    assert "block_sparse_attention | torch: native" not in path_counts()


def test_plans_are_kept_while_a_pattern_lives_unchanged(native_kernel, monkeypatch):
    from hf_attn.ops.hfattn_sparse.block_sparse import plans

    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    made_plans = []
    monkeypatch.setattr(plans, "plan_tiles", lambda *a, f=plans.plan_tiles, **o: made_plans.append(1) or f(*a, **o))
    query, key, value = made(1, 2, 2, 128, 128, 32, 32, torch.float32)
    blocks = torch.eye(4, dtype=torch.bool)[None, None]
    pattern = BlockPattern.from_dense(blocks, block_q=32, block_k=32, q_len=128, k_len=128)
    first = ops.block_sparse_attention(query, key, value, pattern)
    again = ops.block_sparse_attention(query, key, value, pattern)
    assert torch.equal(first, again) and len(made_plans) == 1
    pattern.indices.copy_(pattern.indices.flip(2))
    changed = ops.block_sparse_attention(query, key, value, pattern)
    assert len(made_plans) == 2
    assert torch.allclose(changed[:, :, :32], torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :32], key[:, :, 96:], value[:, :, 96:]), atol=1e-6)  # fmt: skip


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_a_build_without_wide_vectors(level, tmp_path, monkeypatch):
    """The sources hold without AMX and AVX-512, too, without a warning, and the results are right."""
    monkeypatch.setenv("HF_ATTN_CACHE", str(tmp_path))
    flags = [flag.replace("native", level) for flag in library.FLAGS]
    program = [*library.compiler().split(), *flags, "-Werror", "-Wall", "-Wno-psabi"]
    subprocess.run([*program, str(library.SOURCE), "-o", str(library.built_file())], check=True)
    assert library.available() and not library.has_matrix_tiles()
    assert all(worst(dtype) <= 1 for dtype in DTYPES)


NEIGHBORHOODS = {
    # name: space, heads, kv_heads, dim, value_dim, options
    "image, groups": ((20, 17), 4, 2, 32, 32, {"kernel_size": (7, 5)}),
    "line, dilated, causal": ((31,), 2, 2, 64, 32, {"kernel_size": 7, "dilation": 2, "is_causal": True}),
    "video": ((6, 9, 10), 2, 1, 32, 64, {"kernel_size": (3, 3, 5)}),
    "strides, odd head dims": ((16, 16), 3, 3, 24, 40, {"kernel_size": 4, "stride": 4}),
    "whole axis": ((9, 40), 2, 2, 32, 32, {"kernel_size": (9, 11)}),
    "wider than a chunk": ((40, 40), 1, 1, 64, 64, {"kernel_size": 19}),
    "tiny": ((3, 2), 1, 1, 32, 32, {"kernel_size": (3, 2)}),
}


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "rpb"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", NEIGHBORHOODS.values(), ids=NEIGHBORHOODS)
def test_neighborhoods(case, dtype, biased, native_kernel, monkeypatch):
    space, heads, kv_heads, dim, value_dim, options = case
    tensors = [
        torch.randn(2, *space, n, d).to(dtype) for n, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    ]
    sizes = (
        options["kernel_size"] if isinstance(options["kernel_size"], tuple) else (options["kernel_size"],) * len(space)
    )
    rpb = torch.randn(heads, *(2 * k - 1 for k in sizes)) if biased else None
    options = {**options, "kernel_size": sizes}
    if biased and (options.get("is_causal") or any(k % 2 == 0 for k in sizes)):
        pytest.skip("a relative bias needs odd windows that are not causal")

    def run(path, tensors, rpb):
        monkeypatch.setenv("HF_ATTN_BACKEND", path)
        return ops.neighborhood_attention(*tensors, rpb=rpb, return_lse=True, **options)

    got = run("native", tensors, rpb)
    assert path_counts()["neighborhood_attention | torch: native"] == 1
    oracle = run("reference", [x.double() for x in tensors], None if rpb is None else rpb.double())
    # In half precision the reference rounds weights, the torch path does not: statistics are judged by fp32.
    plain = run("reference", tensors, rpb)[0], run("reference", [x.float() for x in tensors], rpb)[1]
    for a, eager, right, slack in zip(got, plain, oracle, (2, 8), strict=True):
        assert_as_good_as_eager(a, eager, right, slack=slack, what=f"{space} {a.dtype}")


def test_neighborhoods_whose_lists_would_be_large_stay_in_torch(native_kernel, monkeypatch):
    from hf_attn.ops.hfattn_sparse.neighborhood import native_path

    monkeypatch.setattr(native_path, "MOST_LISTED", 1000)
    query, key, value = (torch.randn(1, 30, 30, 2, 32) for _ in range(3))
    ops.neighborhood_attention(query, key, value, kernel_size=7)
    assert "neighborhood_attention | torch: native" not in path_counts()
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    with pytest.raises(RuntimeError, match="lists of its tiles' keys would be too large; set HF_ATTN_BACKEND"):
        ops.neighborhood_attention(query, key, value, kernel_size=7)


def test_neighborhoods_with_keys_off_the_grid_and_hidden_infinities(native_kernel, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    query, key, value = (torch.randn(1, 12, 12, 2, 32) for _ in range(3))
    more = {"additional_keys": torch.randn(1, 5, 2, 32), "additional_values": torch.randn(1, 5, 2, 32)}
    clean = ops.neighborhood_attention(query, key, value, kernel_size=5, **more)
    assert path_counts()["neighborhood_attention | torch: native"] == 1
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    assert torch.allclose(clean, ops.neighborhood_attention(query, key, value, kernel_size=5, **more), atol=2e-6)
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    value[0, 0, 0] = float("inf")
    out = ops.neighborhood_attention(query, key, value, kernel_size=5, **more)
    reached = torch.zeros(12, 12, dtype=torch.bool)
    reached[:3, :3] = True
    assert not out[0, reached].isfinite().any()
    assert torch.allclose(out[0, ~reached], clean[0, ~reached], atol=1e-6)
