"""Speed of PAROAttention on the CPU against dense attention of the same run (paroattention.md 8.7), and in a Wan block.

    python -m hf_attn.bench.paro_speed attention --density 0.5 0.25
    python -m hf_attn.bench.paro_speed quantized --density 0.25
    python -m hf_attn.bench.paro_speed model --heads 4 --dim 128 --ffn 3072 --density 0.2 0.125

Reordering and the way back are counted everywhere. Each result is first checked against a dense mask in fp64 on sampled
rows; a case that fails shows no speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hf_attn
from hf_attn import ops
from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import interleaved, machine_load, paired_ratio
from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.grid import TokenGrid
from hf_attn.mechanisms.paroattention import MECHANISM, LayerShape, ParoAttentionConfig, PlanTables, pack_bits
from hf_attn.ops.hfattn_sparse.quantized.codes import quantize_groups

FIGURES = ("speed-up", "limit", "reorder", "over fp32", "over bf16", "of bound")
GRIDS = {4096: (8, 16, 32), 8192: (16, 16, 32)}


def random_plan(grid: TokenGrid, layers: int, heads: int, block: int, density: float) -> PlanTables:
    """Random masks of exactly this share of blocks, the last row and column among them, and all axis orders."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-grid.length // block)
    rank = torch.rand(layers, heads, blocks, blocks, generator=generator)
    rank[..., -1] = rank[:, :, -1] = 2
    count = max(round(density * blocks**2), 2 * blocks - 1)
    best = rank.flatten(2).topk(count).indices
    mask = torch.zeros(layers, heads, blocks**2, dtype=torch.bool).scatter_(2, best, True)
    order = (torch.arange(layers * heads) % 5 + 1).view(layers, heads).to(torch.uint8)
    shape = LayerShape(*grid.shape, 0, 0, heads)
    packed = pack_bits(mask.view(layers, heads, blocks, blocks))[None]
    return PlanTables(order, packed, block, (shape,) * layers, (), (0,), density)


def call_of(args: argparse.Namespace, dtype: torch.dtype) -> AttentionCall:
    """Random tensors in the layout in which Wan hands them over, [B, S, H, D] behind the view."""
    generator = torch.Generator().manual_seed(0)
    grid = TokenGrid(*GRIDS[args.length])
    shape = (1, args.length, args.heads, args.dim)
    tensors = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]
    tokens = TokenLayout(1, args.length, args.length, grid=grid)
    return AttentionCall(*tensors, args.dim**-0.5, False, tokens, LayerContext(index=0, number=0))


def check(call: AttentionCall, config: ParoAttentionConfig, limit: float) -> bool:
    """32 rows against attention under the token mask in fp64."""
    rows = torch.linspace(0, call.q_len - 1, 32).long()
    mask = MECHANISM.attended(call, config, rows)
    wide = [x.double() for x in (call.query[:, :, rows], call.key, call.value)]
    exact = scaled_dot_product_attention(*wide, attn_mask=mask, scale=call.scale)
    return float((MECHANISM(call, config)[:, :, rows].double() - exact).abs().max()) <= limit


def attention(args: argparse.Namespace) -> Iterator[Row]:
    """The mechanism alone; "reorder" is three permutations and the inverse one."""
    call = call_of(args, torch.float32)
    print(f"{'density':>8}{'dense':>10}{'paro':>10}{'reorder':>10}{'of dense':>10}{'speed-up':>10}{'limit':>10}")
    for density in args.density:
        plan = random_plan(call.tokens.grid, 1, args.heads, args.block, density)
        config = ParoAttentionConfig(plan=plan, min_tokens=0, dense_steps=0)
        if not check(call, config, 1e-5):
            line = f"{density:8}   check FAILED: no speed shown"
            yield Row(f"attention {density}", line, problem="check failed")
            continue
        entry = plan.entry(0, 0, call.tokens.grid, args.heads, 0, torch.device("cpu"))
        tensors = (call.query, call.key, call.value)
        reorder = partial(_reorder_and_back, entry, tensors)
        dense = partial(scaled_dot_product_attention, *tensors)
        functions = {"dense": dense, "paro": partial(MECHANISM, call, config), "reorder": reorder}
        times = interleaved(functions, repeats=args.repeats)
        ratio = paired_ratio(times["dense"], times["paro"])
        row = [times[name].median * 1e3 for name in functions]
        share, realised = row[2] / row[0], entry.computed / entry.visible
        line = (
            f"{realised:8.3f}"
            + "".join(f"{x:10.1f}" for x in row)
            + f"{share:10.1%}{ratio:10.2f}{ratio * realised:10.1%}"
        )
        figures = {"speed-up": ratio, "limit": ratio * realised, "reorder": share}
        yield Row(f"attention {density}", line, figures, times["dense"].spread)


def _reorder_and_back(entry: Any, tensors: tuple[Tensor, ...]) -> Tensor:
    return entry.order.undo([entry.order.apply(x) for x in tensors][0])


