"""Linear attention against causal SDPA: `python -m hf_attn.bench.linear_speed`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn import ops
from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import Timing
from hf_attn.nn.decay import base_slopes

FIGURES = ("forward", "forward and backward", "growth", "growth to 16k", "over masked form")


def measure(length: int, heads: int, dim: int, block: int, repeats: int) -> dict[str, float]:
    """Milliseconds (medians) of both and the median ratio of interleaved rounds, forward and with backward."""
    query, key, value, grad = (torch.randn(1, heads, length, dim) for _ in range(4))
    slopes = base_slopes(heads)
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]

    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.linear_attention(q, k, v, slopes, block_size=block)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def training(run: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(*leaves), leaves, grad)

    rounds = []
    for _ in range(repeats + 1):
        with torch.no_grad():
            row = [_seconds(lambda: dense(query, key, value)), _seconds(lambda: linear(query, key, value))]
        rounds.append([*row, _seconds(training(dense)), _seconds(training(linear))])
    rounds = rounds[1:]  # the first one warms up
    spreads = [Timing(tuple(r[column] for r in rounds)).spread for column in (0, 2)]
    result = {
        name: 1e3 * statistics.median(column)
        for name, column in zip(
            ("dense", "linear", "dense_backward", "linear_backward"), zip(*rounds, strict=True), strict=True
        )
    }
    result["forward"] = statistics.median(r[0] / r[1] for r in rounds)
    result["backward"] = statistics.median(r[2] / r[3] for r in rounds)
    result["spread"] = max(spreads)
    return result


def growth(heads: int, dim: int, short: int = 2048, long: int = 32768, repeats: int = 7) -> float:
    """Time at `long` tokens over time at `short` ones, forward; linear is `long / short`."""
    slopes = base_slopes(heads)
    times: dict[int, list[float]] = {short: [], long: []}
    inputs = {n: [torch.randn(1, heads, n, dim) for _ in range(3)] for n in times}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for length, found in times.items():
                found.append(_seconds(lambda n=length: ops.linear_attention(*inputs[n], slopes)))
    return statistics.median(times[long][1:]) / statistics.median(times[short][1:])


def masked_form(length: int, heads: int, dim: int, repeats: int = 3) -> float:
    """Time of ((q k^T) * D) v with its matrix of decays at hand, over that of the op; forward."""
    slopes = base_slopes(heads)
    query, key, value = (torch.randn(1, heads, length, dim) for _ in range(3))
    place = torch.arange(length)
    decays = (-slopes[:, None, None] * (place[:, None] - place)).exp_().tril_()
    ratios = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            whole = _seconds(lambda: (query @ key.mT * decays) @ value)
            ratios.append(whole / _seconds(lambda: ops.linear_attention(query, key, value, slopes)))
    return statistics.median(ratios[1:])


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    columns = ["heads", "SDPA ms", "linear ms", "forward", "SDPA fwd+bwd ms", "linear ms", "fwd+bwd"]
    columns += ["32k / 2k", "16k / 4k", "masked form"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    rows = []
    for heads in arguments.heads:
        row = measure(arguments.length, heads, arguments.dim, arguments.block, arguments.repeats)
        figures = {
            "forward": row["forward"],
            "forward and backward": row["backward"],
            "growth": growth(heads, arguments.dim),
            "growth to 16k": growth(heads, arguments.dim, 4096, 16384),
            "over masked form": masked_form(arguments.length, heads, arguments.dim),
        }
        line = (
            f"| {heads} | {row['dense']:.1f} | {row['linear']:.2f} | {row['forward']:.2f}x | "
            f"{row['dense_backward']:.1f} | {row['linear_backward']:.2f} | {row['backward']:.2f}x | "
            f"{figures['growth']:.1f} | {figures['growth to 16k']:.2f} | {figures['over masked form']:.0f}x |"
        )
        rows.append(show(Row(f"{heads} heads", line, figures, row["spread"])))
    return rows


if __name__ == "__main__":
    main()
