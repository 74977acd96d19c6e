"""Routed attention and its routing on Triton kernels, through the interpreter, against the fp64 reference."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.call import TokenLayout
from hf_attn.ops.hfattn_sparse import launch
from hf_attn.ops.hfattn_sparse.routed import reference, triton_op, triton_path, triton_tables
from tests.triton_paths.routed_cases import Setting, compare, draw_layout, draw_setting, draw_tensors

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs in Triton's interpreter; tests/gpu has what runs on the device"
)

RANDOM = [draw_setting(number) for number in range(200)]
QUICK = 20
SMALL_TILES = {
    "routed_top_blocks": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    "routed_partial": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    "routed_partial_long": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    "routed_merge": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    "routed_grad_kv_indexed": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    "routed_grad_kv": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    "routed_grad_pair": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    "routed_grad_query": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Several sequences and tiles share a program, as on long inputs; it also spares the interpreter idle ones."""
    monkeypatch.setattr(triton_tables, "SPARE_PROGRAMS", 1)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def quick_then_slow(settings):
    return [pytest.param(s, id=str(s), marks=pytest.mark.slow if i >= QUICK else ()) for i, s in enumerate(settings)]


@pytest.mark.parametrize("s", quick_then_slow(RANDOM))
def test_random_configurations(s, monkeypatch):
    torch.use_deterministic_algorithms(s.number % 2 == 0)
    try:
        compare(s, monkeypatch)
    finally:
        torch.use_deterministic_algorithms(False)
    counts = ops.path_counts()
    assert counts["routed_block_attention | triton"] == counts["routed_block_attention_backward | triton"] == 1


SHAPES = {
    "gqa 3": Setting(heads=3, kv_heads=1, q_len=40, k_len=40, top_k=3),
    "gqa 8": Setting(heads=8, kv_heads=1, q_len=20, k_len=20, top_k=3, block=8),
    "head dim 8": Setting(dim=8, value_dim=8),
    "head dim 40": Setting(dim=40, value_dim=24, block=24),
    "head dim 128": Setting(dim=128, value_dim=64, q_len=33, k_len=49),
    "head dim 256": Setting(dim=256, value_dim=256, q_len=33, k_len=33),
    "block of several tiles": Setting(heads=1, block=40, q_len=90, k_len=90, top_k=2),
    "not causal": Setting(causal=False, q_len=21, k_len=75, top_k=3),
    "one new token": Setting(q_len=1, k_len=83, heads=3, kv_heads=1, top_k=3, layout="cached", batch=2),
    "length 1": Setting(q_len=1, k_len=1),
    "length 3": Setting(q_len=3, k_len=3, block=2),
    "any routes": Setting(any_routes=True, top_k=5, q_len=40, k_len=40, block=8),
    "packed fp16": Setting(layout="packed", dtype=torch.float16, top_k=3, number=5),
    "padded bf16": Setting(layout="padded", dtype=torch.bfloat16, batch=2, number=6),
}


BOTH_FORMS = ("block of several tiles", "any routes", "packed fp16", "not causal")


@pytest.mark.parametrize(("name", "form"), [(n, "atomic") for n in SHAPES] + [(n, "deterministic") for n in BOTH_FORMS])
def test_shapes_in_small_tiles(name, form, monkeypatch):
    """Tiles of 16, so that loops over tiles, splits and ends of blocks take several turns."""
    torch.use_deterministic_algorithms(form == "deterministic")
    try:
        with launch.forced_config(**SMALL_TILES):
            compare(SHAPES[name], monkeypatch)
    finally:
        torch.use_deterministic_algorithms(False)


