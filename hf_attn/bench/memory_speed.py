"""Neural memory in chunks against token by token, and over the length: `python -m hf_attn.bench.memory_speed`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_attn import ops
from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import backend, interleaved, paired_ratio

FIGURES = ("speed-up", "growth")


def inputs(length: int, heads: int, dim: int, inner: int, depth: int) -> tuple[list[Tensor], list[Tensor]]:
    """Random tokens with unit keys, gates in the range of a trained layer, and weights."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(1, heads, length, dim, generator=generator) for _ in range(3)]
    tokens[:2] = (normalize(t, dim=-1) for t in tokens[:2])
    gates = [scale * torch.rand(1, heads, length, generator=generator) for scale in (0.1, 1.0, 0.1)]
    sizes = [dim, *[inner] * (depth - 1), dim]
    weights = [torch.randn(heads, a, b, generator=generator) / a**0.5 for a, b in zip(sizes, sizes[1:], strict=False)]
    return [*tokens, *gates], weights


def runner(name: str, tokens: list[Tensor], weights: list[Tensor], chunk: int) -> Callable[[], Tensor]:
    """A forward on one path."""

    def run() -> Tensor:
        with backend(name), torch.no_grad():
            return ops.neural_memory(*tokens, weights, chunk_size=chunk)

    return run


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--inner", type=int, default=256)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    sizes = (arguments.heads, arguments.dim, arguments.inner, arguments.depth)
    short, long = (inputs(n, *sizes) for n in (arguments.length, 4 * arguments.length))
    runs = {
        "token by token": runner("reference", *short, arguments.chunk),
        "chunks": runner("torch", *short, arguments.chunk),
        "chunks, 4x the tokens": runner("torch", *long, arguments.chunk),
    }
    difference = (runs["token by token"]() - runs["chunks"]()).abs().max().item()
    if difference > 1e-4:
        raise SystemExit(f"the two paths differ by {difference:.1e}; no speed-up is reported")
    leaves = [t.clone().requires_grad_() for t in (*short[0], *short[1])]

    def training() -> object:
        with backend("torch"):
            out = ops.neural_memory(*leaves[:6], leaves[6:], chunk_size=arguments.chunk)
        return torch.autograd.grad(out.sum(), leaves)

    times = interleaved(runs | {"chunks, forward and backward": training}, repeats=arguments.repeats)
    print("| path | ms |\n|---|---|")
    for name, timing in times.items():
        print(f"| {name} | {1e3 * timing.median:.1f} |")
    slow, fast, longer = (times[name] for name in runs)
    faster, growth = paired_ratio(slow, fast), paired_ratio(longer, fast)
    lengths = f"time({4 * arguments.length}) / time({arguments.length})"
    line = f"\nchunks {faster:.1f}x faster; {lengths} = {growth:.2f}"
    return [show(Row("chunks", line, {"speed-up": faster, "growth": growth}, slow.spread))]


if __name__ == "__main__":
    main()
