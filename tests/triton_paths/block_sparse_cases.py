"""Cases of the Triton block-sparse tests: random settings, their tensors, the comparison with the fp64 reference."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn.call import TokenLayout
from hf_attn.ops.hfattn_sparse.block_sparse import op
from hf_attn.ops.hfattn_sparse.block_sparse.triton_op import block_sparse_attention_triton
from tests.budget import assert_as_good_as_eager

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NEG_INF = float("-inf")


@dataclass(frozen=True)
class Setting:
    """One configuration; `str` of it is the test id. bias: its heads, 0 = none."""

    seed: int = 0
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    q_len: int = 40
    k_len: int = 40
    dim: int = 16
    value_dim: int = 16
    block_q: int = 16
    block_k: int = 16
    causal: bool = True
    pattern_heads: int = 1
    bias: int = 0
    layout: str = "full"
    dtype: str = "fp32"
    scale: float = 0.3
    strided: bool = False

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def __str__(self) -> str:
        return (
            f"{self.seed}-B{self.batch}-H{self.heads}kv{self.kv_heads}-N{self.q_len}x{self.k_len}-D{self.dim}"
            f"v{self.value_dim}-b{self.block_q}x{self.block_k}-{'causal' if self.causal else 'full'}-{self.layout}"
            f"-bias{self.bias}-{self.dtype}"
        )


def random_setting(seed: int) -> Setting:
    pick = random.Random(seed)
    layout = pick.choice(["full", "full", "full", "left", "right", "packed", "static"])
    kv_heads, group = pick.choice([1, 1, 2]), pick.choice([1, 1, 2, 3])
    k_len = pick.choice([1, 2, 7, 15, 31, 33, 40])
    q_len = k_len
    if layout in ("full", "static"):
        q_len = pick.choice([k_len, k_len, max(1, k_len // 2), 1, 3, k_len + 4])
    if layout == "static":
        q_len = min(q_len, k_len)
    dim = pick.choice([8, 16, 24, 40])
    heads = (1, kv_heads, kv_heads * group)
    return Setting(
        seed=seed,
        batch=1 if layout == "packed" else pick.choice([1, 1, 2]),
        kv_heads=kv_heads,
        group=group,
        q_len=q_len,
        k_len=k_len,
        dim=dim,
        value_dim=pick.choice([dim, dim, 8, 32]),
        block_q=pick.choice([7, 16, 20, 32, 128]),
        block_k=pick.choice([3, 16, 20, 32, 128]),
        causal=layout == "static" or pick.random() < 0.7,
        pattern_heads=pick.choice(heads),
        bias=pick.choice([0, 0, 0, *heads]),
        layout=layout,
        dtype=pick.choice(["fp32", "fp32", "fp16", "bf16"]),
        scale=pick.choice([0.3, 1.0, -0.2]),
        strided=pick.random() < 0.4,
    )


def draw(s: Setting) -> dict[str, Tensor | None]:
    """Inputs, a pattern with holes, repeats and empty rows, and gradients of both results."""
    g = torch.Generator().manual_seed(s.seed)

    def normal(heads: int, length: int, dim: int) -> Tensor:
        if s.strided:  # tokens before heads, cut out of a longer buffer
            return (
                torch.randn(s.batch, length + 3, heads, dim, generator=g).to(DTYPES[s.dtype])[:, 2:-1].transpose(1, 2)
            )
        return torch.randn(s.batch, heads, length, dim, generator=g).to(DTYPES[s.dtype])

    rows, columns = -(-s.q_len // s.block_q), -(-s.k_len // s.block_k)
    index, sequences = layout_index(s)
    number = random.Random(s.seed).choice([1, sequences])
    shape = (number, s.pattern_heads, rows, min(columns, 6) + 2)
    indices = torch.randint(-max(1, columns // 2), columns, shape, generator=g).clamp(min=-1).int()
    indices[torch.rand(shape[:3], generator=g) < 0.1] = -1
    bias = None
    if s.bias:
        bias = torch.randn(random.Random(s.seed).choice([1, s.batch]), s.bias, s.k_len, generator=g)
        bias[torch.rand(bias.shape, generator=g) < 0.2] = NEG_INF
    return {
        "query": normal(s.heads, s.q_len, s.dim),
        "key": normal(s.kv_heads, s.k_len, s.dim),
        "value": normal(s.kv_heads, s.k_len, s.value_dim),
        "indices": indices,
        "index": index,
        "bias": bias,
        "grad_out": normal(s.heads, s.q_len, s.value_dim),
        "grad_lse": torch.randn(s.batch, s.heads, s.q_len, generator=g),
    }


def layout_index(s: Setting) -> tuple[Tensor | None, int]:
    """Token index of the setting, and how many rows a pattern may have."""
    pick = random.Random(s.seed)
    if s.layout in ("left", "right"):
        lengths = torch.tensor([pick.randint(1, s.k_len) for _ in range(s.batch)])
        start = s.k_len - lengths if s.layout == "left" else 0
        return TokenLayout.padded(start, lengths, s.q_len, s.k_len).index, s.batch
    if s.layout == "packed":
        cuts = sorted(pick.sample(range(1, s.k_len), min(3, s.k_len - 1)))
        cu = torch.tensor([0, *cuts, s.k_len])
        return TokenLayout.packed(cu, cu, s.q_len, s.k_len).index, len(cu) - 1
    if s.layout == "static":  # slots after the newest query are not filled
        newest = pick.randint(s.q_len, s.k_len)
        position = torch.cat([torch.arange(newest - s.q_len, newest), torch.arange(s.k_len)])
        return torch.stack([torch.zeros_like(position), position]).int().expand(s.batch, 2, -1).contiguous(), s.batch
    return None, s.batch


def evaluate(attention, s: Setting, x: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and all gradients of sum(out * grad_out) + sum(lse * grad_lse over rows that see something)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x[name].to(dtype).detach().requires_grad_() for name in ("query", "key", "value")]
    bias = None if x["bias"] is None else x["bias"].to(wide).detach().requires_grad_()
    out, lse = attention(*leaves, x["indices"], x["index"], bias, s.block_q, s.block_k, s.causal, s.scale)
    loss = (out.to(wide) * x["grad_out"].to(wide)).sum()
    loss = loss + (torch.where(lse.isfinite(), lse, 0) * x["grad_lse"].to(wide)).sum()
    grads = torch.autograd.grad(loss, leaves + ([] if bias is None else [bias]))
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=False))


def through_delta(s: Setting, x: dict[str, Tensor | None], got: Tensor) -> dict[str, float]:
    """How much the error of `got`, an `out` in half precision, changes dq, dk and dbias through delta = sum(do * out).

    An error e of delta changes ds by p e, and p is the derivative of lse by the scores.
    """
    leaves = [x[name].double().detach().requires_grad_() for name in ("query", "key")]
    bias = None if x["bias"] is None else x["bias"].double().detach().requires_grad_()
    options = (s.block_q, s.block_k, s.causal, s.scale)
    out, lse = op.run_reference(*leaves, x["value"].double(), x["indices"], x["index"], bias, *options)
    error = ((got.double() - out.detach()) * x["grad_out"]).sum(-1)
    leaves += [] if bias is None else [bias]
    grads = torch.autograd.grad((torch.where(lse.isfinite(), lse, 0) * error).sum(), leaves)
    return {name: float(g.abs().max()) for name, g in zip(("dq", "dk", "dbias"), grads, strict=False)}


def assert_matches(s: Setting, x: dict[str, Tensor | None] | None = None) -> dict[str, Tensor]:
    x = draw(s) if x is None else x
    got = evaluate(block_sparse_attention_triton, s, x, DTYPES[s.dtype])
    eager = evaluate(op.run_reference, s, x, DTYPES[s.dtype])
    oracle = evaluate(op.run_reference, s, x, torch.float64)
    inherited = through_delta(s, x, got["out"])
    for name, exact in oracle.items():
        # lse leaves the kernel in fp32, from scores of the inputs as they are; gradients recompute p from it.
        slack = 2.0 if name == "out" else 4.0
        floor = 1e-6 + inherited.get(name, 0.0)
        assert_as_good_as_eager(got[name], eager[name], exact, slack=slack, floor=floor, what=name)
    return got
