"""The torch core of block-sparse attention against a dense fp64 masked softmax written out here."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hf_attn.ops.hfattn_sparse.block_sparse import torch_backward, torch_forward, torch_path

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Shape:
    """One configuration; `pattern` and `bias` say how many heads the pattern and the bias have (0 = no bias)."""

    batch: int
    kv_heads: int
    group: int
    q_len: int
    k_len: int
    dim: int
    dim_v: int
    block_q: int
    block_k: int
    causal: bool
    pattern: int
    bias: int
    strided: bool
    dtype: str
    seed: int

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    def __str__(self) -> str:
        return (
            f"{self.seed}-B{self.batch}-H{self.q_heads}/{self.kv_heads}-{self.q_len}x{self.k_len}-D{self.dim}"
            f"/{self.dim_v}-b{self.block_q}x{self.block_k}-{'causal' if self.causal else 'full'}-{self.dtype}"
        )


def random_shapes(count: int) -> list[Shape]:
    shapes = []
    for seed in range(count):
        pick = random.Random(seed)
        lengths, blocks = (1, 2, 7, 63, 127, 129, 300), (1, 5, 16, 32, 48, 64, 128)
        k_len = pick.choice(lengths)
        q_len = pick.choice((k_len, k_len, pick.choice(lengths)))
        kv_heads, group = pick.choice((1, 2)), pick.choice((1, 2, 4))
        dim = pick.choice((12, 64, 96))
        block_q = pick.choice(blocks)
        heads = (1, kv_heads, kv_heads * group)
        shapes.append(
            Shape(
                batch=pick.choice((1, 2, 3)),
                kv_heads=kv_heads,
                group=group,
                q_len=q_len,
                k_len=k_len,
                dim=dim,
                dim_v=pick.choice((dim, dim, 40)),
                block_q=block_q,
                block_k=pick.choice((block_q, pick.choice(blocks))),
                causal=pick.random() < 0.6,
                pattern=pick.choice(heads),
                bias=pick.choice((0, 0, *heads)),
                strided=pick.random() < 0.5,
                dtype=pick.choice(("fp32", "fp32", "bf16", "bf16", "fp16", "fp64")),
                seed=seed,
            )
        )
    return shapes


def make_inputs(s: Shape, spread: float = 1.0) -> dict[str, Tensor | None]:
    """Random inputs, a pattern with holes, repeats and empty rows, and gradients for both results."""
    g = torch.Generator().manual_seed(s.seed)
    dtype = DTYPES[s.dtype]

    def tensor(heads: int, length: int, dim: int) -> Tensor:
        if s.strided:  # tokens before heads, cut out of a longer buffer
            return torch.randn(s.batch, length + 3, heads, dim, generator=g).to(dtype).transpose(1, 2)[:, :, 2:-1]
        return torch.randn(s.batch, heads, length, dim, generator=g).to(dtype)

    rows, columns = -(-s.q_len // s.block_q), -(-s.k_len // s.block_k)
    batch = int(torch.randint(2, (), generator=g)) * (s.batch - 1) + 1
    indices = torch.randint(-max(1, columns // 2), columns, (batch, s.pattern, rows, min(columns, 6) + 1), generator=g)
    indices[torch.rand(indices.shape[:3], generator=g) < 0.1] = -1
    bias = None
    if s.bias:
        bias = torch.randn(1, s.bias, s.k_len, generator=g)
        bias[torch.rand(bias.shape, generator=g) < 0.2] = float("-inf")
    return {
        "query": tensor(s.q_heads, s.q_len, s.dim) * spread,
        "key": tensor(s.kv_heads, s.k_len, s.dim),
        "value": tensor(s.kv_heads, s.k_len, s.dim_v),
        "indices": indices.clamp(min=-1).int(),
        "key_bias": bias,
        "grad_out": torch.randn(s.batch, s.q_heads, s.q_len, s.dim_v, generator=g).to(dtype),
        "grad_lse": torch.randn(s.batch, s.q_heads, s.q_len, generator=g),
    }


def token_mask(s: Shape, indices: Tensor) -> Tensor:
    """bool [B, Hq, Nq, Nk], by the definition."""
    columns = -(-s.k_len // s.block_k)
    blocks = (indices[..., None] == torch.arange(columns)).any(-2)
    blocks = blocks.repeat_interleave(s.q_heads // blocks.shape[1], 1)
    mask = blocks.repeat_interleave(s.block_q, 2)[:, :, : s.q_len].repeat_interleave(s.block_k, 3)[..., : s.k_len]
    if s.causal:
        mask = mask & torch.ones(s.q_len, s.k_len, dtype=torch.bool).tril(s.k_len - s.q_len)
    return mask.expand(s.batch, -1, -1, -1)


def dense(s: Shape, x: dict[str, Tensor | None], dtype: torch.dtype, scale: float) -> dict[str, Tensor]:
    """Results and gradients of a dense masked softmax in `dtype`."""
    leaves = {name: x[name].detach().to(dtype).requires_grad_() for name in ("query", "key", "value")}
    bias = None if x["key_bias"] is None else x["key_bias"].detach().to(dtype).requires_grad_()
    key, value = (leaves[name].repeat_interleave(s.group, 1) for name in ("key", "value"))
    scores = leaves["query"] @ key.mT * scale
    if bias is not None:
        scores = scores + bias.repeat_interleave(s.q_heads // bias.shape[1], 1)[:, :, None]
    scores = scores.masked_fill(~token_mask(s, x["indices"]), float("-inf"))
    sees = scores.detach().amax(-1, keepdim=True) > float("-inf")
    scores = torch.where(sees, scores, 0.0)
    out = torch.where(sees, scores.softmax(-1) @ value, 0.0)
    lse = scores.logsumexp(-1)
    sees = sees.squeeze(-1)
    torch.autograd.backward([out, torch.where(sees, lse, 0.0)], [x["grad_out"].to(dtype), x["grad_lse"].to(dtype)])
    results = {"out": out.detach(), "lse": lse.detach().masked_fill(~sees, float("-inf"))}
    results |= {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
    if bias is not None:
        results["d_bias"] = bias.grad
    return results


def sparse(s: Shape, x: dict[str, Tensor | None], scale: float) -> dict[str, Tensor]:
    options = {
        "block_q": s.block_q,
        "block_k": s.block_k,
        "causal": s.causal,
        "scale": scale,
        "key_bias": x["key_bias"],
    }
    inputs = (x["query"], x["key"], x["value"], x["indices"])
    out, lse = torch_path.forward(*inputs, **options)
    grads = torch_path.backward(x["grad_out"], x["grad_lse"], *inputs, out, lse, **options)
    names = ("d_query", "d_key", "d_value", "d_bias")
    return {"out": out, "lse": lse} | {n: g for n, g in zip(names, grads, strict=True) if g is not None}


def assert_close(s: Shape, x: dict[str, Tensor | None], scale: float, slack: float = 2.0) -> None:
    """Every result as good as the same-dtype eager one, against fp64."""
    dtype = DTYPES[s.dtype]
    got, eager, oracle = sparse(s, x, scale), dense(s, x, dtype, scale), dense(s, x, torch.float64, scale)
    assert set(got) == set(oracle)
    for name, exact in oracle.items():
        value = got[name]
        assert value.shape == exact.shape, name
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert value.dtype == {"lse": wide, "d_bias": torch.float32}.get(name, dtype), name
        assert torch.equal(value == float("-inf"), exact == float("-inf")), name
        eps = torch.finfo(value.dtype).eps
        value, exact, same = (t.double().nan_to_num(neginf=0.0) for t in (value, exact, eager[name]))
        allowed = slack * ((same - exact).abs().max() + eps * exact.abs().max())
        if name == "lse":  # accumulated in fp32 whatever the inputs are
            allowed = 16 * eps * exact.abs().max().clamp(min=1)
        worst = (value - exact).abs().max()
        assert worst <= allowed + 1e-12, f"{name}: {worst:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("shape", random_shapes(80), ids=str)
def test_matches_dense(shape: Shape):
    assert_close(shape, make_inputs(shape), shape.dim**-0.5)


@pytest.mark.parametrize("shape", random_shapes(80), ids=str)
def test_routes_of_large_calls(shape: Shape, monkeypatch):
    """The fast routes, which small calls avoid because a few keys leave ds as a difference of large numbers."""
    monkeypatch.setattr(torch_path, "SMALL", -1)
    for module in (torch_forward, torch_backward):  # several chunks, and rows in several pieces
        monkeypatch.setattr(module, "CHUNK_SCORES", 4096)
    x = make_inputs(shape)
    scale = shape.dim**-0.5
    got, exact = sparse(shape, x, scale), dense(shape, x, torch.float64, scale)
    for name, right in exact.items():
        value = got[name].double()
        eps = max(torch.finfo(t.dtype).eps for t in (got[name], x["query"]))
        assert torch.equal(value == float("-inf"), right == float("-inf")), name
        size = x["grad_out"].double().norm(dim=-1).max() * x["value"].double().norm(dim=-1).max()
        size = size if name in ("d_query", "d_key", "d_bias") else right.nan_to_num(neginf=0.0).abs().max()
        worst = (value - right).nan_to_num(nan=0.0).abs().max()
        assert value.isnan().sum() == 0 and worst <= 8 * eps * size.clamp(min=1), f"{name}: {worst:.2e}"


LARGE = Shape(1, 2, 2, 300, 300, 64, 64, 64, 64, True, 4, 0, False, "bf16", 0)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_large_scores(dtype: str, small: bool, monkeypatch):
    """Scores up to about 50, where the softmax is nearly one-hot."""
    if not small:
        monkeypatch.setattr(torch_path, "SMALL", -1)
    shape = replace(LARGE, dtype=dtype)
    x = make_inputs(shape, spread=12.0)
    x["grad_lse"].zero_()
    scale = shape.dim**-0.5
    got, eager = sparse(shape, x, scale), dense(shape, x, DTYPES[dtype], scale)
    exact = dense(shape, x, torch.float64, scale)
    for name in ("out", "d_query", "d_key", "d_value"):
        eps = torch.finfo(DTYPES[dtype]).eps
        allowed = 2 * ((eager[name] - exact[name]).abs().max() + eps * exact[name].abs().max())
        assert (got[name].double() - exact[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_unseen_keys_do_not_leak(dtype: str, small: bool, poison: float, monkeypatch):
    """NaN or infinity in a later key of a row's own block and in blocks that nobody reads."""
    if not small:
        monkeypatch.setattr(torch_path, "SMALL", -1)
    shape = replace(LARGE, dtype=dtype)
    x = make_inputs(shape)
    x["indices"] = torch.arange(5).view(1, 1, 5, 1).expand(1, 4, 5, 1).clone()
    x["indices"][:, :, 3] = 0
    scale = shape.dim**-0.5
    clean = sparse(shape, x, scale)
    for name in ("key", "value"):
        x[name] = x[name].clone()
        x[name][:, :, 100] = poison  # in the block of rows 64 to 127
        x[name][:, :, 192:256] = poison  # block 3 is never read
    x["grad_out"][:, :, 100:128] = 0
    got = sparse(shape, x, scale)
    seen = [row for row in range(300) if not 100 <= row < 128]
    for name in ("out", "lse", "d_query"):
        torch.testing.assert_close(got[name][:, :, seen], clean[name][:, :, seen], rtol=2e-2, atol=2e-2)
    if dtype == "fp32":
        assert got["out"][:, :, 100:128].isnan().all()
    assert got["d_key"][:, :, 192:256].eq(0).all() and got["d_value"][:, :, 192:256].eq(0).all()


def test_repeats_are_bit_equal():
    x = make_inputs(LARGE)
    first, second = (sparse(LARGE, x, 0.125) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unknown_block_raises():
    x = make_inputs(LARGE)
    x["indices"][0, 0, 0, 0] = 5
    with pytest.raises(ValueError, match="key block 5"):
        sparse(LARGE, x, 0.125)
