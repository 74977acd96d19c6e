"""Speed of the window operations of EMOv2 and OverLoCK on the CPU, forward and with gradients.

    python -m hf_attn.bench.vision_windows_speed                   # both, one thread
    python -m hf_attn.bench.vision_windows_speed spanned
    python -m hf_attn.bench.vision_windows_speed mixing --clock thread

`spanned`: hybrid window attention against dense attention over the whole map, the same queries, keys and values.
`mixing`: OverLoCK's predicted window weights applied in tiles, against windows unfolded and replicated into the border,
the way of the authors' code where natten is missing. A case whose results differ shows no speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention, unfold

from hf_attn import ops
from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import interleaved, machine_load, paired_ratio
from hf_attn.models.overlock.mixing import mix_windows

FIGURES = ("forward", "forward and backward")
# Map, channels, value channels, heads, window: stage 3 of EMOv2-5M at 224, 256 and 512 pixels.
SPANNED = ((14, 160, 640, 5, 7), (16, 160, 640, 5, 8), (32, 160, 640, 5, 8))
# Height, width, kernel, heads, channels of a head.
MIXING = ((14, 14, 13, 8, 16), (7, 7, 7, 16, 16), (28, 28, 13, 4, 16), (28, 28, 13, 8, 8), (32, 48, 13, 8, 16))


def replicated(weights: Tensor, values: Tensor, kernel: int) -> Tensor:
    """Windows of the inner queries unfolded, those of the border copied from the nearest: `mix_windows` by copies."""
    batch, heads, height, width, _ = weights.shape
    flat = values.permute(0, 1, 4, 2, 3).flatten(1, 2)
    windows = unfold(flat, kernel).view(batch, -1, height - kernel + 1, width - kernel + 1)
    windows = pad(windows, (kernel // 2,) * 4, mode="replicate")
    windows = windows.view(batch, heads, -1, kernel * kernel, height, width)
    return torch.einsum("bghwk,bgckhw->bghwc", weights, windows)


def row(
    name: str,
    found: Callable[..., Tensor],
    baseline: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    same: bool,
    repeats: int,
) -> Row:
    """One case; `same` says whether both compute one function."""
    if same and not torch.allclose(found(*tensors), baseline(*tensors), rtol=1e-4, atol=1e-5):
        return Row(name, f"{name:34}check FAILED: no speed shown", problem="check failed")
    leaves = tuple(x.clone().requires_grad_() for x in tensors)

    def backward(function: Callable[..., Tensor]) -> None:
        torch.autograd.grad(function(*leaves).sum(), leaves)

    with torch.no_grad():
        forward = interleaved(
            {"ours": lambda: found(*tensors), "baseline": lambda: baseline(*tensors)}, repeats=repeats, warmup=2
        )
    both = interleaved({"ours": lambda: backward(found), "baseline": lambda: backward(baseline)}, repeats=repeats)
    ratios = [paired_ratio(t["baseline"], t["ours"]) for t in (forward, both)]
    cells = "".join(
        f"{t['baseline'].median * 1e3:10.2f}{t['ours'].median * 1e3:10.2f}{ratio:7.1f}x"
        for t, ratio in zip((forward, both), ratios, strict=True)
    )
    line = f"{name:34}{cells}{forward['ours'].spread:8.0%}"
    return Row(name, line, dict(zip(FIGURES, ratios, strict=True)), forward["baseline"].spread)


def spanned(repeats: int) -> Iterator[Row]:
    for side, width, middle, heads, window in SPANNED:
        tensors = tuple(torch.randn(1, channels, side, side) for channels in (width, width, middle))

        def dense(query: Tensor, key: Tensor, value: Tensor, heads: int = heads) -> Tensor:
            split = [x.flatten(2).unflatten(1, (heads, -1)).mT for x in (query, key, value)]
            return scaled_dot_product_attention(*split).mT.reshape(value.shape)

        def ours(*states: Tensor, window: int = window, heads: int = heads) -> Tensor:
            return ops.spanned_window_attention(*states, window, num_heads=heads)

        yield row(f"spanned {side}x{side} window {window} dim {width}", ours, dense, tensors, False, repeats)


def mixing(repeats: int) -> Iterator[Row]:
    for height, width, kernel, heads, dim in MIXING:
        weights = torch.randn(1, heads, height, width, kernel**2).softmax(-1)
        tensors = (weights, torch.randn(1, heads, height, width, dim))
        name = f"mixing {height}x{width} K {kernel} {heads} x {dim}"
        yield row(
            name,
            lambda w, v, kernel=kernel: mix_windows(w, v, kernel),
            lambda w, v, kernel=kernel: replicated(w, v, kernel),
            tensors,
            True,
            repeats,
        )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("spanned", "mixing"), help="default: both")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall", help="thread: for busy machines")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.clock == "thread":
        if args.threads != 1:
            parser.error("--clock thread counts one thread; use --threads 1")
        time.perf_counter = time.thread_time
    print(f"fp32, {args.threads} thread(s), {args.clock} time in ms; torch {torch.__version__}, {machine_load()}")
    print(f"{'case':34}{'baseline':>10}{'ours':>10}{'fwd':>8}{'baseline':>10}{'ours':>10}{'fwd+bwd':>8}{'spread':>8}")
    parts = {"spanned": spanned, "mixing": mixing}
    chosen = [args.what] if args.what else list(parts)
    return [show(row) for name in chosen for row in parts[name](args.repeats)]


if __name__ == "__main__":
    main()
