"""Speed of block-sparse attention on the CPU against dense causal attention of the same run.

    python -m hf_attn.bench.block_sparse_speed --dtype fp32 bf16 --threads 1 --length 8192 --backward

Every pattern is checked against a dense masked softmax on a sample of rows first; a case that fails shows no speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import Timing, interleaved, machine_load, paired_ratio
from hf_attn.ops.hfattn_sparse.block_sparse import torch_path

FIGURES = ("speed-up", "limit")
Q_HEADS, KV_HEADS, DIM, BLOCK = 8, 4, 64, 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A pattern and how it is described in the table."""

    name: str
    indices: Tensor  # int [1, heads, blocks, M], -1 padded


def pattern_of_pairs(heads: int, blocks: int, share: float, generator: torch.Generator) -> Tensor:
    """A share of all causal (query block, key block) pairs at random, every diagonal block among them."""
    wanted = round(share * blocks * (blocks + 1) / 2) - blocks
    rows, columns = torch.tril_indices(blocks, blocks, -1)
    chosen = torch.eye(blocks, dtype=torch.bool).repeat(heads, 1, 1)
    for head in range(heads):
        picked = torch.randperm(len(rows), generator=generator)[: max(0, wanted)]
        chosen[head, rows[picked], columns[picked]] = True
    return to_indices(chosen)


def pattern_of_rows(heads: int, blocks: int, share: float, generator: torch.Generator) -> Tensor:
    """In every row a share of all key blocks, its own among them, as far as causality allows."""
    per_row = max(1, round(share * blocks))
    scores = torch.rand(heads, blocks, blocks, generator=generator)
    scores += 2 * torch.eye(blocks)
    scores.masked_fill_(~torch.ones(blocks, blocks, dtype=torch.bool).tril(), -1)
    chosen = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    chosen.scatter_(2, scores.topk(per_row, -1).indices, True)
    return to_indices(chosen.tril())


def to_indices(chosen: Tensor) -> Tensor:
    """bool [heads, blocks, blocks] -> int32 [1, heads, blocks, M], ascending, -1 padded."""
    width = int(chosen.sum(-1).max())
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)[..., :width]
    return torch.where(chosen.gather(-1, order), order, -1).int()[None]


