"""The scan of an image's four paths against transformers' Mamba: `python -m hf_attn.bench.selective_scan_speed`.

Without a compiled kernel transformers scans one path after the other, token by token. The last line is the time of a
whole LaMamba-Diff forward at side 64 over side 32; 4 is linear.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import Timing
from hf_attn.ops import selective_scan

FIGURES = ("speed-up", "growth")
PATHS = 4  # orders in which LaMamba-Diff reads an image


def operands(batch: int, length: int, channels: int, size: int) -> list[Tensor]:
    """u, delta, A, B, C of four paths, with decays from nearly 1 to nearly 0."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    A = -(torch.arange(1, size + 1).expand(PATHS, channels, size) * 1.0)
    u, delta = rand(batch, PATHS, length, channels) - 0.5, 0.1 * rand(batch, PATHS, length, channels) + 1e-3
    B, C = (rand(batch, PATHS, length, size) - 0.5 for _ in range(2))
    return [u, delta, A, B, C]


def by_transformers(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The same by the fallback of transformers' Mamba, one call a path."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return torch.stack(
        [
            mamba_selective_scan(u[:, k].mT, delta[:, k].mT, A[k], B[:, k].mT, C[:, k].mT).mT
            for k in range(u.shape[1])
        ],
        1,
    )  # fmt: skip


def measure(batch: int, length: int, channels: int, size: int, repeats: int) -> dict[str, float]:
    """Milliseconds (medians), the median ratio of interleaved rounds, and the largest difference."""
    tensors = operands(batch, length, channels, size)
    leaves = [t.clone().requires_grad_() for t in tensors]
    grad = torch.ones_like(tensors[0])
    rounds = []
    for _ in range(repeats + 1):
        with torch.no_grad():
            row = [_seconds(lambda: by_transformers(*tensors)), _seconds(lambda: selective_scan(*tensors))]
        rounds.append([*row, _seconds(lambda: torch.autograd.grad(selective_scan(*leaves), leaves, grad))])
    with torch.no_grad():
        difference = (by_transformers(*tensors) - selective_scan(*tensors)).abs().max()
    rounds = rounds[1:]  # the first one warms up
    names = ("transformers", "ours", "with_backward")
    spread = Timing(tuple(r[0] for r in rounds)).spread
    result = {n: 1e3 * statistics.median(x) for n, x in zip(names, zip(*rounds, strict=True), strict=True)}
    ratio = statistics.median(r[0] / r[1] for r in rounds)
    return result | {"ratio": ratio, "difference": float(difference), "spread": spread}


def growth(repeats: int) -> float:
    """Time of a forward at side 64 over side 32."""
    from hf_attn.models.lamamba_diff import LaMambaDiffTransformer2DModel

    options = {"base_channels": 16, "num_heads": 2, "depths": [1, 1, 1, 1], "bottleneck_depth": 1, "num_classes": 10}
    model = LaMambaDiffTransformer2DModel(**options, ssm_state_size=1).eval()
    times: dict[int, list[float]] = {32: [], 64: []}
    label = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(repeats + 1):
            for side, found in times.items():
                x = torch.randn(1, 4, side, side)
                found.append(_seconds(lambda x=x: model(x, label, label)))
    return statistics.median(b / a for a, b in list(zip(*times.values(), strict=True))[1:])


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=160)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16], help="state sizes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    print("| n | transformers ms | ours ms | ratio | ours fwd+bwd ms | difference |\n|---|---|---|---|---|---|")
    rows = []
    for size in arguments.sizes:
        row = measure(arguments.batch, arguments.length, arguments.channels, size, arguments.repeats)
        line = (
            f"| {size} | {row['transformers']:.1f} | {row['ours']:.2f} | {row['ratio']:.1f}x | "
            f"{row['with_backward']:.1f} | {row['difference']:.0e} |"
        )
        rows.append(show(Row(f"n = {size}", line, {"speed-up": row["ratio"]}, row["spread"])))
    larger = growth(arguments.repeats)
    rows.append(show(Row("side 64 over 32", f"forward at side 64 / side 32: {larger:.2f}", {"growth": larger})))
    return rows


if __name__ == "__main__":
    main()