def quantized(args: argparse.Namespace) -> Iterator[Row]:
    """INT8 q k^T at the same mask; "codes" is the quantisation alone. Ratios to our own sparse fp32 and bf16 paths."""
    call = call_of(args, torch.float32)
    names = ("fp32", "bf16", "int8", "int8/bf16", "codes")
    print(f"{'density':>8}" + "".join(f"{name:>11}" for name in names) + f"{'vs fp32':>11}{'vs bf16':>11}")
    for density in args.density:
        plan = random_plan(call.tokens.grid, 1, args.heads, args.block, density)
        entry = plan.entry(0, 0, call.tokens.grid, args.heads, 0, torch.device("cpu"))
        moved = [entry.order.apply(x) for x in (call.query, call.key, call.value)]
        half = [x.bfloat16() for x in moved]
        exact = ops.block_sparse_attention(*moved, entry.pattern)
        error = (ops.quantized_block_attention(*moved, entry.pattern) - exact).norm() / exact.norm()
        if error > 0.02:
            line = f"{density:8}   check FAILED (relative error {error:.3f}): no speed shown"
            yield Row(f"quantized {density}", line, problem=f"check failed: relative error {error:.3f}")
            continue
        functions = {
            "fp32": partial(ops.block_sparse_attention, *moved, entry.pattern),
            "bf16": partial(ops.block_sparse_attention, *half, entry.pattern),
            "int8": partial(ops.quantized_block_attention, *moved, entry.pattern),
            "int8/bf16": partial(ops.quantized_block_attention, *half, entry.pattern),
            "codes": lambda moved=moved: (quantize_groups(moved[0], 8, 32), quantize_groups(moved[1], 8, 64)),
        }
        times = interleaved(functions, repeats=args.repeats)
        ratios = [paired_ratio(times["fp32"], times["int8"]), paired_ratio(times["bf16"], times["int8/bf16"])]
        realised = entry.computed / entry.visible
        row = "".join(f"{times[name].median * 1e3:11.1f}" for name in names)
        line = f"{realised:8.3f}{row}" + "".join(f"{ratio:11.2f}" for ratio in ratios) + f"   error {error:.4f}"
        spread = max(times[name].spread for name in ("fp32", "bf16"))
        yield Row(f"quantized {density}", line, dict(zip(("over fp32", "over bf16"), ratios, strict=True)), spread)


def model(args: argparse.Namespace) -> Iterator[Row]:
    """A whole transformer call. share: of the stock call that is self-attention, measured in the same rounds."""
    from hf_attn.bench.video_speed import inputs, random_wan  # imports diffusers, which the other tasks do not need

    sizes = (args.heads, args.dim, args.ffn, 2)
    stock, tensors = random_wan(*sizes), inputs(GRIDS[args.length])
    grid = TokenGrid(*GRIDS[args.length])
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    fast = {}
    for density in args.density:
        twin = random_wan(*sizes)
        plan = random_plan(grid, 2, args.heads, args.block, density)
        hf_attn.apply(twin, "paroattention", plan=plan, min_tokens=0, dense_steps=0, strict=True)
        fast[density] = twin
    with hf_attn.mechanism.observe(lambda m, call, config: calls.append((call.query, call.key, call.value))):
        next(iter(fast.values()))(*tensors)
    functions: dict[str, Any] = {"stock": partial(stock, *tensors)}
    functions["attention"] = lambda: [scaled_dot_product_attention(*call) for call in calls[:2]]
    functions |= {str(density): partial(twin, *tensors) for density, twin in fast.items()}
    times = interleaved(functions, repeats=args.repeats)
    share = 1 / paired_ratio(times["stock"], times["attention"])
    print(f"stock {times['stock'].median * 1e3:.0f} ms, attention {share:.1%} of it")
    print(f"{'density':>8}{'ms':>9}{'speed-up':>10}{'bound':>8}{'of bound':>10}")
    for density, twin in fast.items():
        realised = hf_attn.stats(twin)["totals"]["density"]
        ratio, bound = paired_ratio(times["stock"], times[str(density)]), 1 / (1 - share + share * realised)
        milliseconds = times[str(density)].median * 1e3
        line = f"{realised:8.3f}{milliseconds:9.0f}{ratio:10.2f}{bound:8.2f}{ratio / bound:10.1%}"
        figures = {"speed-up": ratio, "of bound": ratio / bound}
        yield Row(f"model {density}", line, figures, times["stock"].spread)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("attention", "quantized", "model"))
    parser.add_argument("--density", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--length", type=int, choices=GRIDS, default=8192)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ffn", type=int, default=3072)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"{args.heads} heads x {args.dim}, {args.length} tokens, blocks of {args.block}, times in ms")
    print(f"torch {torch.__version__}, {args.threads} thread(s), {machine_load()}; limit = speed-up x density")
    run = {"attention": attention, "quantized": quantized, "model": model}[args.what]
    return [show(row) for row in run(args)]


if __name__ == "__main__":
    main()