def density(indices: Tensor, length: int) -> float:
    """Computed and causally visible (query, key) pairs over all causal pairs."""
    starts = torch.arange(0, length, BLOCK)
    sizes = (length - starts).clamp(max=BLOCK)
    own = torch.arange(len(starts))[:, None]
    inside = torch.where(indices == own, (sizes * (sizes + 1) // 2)[:, None], BLOCK * sizes[:, None])
    pairs = torch.where(indices >= 0, inside, 0).sum().item() / indices.shape[1]
    return pairs / (length * (length + 1) / 2)


def cases(length: int, generator: torch.Generator) -> list[Case]:
    blocks = -(-length // BLOCK)
    full = to_indices(torch.ones(1, blocks, blocks, dtype=torch.bool).tril())
    return [
        Case("1/8 of the causal pairs, per head", pattern_of_pairs(Q_HEADS, blocks, 0.125, generator)),
        Case("1/8 of the causal pairs, per kv head", pattern_of_pairs(KV_HEADS, blocks, 0.125, generator)),
        Case("1/8 of the causal pairs, shared", pattern_of_pairs(1, blocks, 0.125, generator)),
        Case("1/8 of the blocks a row, per head", pattern_of_rows(Q_HEADS, blocks, 0.125, generator)),
        Case("1/8 of the blocks a row, shared", pattern_of_rows(1, blocks, 0.125, generator)),
        Case("all causal blocks", full),
    ]


def check(case: Case, inputs: list[Tensor], grad: Tensor, options: dict) -> bool:
    """Sampled rows of the result, and all gradients of these rows, against dense attention in fp64.

    Allowed is twice what dense attention in the same dtype errs, plus the resolution of the dtype.
    """
    length = inputs[0].shape[2]
    rows = torch.randint(length, (64,), generator=torch.Generator().manual_seed(1)).unique()
    blocks = (case.indices[:, :, rows // BLOCK, :, None] == torch.arange(-(-length // BLOCK))).any(-2)
    mask = blocks.repeat_interleave(BLOCK, -1)[..., :length] & (torch.arange(length) <= rows[:, None])
    mask = mask.repeat_interleave(Q_HEADS // mask.shape[1], 1)

    # Only the sampled rows send a gradient back, so the keys' gradients are those of these rows too.
    sampled = torch.zeros_like(grad).index_copy_(2, rows, grad[:, :, rows])
    out, lse = torch_path.forward(*inputs, case.indices, **options)
    grads = torch_path.backward(sampled, None, *inputs, case.indices, out, lse, **options)
    got = [out[:, :, rows], grads[0][:, :, rows], *grads[1:3]]
    eager, exact = (dense_rows(inputs, rows, grad, mask, dtype) for dtype in (grad.dtype, torch.float64))
    return all(
        bool((g.double() - x).abs().max() <= 2 * ((e - x).abs().max() + torch.finfo(g.dtype).eps * x.abs().max()))
        for g, e, x in zip(got, eager, exact, strict=True)
    )


def dense_rows(inputs: list[Tensor], rows: Tensor, grad: Tensor, mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Result and gradients of a few query rows by dense attention in `dtype`, as fp64."""
    query, key, value = (x.to(dtype).detach() for x in inputs)
    leaves = [x.requires_grad_() for x in (query[:, :, rows].contiguous(), key, value)]
    wide = [x.repeat_interleave(Q_HEADS // x.shape[1], 1) for x in leaves]
    out = F.scaled_dot_product_attention(*wide, attn_mask=mask)
    grads = torch.autograd.grad(out, leaves, grad[:, :, rows].to(dtype))
    return [x.detach().double() for x in (out, *grads)]


def dense_functions(inputs: list[Tensor], grad: Tensor, backward: bool) -> dict:
    """Dense causal attention with grouped heads and with expanded ones; the faster of the two is the yardstick."""
    query, key, value = inputs
    wide = [query, *(x.repeat_interleave(Q_HEADS // KV_HEADS, 1) for x in (key, value))]

    def run(tensors: list[Tensor], **options):
        if not backward:
            return F.scaled_dot_product_attention(*tensors, is_causal=True, **options)
        leaves = [x.detach().requires_grad_() for x in tensors]
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=True, **options), leaves, grad)

    return {"grouped": lambda: run(inputs, enable_gqa=True), "expanded": lambda: run(wide)}


def measure(dtype: str, length: int, backward: bool, repeats: int, start: str = "") -> Iterator[Row]:
    """A row for every pattern."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, length, DIM) for heads in (Q_HEADS, KV_HEADS, KV_HEADS, Q_HEADS)]
    *inputs, grad = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in shapes)
    options = {"block_q": BLOCK, "block_k": BLOCK, "causal": True, "scale": DIM**-0.5}

    def run(indices: Tensor):
        out, lse = torch_path.forward(*inputs, indices, **options)
        if backward:
            torch_path.backward(grad, None, *inputs, indices, out, lse, **options)

    for case in (c for c in cases(length, generator) if c.name.startswith(start)):
        share = density(case.indices, length)
        if not check(case, inputs, grad, options):
            line = f"{dtype:5} {case.name:36}{share:10.3f}   check FAILED: no speed shown"
            yield Row(f"{dtype} {case.name}", line, problem="check failed")
            continue
        functions = dense_functions(inputs, grad, backward) | {"sparse": lambda case=case: run(case.indices)}
        times = interleaved(functions, repeats=repeats)
        dense = min((times["grouped"], times["expanded"]), key=lambda timing: timing.median)
        yield row_of(dtype, case, share, times["sparse"], dense)


def row_of(dtype: str, case: Case, share: float, sparse: Timing, dense: Timing) -> Row:
    ratio = paired_ratio(dense, sparse)
    line = (
        f"{dtype:5} {case.name:36}{share:10.3f}{dense.median * 1e3:10.1f}{sparse.median * 1e3:10.1f}"
        f"{sparse.spread:10.0%}{ratio:10.2f}{ratio * share:10.1%}"
    )
    return Row(f"{dtype} {case.name}", line, {"speed-up": ratio, "limit": ratio * share}, dense.spread)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pattern", default="", help="only patterns whose name begins so")
    parser.add_argument("--backward", action="store_true", help="time forward + backward instead of forward")
    args = parser.parse_args(argv)
    if args.length < BLOCK or args.repeats < 1 or args.threads < 1:
        parser.error(f"needs --length >= {BLOCK}, --repeats >= 1 and --threads >= 1")
    torch.set_num_threads(args.threads)
    what = "forward + backward" if args.backward else "forward"
    print(
        f"{what}, B=1 Hq={Q_HEADS} Hkv={KV_HEADS} N={args.length} D={DIM}, blocks of {BLOCK}, causal, {machine_load()}"
    )
    print(f"torch {torch.__version__}, {args.threads} thread(s); limit = speed-up x density; times in ms")
    names = "".join(f"{name:>10}" for name in ("density", "dense", "sparse", "spread", "speed-up", "limit"))
    print(f"{'dtype':5} {'pattern':36}{names}")
    sizes = (args.length, args.backward, args.repeats, args.pattern)
    return [show(row) for dtype in args.dtype for row in measure(dtype, *sizes)]


if __name__ == "__main__":
    main()
