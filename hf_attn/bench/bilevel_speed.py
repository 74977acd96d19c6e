"""Bi-level routing attention on the CPU against dense attention of the same map, and what copying keys costs.

    python -m hf_attn.bench.bilevel_speed                 # 56 x 56, 64 channels, 7^2 regions, 4 read (biformer.md 8.8)
    python -m hf_attn.bench.bilevel_speed --side 14 --channels 256 --heads 8 --top-k 16

`copy` lays the chosen keys side by side, `mask` computes all pairs, `blocks` reads the keys in place. Routing is
counted. Each is first checked against dense attention with everything outside the chosen regions masked. Memory is the
largest sum of what a call holds at one time, inputs not counted. `--clock thread` counts the time of this thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn import ops
from hf_attn.bench.figures import Row, show
from hf_attn.bench.routed_speed import peak_bytes
from hf_attn.bench.timing import interleaved, machine_load, paired_ratio
from hf_attn.ops.bilevel import METHODS, region_mask

FIGURES = METHODS[1:]


def dense(query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention of all positions, `[B, H, W, heads, D]` in and out."""
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)]
    return scaled_dot_product_attention(*flat, mask, scale=scale).transpose(1, 2).reshape(value.shape)


def with_backward(run: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Forward and backward of a function."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    run(*leaves).sum().backward()


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=56)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--regions", type=int, default=7, help="a side")
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.clock == "thread":
        time.perf_counter = time.thread_time
    torch.manual_seed(0)
    shape = (args.batch, args.side, args.side, args.heads, args.channels // args.heads)
    inputs, region, scale = [torch.randn(shape) for _ in range(3)], args.side // args.regions, args.channels**-0.5
    options = {"region_size": (region, region), "top_k": args.top_k}
    routed = {name: partial(ops.bilevel_routing_attention, method=name, **options) for name in METHODS[1:]}
    mask = region_mask(ops.select_regions(*inputs[:2], **options), shape[1:3], (region, region))[:, None]
    expected = dense(*inputs, scale=scale, mask=mask)
    for name, run in routed.items():
        worst = float((run(*inputs) - expected).abs().max() / expected.abs().max())
        if not worst <= 1e-5:
            raise SystemExit(f"{name} differs by {worst:.1e}: no speed shown")
    share = args.top_k / args.regions**2
    print(f"{args.side} x {args.side}, {args.channels} channels, {args.heads} heads, {args.regions}^2 regions")
    print(f"torch {torch.__version__}, one thread, {args.clock} time, {machine_load()}; {share:.1%} of the pairs read")
    print(f"{'':18}{'dense ms':>10}" + "".join(f"{name + ' ms':>10}{'speed-up':>10}" for name in routed))
    runs = {"dense": partial(dense, scale=scale), **routed}
    rows = []
    for title, calls in (
        ("forward", {name: partial(run, *inputs) for name, run in runs.items()}),
        ("forward+backward", {name: partial(with_backward, run, inputs) for name, run in runs.items()}),
    ):
        times = interleaved(calls, repeats=args.repeats)
        ratios = {name: paired_ratio(times["dense"], times[name]) for name in routed}
        cells = "".join(f"{times[name].median * 1e3:10.2f}{ratios[name]:9.2f}x" for name in routed)
        line = f"{title:18}{times['dense'].median * 1e3:10.2f}{cells}"
        rows.append(show(Row(title, line, ratios, times["dense"].spread)))
    routes = ops.select_regions(*inputs[:2], **options)
    peaks = {name: peak_bytes(partial(run, *inputs, routes=routes)) for name, run in routed.items()}
    sizes = ", ".join(f"{name} {peak / 2**20:.2f} MiB ({peak / peaks['copy']:.0%})" for name, peak in peaks.items())
    print(f"held by the token stage: {sizes}")
    return rows


if __name__ == "__main__":
    main()
