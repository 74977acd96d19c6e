"""Random configurations of routed attention that Triton's interpreter, which is slow, can afford."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.call import TokenLayout
from tests.budget import assert_as_good_as_eager

GRADIENTS = ("dq", "dk", "dv")


@dataclass(frozen=True)
class Setting:
    """One configuration; `str` of it is the test id."""

    number: int = 0
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    q_len: int = 50
    k_len: int = 50
    dim: int = 16
    value_dim: int = 16
    block: int = 16
    top_k: int = 2
    causal: bool = True
    layout: str = "full"
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    any_routes: bool = False

    def __str__(self) -> str:
        kind = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        return (
            f"{self.number}-B{self.batch}-H{self.heads}kv{self.kv_heads}-N{self.q_len}x{self.k_len}-D{self.dim}v"
            f"{self.value_dim}-bs{self.block}-k{self.top_k}-{'causal' if self.causal else 'free'}-{self.layout}-{kind}"
        )


def draw_setting(number: int) -> Setting:
    pick = random.Random(number)
    kv_heads, group = pick.choice([(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (1, 4)])
    block = pick.choice([1, 5, 16, 16, 32, 48, 128])
    lengths = {1: [1, 2, 3, 7], 5: [1, 2, 7, 15, 31]}
    k_len = pick.choice(lengths.get(block, [1, 2, 5, 7, 15, 31, 33, 63, 65, 90]))
    layout = pick.choice(["full", "full", "padded", "packed", "cached", "shorter", "longer"])
    q_len = {"shorter": pick.randint(1, k_len), "cached": pick.randint(1, k_len), "longer": k_len + pick.randint(1, 9)}
    dim = pick.choice([8, 16, 24, 64])
    return Setting(
        number=number,
        batch=1 if layout == "packed" or k_len > 40 else pick.choice([1, 2]),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len.get(layout, k_len),
        k_len=k_len,
        dim=dim,
        value_dim=pick.choice([dim, dim, 8, 40]),
        block=block,
        top_k=pick.choice([1, 2, 3, 5, 40]),
        causal=pick.random() < 0.7,
        layout=layout,
        dtype=pick.choice([torch.float32] * 3 + [torch.bfloat16, torch.float16]),
        scale=pick.choice([None, None, 1.0, 0.05]),
        any_routes=number % 3 == 0,
    )


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
    }


def draw_layout(s: Setting) -> TokenLayout | None:
    """Padding on either side, packed sequences, or a static cache with slots that are not filled yet."""
    pick = random.Random(s.number + 1000)
    if s.layout == "padded":
        lengths = [pick.randint(1, s.k_len) for _ in range(s.batch)]
        starts = [pick.choice([0, s.k_len - n]) for n in lengths]
        return TokenLayout.padded(torch.tensor(starts), torch.tensor(lengths), s.q_len, s.k_len)
    if s.layout == "packed":
        cuts = sorted(pick.sample(range(1, s.k_len), min(3, s.k_len - 1))) if s.k_len > 1 else []
        cu = torch.tensor([0, *cuts, s.k_len])
        return TokenLayout.packed(cu, cu, s.q_len, s.k_len)
    if s.layout == "cached":
        ends = [pick.randint(s.q_len, s.k_len) for _ in range(s.batch)]
        positions = [[*range(end - s.q_len, end), *range(s.k_len)] for end in ends]
        real = [[0] * s.q_len + [0 if s.causal or slot < end else -1 for slot in range(s.k_len)] for end in ends]
        index = torch.stack([torch.tensor(real), torch.tensor(positions)], 1).to(torch.int32)
        return TokenLayout(s.batch, s.q_len, s.k_len, index)
    return None


def draw_routes(s: Setting, t: dict[str, Tensor], tokens: TokenLayout | None) -> Tensor:
    """What MoBA would choose, or any blocks, in any order, some twice, some that do not exist."""
    if not s.any_routes:
        options = {"block_size": s.block, "top_k": s.top_k, "causal": s.causal, "tokens": tokens}
        return ops.select_routes(t["query"].float(), t["key"].float(), **options)
    generator = torch.Generator().manual_seed(s.number)
    shape = (s.batch, s.heads, s.q_len, min(s.top_k, 6))
    return torch.randint(-1, -(-s.k_len // s.block) + 1, shape, generator=generator)


def evaluate(s: Setting, t: dict[str, Tensor], routes: Tensor, tokens: TokenLayout | None, dtype: torch.dtype):
    """Output, lse and all gradients of sum(out * grad_out) + sum(lse * grad_lse over rows that see something)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t[name].to(dtype).detach().requires_grad_() for name in ("query", "key", "value")]
    out, lse = ops.routed_block_attention(
        *leaves, routes, block_size=s.block, causal=s.causal, scale=s.scale, return_lse=True, tokens=tokens
    )
    seen = torch.where(lse.isfinite(), lse, 0)
    loss = (out.to(wide) * t["grad_out"].to(wide)).sum() + (seen * t["grad_lse"].to(wide)).sum()
    grads = torch.autograd.grad(loss, leaves)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(GRADIENTS, grads, strict=True))}


def compare(s: Setting, monkeypatch, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Assert that the Triton path errs no more than plain code of the same dtype; returns what it computed."""
    t = draw_tensors(s) if tensors is None else tensors
    tokens = draw_layout(s)
    routes = draw_routes(s, t, tokens)
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    eager = evaluate(s, t, routes, tokens, s.dtype)
    oracle = evaluate(s, t, routes, tokens, torch.float64)
    if s.dtype != torch.float32:
        # Plain code whose backward, too, starts from an output that was rounded to half precision.
        monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
        eager.update(
            {name: grad for name, grad in evaluate(s, t, routes, tokens, s.dtype).items() if name in GRADIENTS}
        )
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    got = evaluate(s, t, routes, tokens, s.dtype)
    largest_lse = oracle["lse"].nan_to_num(0, 0, 0).abs().max()
    for name in oracle:
        # In half precision weights are rounded to the inputs' type, as on tensor cores; lse is as exact as a score.
        half = name == "lse" and s.dtype != torch.float32
        floor = torch.finfo(s.dtype).eps if half else 0.0
        if name in GRADIENTS:  # the weights, exp(score - lse), inherit the rounding of lse, here in base 2 and back
            floor = 2 * torch.finfo(torch.float32).eps * float(largest_lse) * float(oracle[name].abs().max())
        slack = 2.0 if name in ("out", "lse") else 4.0
        assert_as_good_as_eager(got[name], eager[name], oracle[name], slack=slack, floor=floor, what=name)
    return got
