"""Both ops on random configurations against the fp64 reference: forward, lse and every gradient."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.call import TokenLayout
from hf_attn.pattern import BlockPattern
from tests.budget import assert_as_good_as_eager

COUNT = 125
LENGTHS = [1, 2, 7, 15, 31, 63, 64, 65, 127, 129, 200, 300]


@dataclass(frozen=True)
class Setting:
    """One random configuration; `str` of it is the test id."""

    number: int
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    value_dim: int
    block_q: int
    block_k: int
    top_k: int
    causal: bool
    layout: str
    dtype: torch.dtype
    scale: float | None
    with_bias: bool
    pattern_heads: int

    def __str__(self) -> str:
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[
            self.dtype
        ]
        return (
            f"{self.number}-B{self.batch}-H{self.heads}kv{self.kv_heads}-N{self.q_len}x{self.k_len}-D{self.dim}v"
            f"{self.value_dim}-bs{self.block_q}x{self.block_k}-{self.layout}-{dtype}"
        )


def draw_setting(number: int) -> Setting:
    pick = random.Random(number)
    kv_heads, group = pick.choice([1, 2, 3]), pick.choice([1, 1, 2, 3, 4])
    k_len = pick.choice(LENGTHS)
    layout = pick.choice(["full", "full", "full", "padded", "packed", "shorter", "longer"])
    q_len = k_len
    if layout == "shorter":
        q_len = pick.randint(1, k_len)
    elif layout == "longer":
        q_len = k_len + pick.randint(1, 9)
    dim = pick.choice([4, 12, 16, 64, 96])
    return Setting(
        number=number,
        batch=1 if layout == "packed" else pick.choice([1, 2, 3]),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        k_len=k_len,
        dim=dim,
        value_dim=pick.choice([dim, dim, 8, 20]),
        block_q=pick.choice([1, 5, 16, 32, 128]),
        block_k=pick.choice([1, 5, 16, 32, 128]),
        top_k=pick.choice([1, 2, 3, 5, 40]),
        causal=pick.random() < 0.7,
        layout=layout,
        dtype=pick.choice([torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float64]),
        scale=pick.choice([None, None, 1.0, 0.05]),
        with_bias=pick.random() < 0.3,
        pattern_heads=pick.choice([1, kv_heads, kv_heads * group]),
    )


SETTINGS = [draw_setting(number) for number in range(COUNT)]


def draw_tensors(s: Setting) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(s.number)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(s.dtype)

    return {
        "query": draw(s.batch, s.heads, s.q_len, s.dim),
        "key": draw(s.batch, s.kv_heads, s.k_len, s.dim),
        "value": draw(s.batch, s.kv_heads, s.k_len, s.value_dim),
        "grad_out": draw(s.batch, s.heads, s.q_len, s.value_dim),
        "grad_lse": torch.randn(s.batch, s.heads, s.q_len, generator=generator),
        "bias": torch.randn(s.batch, s.pattern_heads, s.k_len, generator=generator),
    }


def draw_layout(s: Setting) -> TokenLayout | None:
    pick = random.Random(s.number + 1000)
    if s.layout == "padded":
        lengths = [pick.randint(1, s.k_len) for _ in range(s.batch)]
        starts = [pick.choice([0, s.k_len - n]) for n in lengths]
        return TokenLayout.padded(torch.tensor(starts), torch.tensor(lengths), s.q_len, s.k_len)
    if s.layout == "packed":
        cuts = sorted(pick.sample(range(1, s.k_len), min(3, s.k_len - 1))) if s.k_len > 1 else []
        cu = torch.tensor([0, *cuts, s.k_len])
        return TokenLayout.packed(cu, cu, s.q_len, s.k_len)
    return None


def evaluate(attention, t: dict[str, Tensor], dtype: torch.dtype, with_bias: bool) -> dict[str, Tensor]:
    """Output, lse and all gradients of sum(out * grad_out) + sum(lse * grad_lse over rows that see something)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t[name].to(dtype).detach().requires_grad_() for name in ("query", "key", "value")]
    if with_bias:
        leaves.append(t["bias"].to(wide).detach().requires_grad_())
    out, lse = attention(*leaves)
    seen = lse.isfinite()
    loss = (out.to(wide) * t["grad_out"].to(wide)).sum() + (torch.where(seen, lse, 0) * t["grad_lse"].to(wide)).sum()
    grads = torch.autograd.grad(loss, leaves)
    names = ("dq", "dk", "dv", "dbias")[: len(grads)]
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}