def test_scratch_memory_of_one_head_at_a_time(monkeypatch, deterministic):
    monkeypatch.setattr(triton_path, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(triton_path, "SCRATCH", 0)
    compare(Setting(heads=4, kv_heads=2, q_len=40, k_len=40, batch=2), monkeypatch)


@pytest.mark.parametrize("number", range(24))
def test_routes_are_those_of_the_reference(number, monkeypatch):
    s = draw_setting(number)
    t = draw_tensors(s)
    if number % 4 == 0:  # many equal scores, in numbers that add up exactly
        t["key"], t["query"] = t["key"].mul(2).round(), t["query"].sign()
    if number % 4 == 0 and s.block & (s.block - 1):
        pytest.skip("means of such blocks are rounded, and so are ties")
    options = {"block_size": s.block, "top_k": s.top_k, "causal": s.causal, "tokens": draw_layout(s)}
    results = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        results[backend] = ops.select_routes(t["query"], t["key"], **options)
    assert torch.equal(results["triton"], results["reference"])
    assert ops.path_counts()["select_routes | triton"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_in_half_precision_are_as_good_as_fp32(dtype, monkeypatch):
    """Parts add up to the fp32 mean, so even scores that half precision could not tell apart are ranked right."""
    query, key = torch.randn(1, 1, 64, 64).to(dtype), torch.randn(1, 1, 512, 64).to(dtype)
    key[:, :, 256:] = key[:, :, :256]
    key[:, :, 256::8] += key[:, :, 256::8] * 0.01
    routes = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        routes[backend] = ops.select_routes(query, key, block_size=8, top_k=9, causal=False)
    assert torch.equal(routes["triton"], routes["reference"])


@pytest.mark.parametrize("slots", [4, 256])
def test_more_blocks_than_one_pass_ranks(slots, monkeypatch):
    monkeypatch.setattr(triton_path, "MAX_SLOTS", slots)
    query, key = torch.randn(1, 2, 40, 16), torch.randn(1, 1, 40, 16)
    key[:, :, 8:16] = key[:, :, :8]
    for causal in (True, False):
        got = triton_path.select_routes(query, key, None, 2, 11, causal)
        assert torch.equal(got, reference.select_routes(query, key, block_size=2, top_k=11, causal=causal))


def test_constant_keys_choose_the_most_recent_blocks(monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    routes = ops.select_routes(torch.randn(1, 2, 100, 8), torch.ones(1, 1, 100, 8), block_size=10, top_k=3)
    for position in range(100):
        own = position // 10
        expected = [b for b in (own - 2, own - 1, own) if b >= 0]
        assert routes[0, 1, position].tolist() == expected + [-1] * (3 - len(expected))


def test_strides_and_empty_inputs():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(1, 33, 4, 32, generator=generator)
    query, key, value = wide[..., ::2].transpose(1, 2), wide[:, :, :2, 16:].transpose(1, 2), wide.mT[:, :, :16, :2]
    value = value.permute(0, 3, 1, 2)[:, :, :, :16]
    routes = triton_path.select_routes(query, key, None, 8, 2, True)
    assert torch.equal(routes, reference.select_routes(query, key, block_size=8, top_k=2, causal=True))
    out, lse = triton_path.forward(query, key, value, routes, None, 8, True, 0.25)
    expected, expected_lse = reference.forward(query, key, value, routes, block_size=8, causal=True, scale=0.25)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    grads = triton_path.backward(
        expected.mT.contiguous().mT, None, query, key, value, routes, None, out, lse, 8, True, 0.25
    )
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    plain = reference.forward(*leaves, routes, block_size=8, causal=True, scale=0.25)[0]
    for got, right in zip(grads, torch.autograd.grad(plain, leaves, expected), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    for q_len, k_len, width in ((0, 9, 2), (9, 0, 0), (9, 9, 0)):
        q, k = torch.randn(1, 2, q_len, 16), torch.randn(1, 2, k_len, 16)
        out, lse = triton_path.forward(q, k, k, torch.zeros(1, 2, q_len, width).int(), None, 4, True, 1.0)
        assert not out.any() and (lse == -torch.inf).all()
        none = torch.zeros(1, 2, q_len, width).int()
        grads = triton_path.backward(out, lse, q, k, k, none, None, out, lse, 4, True, 1.0)
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hidden_keys_never_leak(bad, monkeypatch):
    """Bad values in padding, in blocks that nobody chose, and at later positions of the own block."""
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 60, 16, generator=generator) for h in (2, 1, 1))
    tokens = TokenLayout.padded(torch.tensor([3]), torch.tensor([50]), 60, 60)
    routes = torch.stack([torch.tensor([0, -1]), torch.tensor([2, 1])])[None, :, None].expand(1, 2, 60, 2).contiguous()
    routes[:, 0, 38:] = torch.tensor([0, 4])
    hidden = torch.zeros(60, dtype=torch.bool)
    hidden[:3] = hidden[53:] = True
    hidden[3 + 24 : 3 + 30] = True  # block 3 of 8 keys, and the first part of block 4 stays real
    hidden[3 + 45 :] = True  # positions after 44
    results = []
    for spoil in (False, True):
        leaves = [t.clone() for t in (query, key, value)]
        for tensor in leaves[1:]:
            tensor[:, :, hidden] = bad if spoil else 0.5
        leaves = [t.requires_grad_() for t in leaves]
        out, lse = ops.routed_block_attention(*leaves, routes, block_size=8, tokens=tokens, return_lse=True)
        keep = [row for row in range(3, 48) if not 3 + 24 <= row < 3 + 32]
        loss = out[:, :, keep].square().sum() + lse[:, :, keep].nan_to_num(0, 0, 0).sum()
        results.append([out[:, :, keep], lse[:, :, keep], *torch.autograd.grad(loss, leaves)])
        assert not out[:, :, :3].any() and not out[:, :, 53:].any()
    clean = ~hidden
    for number, (plain, spoiled) in enumerate(zip(*results, strict=True)):
        if number in (3, 4):
            plain, spoiled = plain[:, :, clean], spoiled[:, :, clean]
        if number == 2:
            plain, spoiled = plain[:, :, keep], spoiled[:, :, keep]
        assert torch.equal(plain, spoiled), number


@pytest.mark.parametrize("repeats", [3, pytest.param(250, marks=pytest.mark.slow)])
def test_repeats_are_bit_equal(repeats, deterministic):
    """Shapes for which the interpreter needs few programs."""
    s = Setting(heads=2, kv_heads=1, q_len=20, k_len=20, dim=8, value_dim=8)
    t = draw_tensors(s)
    first = None
    for _ in range(repeats):
        routes = triton_path.select_routes(t["query"], t["key"], None, 16, 2, True)
        out, lse = triton_path.forward(t["query"], t["key"], t["value"], routes, None, 16, True, 0.3)
        grads = triton_path.backward(
            t["grad_out"], t["grad_lse"], t["query"], t["key"], t["value"], routes, None, out, lse, 16, True, 0.3
        )
        results = [routes, out, lse, *grads]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@pytest.mark.parametrize("padded", [False, True])
def test_custom_op_rules(padded):
    index = TokenLayout.padded(torch.tensor([0, 3]), torch.tensor([10, 7]), 10, 10).index if padded else None
    query, key, value = (torch.randn(2, h, 10, 8, requires_grad=True) for h in (2, 1, 1))
    routes = triton_op.select_routes(query.detach(), key.detach(), index, 4, 2, True)
    torch.library.opcheck(triton_op.select_routes, (query.detach(), key.detach(), index, 4, 2, True))
    torch.library.opcheck(triton_op.routed_block_attention, (query, key, value, routes, index, 4, True, 0.5, False))


def test_compiles_once_for_all_lengths(monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")

    def layer(query, key, value):
        routes = ops.select_routes(query, key, block_size=8, top_k=2)
        return ops.routed_block_attention(query, key, value, routes, block_size=8)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (17, 25, 30):
        query, key, value = (torch.randn(1, h, length, 8, requires_grad=True) for h in (2, 1, 1))
        out = compiled(query, key, value)
        torch.testing.assert_close(out, layer(query, key, value))
        out.sum().backward()
        assert key.grad.isfinite().all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_records_every_launch_without_a_device():
    meta = {"device": "meta", "dtype": torch.bfloat16}
    query, key = torch.empty(2, 8, 1000, 128, **meta), torch.empty(2, 2, 1000, 128, **meta)
    names = set()
    for index in (None, torch.empty(2, 2, 2000, device="meta", dtype=torch.int32)):
        with launch.recording("sm_90") as launches:
            routes = triton_path.select_routes(query, key, index, 128, 4, True)
            out, lse = triton_path.forward(query, key, key, routes, index, 128, True, 0.1)
            triton_path.backward(out, None, query, key, key, routes, index, out, lse, 128, True, 0.1)
            triton_path.forward(query[:, :, :1], key, key, routes[:, :, :1], None, 128, True, 0.1)
        names |= {entry.kernel.__name__ for entry in launches}
        assert out.shape == query.shape and routes.shape == (2, 8, 1000, 4)
    assert names == {
        "centroid_kernel", "top_blocks_kernel", "list_kernel", "fill_kernel", "partial_kernel", "pair_kernel",
        "merge_kernel", "delta_kernel", "grad_kv_kernel", "grad_query_kernel",
    }  # fmt: skip


def test_what_the_check_refuses(monkeypatch):
    query, key, value = (torch.randn(1, h, 20, 8) for h in (2, 1, 1))
    routes = torch.zeros(1, 2, 20, 2, dtype=torch.int32)
    monkeypatch.setenv("HF_ATTN_CHECK", "1")
    ops.routed_block_attention(query, key, value, routes, block_size=8)
    for wrong in (3, -2):
        routes[0, 1, 4, 1] = wrong
        with pytest.raises(ValueError, match=rf"routes\[0, 1, 4, 1\] is {wrong}; allowed are -1 .* 3 blocks .* 0 to 2"):
            ops.routed_block_attention(query, key, value, routes, block_size=8)
    index = torch.stack([torch.zeros(40), torch.cat([torch.arange(20).flip(0), torch.arange(20)])])[None].int()
    with pytest.raises(ValueError, match="needs the queries of a sequence to be its last tokens"):
        ops.select_routes(query, key, block_size=8, top_k=2, tokens=TokenLayout(1, 20, 20, index))


def test_too_many_pairs_for_one_call():
    query, key = (torch.empty(1, 1, n, 8, device="meta", dtype=torch.float16) for n in (1 << 26, 1 << 20))
    routes = torch.empty(1, 1, 1 << 26, 64, device="meta", dtype=torch.int32)
    with pytest.raises(ValueError, match="routes have 67108864 x 64 entries per head"), launch.recording("sm_90"):
        triton_path.forward(query, key, key, routes, None, 128, True, 1.0)


def test_bool_routes(monkeypatch):
    """A different number of blocks for every query, some of none."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(4))
    routes = torch.rand(1, 2, 40, 5, generator=generator) > 0.5
    routes[:, :, :3] = False
    found = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = ops.routed_block_attention(*leaves, routes, block_size=8, causal=False)
        found[backend] = [out.detach(), *torch.autograd.grad((out * grad).sum(), leaves)]
    for got, want in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