def compare(attention, s: Setting, monkeypatch, with_bias: bool = False) -> None:
    t = draw_tensors(s)
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    eager = evaluate(attention, t, s.dtype, with_bias)
    oracle = evaluate(attention, t, torch.float64, with_bias)
    for backend in ("torch", "auto"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        got = evaluate(attention, t, s.dtype, with_bias)
        for name in oracle:
            # In half precision a score may be rounded once to the inputs' type; lse is as exact as a score.
            half = name == "lse" and s.dtype in (torch.bfloat16, torch.float16)
            floor = torch.finfo(s.dtype).eps if half else 0.0
            if backend == "auto" and s.dtype == torch.float32:
                # A dense form on the CPU is torch's flash kernel, whose fast exponential is good to about 5e-6.
                floor = 1e-5 * float(oracle[name].nan_to_num(0, 0, 0).abs().max())
            # Gradients recompute the probabilities from lse and carry its rounding.
            slack = 2.0 if name in ("out", "lse") else 4.0
            assert_as_good_as_eager(
                got[name], eager[name], oracle[name], slack=slack, floor=floor, what=f"{backend} {name}"
            )


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_block_sparse(s, monkeypatch):
    size = {"block_q": s.block_q, "block_k": s.block_k, "q_len": s.q_len, "k_len": s.k_len}
    generator = torch.Generator().manual_seed(s.number)
    shape = (s.batch, s.pattern_heads, -(-s.q_len // s.block_q), -(-s.k_len // s.block_k))
    pattern = BlockPattern.from_dense(torch.rand(shape, generator=generator) < 0.4, **size)
    tokens = draw_layout(s)
    if s.layout == "packed":
        pattern = BlockPattern.from_dense(pattern.to_dense()[:1], **size)

    def attention(query, key, value, bias=None):
        return ops.block_sparse_attention(
            query, key, value, pattern, causal=s.causal, scale=s.scale, key_bias=bias, return_lse=True, tokens=tokens
        )

    compare(attention, s, monkeypatch, s.with_bias)
    assert ops.path_counts()["block_sparse_attention | torch"] == 2


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_routed(s, monkeypatch):
    tokens = draw_layout(s)
    t = draw_tensors(s)
    routed = ops.select_routes(
        t["query"], t["key"], block_size=s.block_k, top_k=s.top_k, causal=s.causal, tokens=tokens
    )
    if s.number % 3 == 0:  # not only what MoBA would choose: any blocks, in any order, some twice
        generator = torch.Generator().manual_seed(s.number)
        shape = (s.batch, s.heads, s.q_len, min(s.top_k, 6))
        routed = torch.randint(-1, -(-s.k_len // s.block_k), shape, generator=generator)

    def attention(query, key, value):
        return ops.routed_block_attention(
            query, key, value, routed, block_size=s.block_k, causal=s.causal, scale=s.scale, return_lse=True,
            tokens=tokens,
        )  # fmt: skip

    compare(attention, s, monkeypatch)
    assert any(name.startswith("routed_block_attention | torch") for name in ops.path_counts())


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_routes(s, monkeypatch):
    """The fast routing chooses the reference's blocks, ties included."""
    t = draw_tensors(s)
    if s.number % 4 == 0:
        t["key"] = t["key"].round()  # many equal scores
        t["query"] = t["query"].sign()
    t = {name: tensor.double() for name, tensor in t.items()}
    options = {"block_size": s.block_k, "top_k": s.top_k, "causal": s.causal, "tokens": draw_layout(s)}
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    expected = ops.select_routes(t["query"], t["key"], **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    assert torch.equal(ops.select_routes(t["query"], t["key"], **options), expected)


def test_constant_keys_choose_the_most_recent_blocks():
    query, key = torch.randn(1, 2, 100, 8), torch.ones(1, 1, 100, 8)
    routes = ops.select_routes(query, key, block_size=10, top_k=3)
    for position in range(100):
        own = position // 10
        expected = [b for b in (own - 2, own - 1, own) if b >= 0]
        assert routes[0, 0, position].tolist() == expected + [-1] * (3 - len(expected))


def test_large_scores_do_not_overflow(monkeypatch):
    """One far block 200 above a query's own: the softmax must follow it."""
    query, key, value = (torch.randn(1, 2, 256, 16) for _ in range(3))
    key[:, :, 32:64] += 40 * query.mean(2, keepdim=True).sign()
    query += 10 * query.mean(2, keepdim=True).sign()
    options = {"block_size": 32, "scale": 1.0}
    for backend in ("reference", "torch"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        routes = ops.select_routes(query, key, block_size=32, top_k=3)
        out = ops.routed_block_attention(query, key, value, routes, **options)
        assert out.isfinite().all()
        expected = out if backend == "reference" else expected  # noqa: F821
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", [-300.0, -70.0, 70.0, 300.0])
def test_block_sparse_scores_far_from_zero(level, monkeypatch):
    """Plain exponentials would overflow or vanish; one row in two keeps ordinary scores in the same tiles."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 200, 16, generator=generator) for h in (4, 2, 2))
    key[..., 0] = 1.0
    query[:, :, ::2, 0] += level
    size = {"block_q": 32, "block_k": 32, "q_len": 200, "k_len": 200}
    pattern = BlockPattern.causal_blocks(**size) - BlockPattern.prefix(32, **size)
    results = {}
    for backend, dtype in (("reference", torch.float64), ("torch", torch.float32)):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        tensors = [t.to(dtype) for t in (query, key, value)]
        results[backend] = ops.block_sparse_attention(*tensors, pattern, causal=True, scale=1.0, return_lse=True)
    for got, expected in zip(results["torch"], results["reference"], strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite())
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
