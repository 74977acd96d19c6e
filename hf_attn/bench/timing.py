"""Interleaved timing: every speed in this project is a ratio measured this way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median


@contextmanager
def backend(name: str) -> Iterator[None]:
    """HF_ATTN_BACKEND for a while."""
    before = os.environ.get("HF_ATTN_BACKEND")
    os.environ["HF_ATTN_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("HF_ATTN_BACKEND")
        if before is not None:
            os.environ["HF_ATTN_BACKEND"] = before


@dataclass(frozen=True)
class Timing:
    """Seconds of one function over several interleaved repeats."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: 0.05 means the middle half of the repeats lie within 5 %."""
        ordered = sorted(self.samples)
        quarter = len(ordered) // 4
        return (ordered[-1 - quarter] - ordered[quarter]) / self.median


def interleaved(
    functions: dict[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time several functions in turn (A B C A B C ...), so that a machine that drifts slows all of them alike.

    Args:
        functions: name -> function without arguments; what it returns is dropped.
        repeats: counted rounds, >= 1.
        warmup: rounds that are not counted.
        synchronize: waits for the device; called before the clock starts and before it stops.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                samples[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def graph_of(function: Callable[[], object]) -> Callable[[], object] | None:
    """Replays of the function captured as a CUDA graph, None where it waits for the device or cannot be captured."""
    import torch

    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    mode = torch.cuda.get_sync_debug_mode()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            function()  # compiles, and fills caches
            # A function that waits would break the capture, which torch does not always recover from.
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(2):
                function()
            torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:  # whatever a capture makes of it, the launches one by one can be timed
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.set_stream(current)  # a failed capture leaves its own stream behind
        torch.cuda.synchronize()
        return None
    return graph.replay


def paired_ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over the rounds of numerator / denominator: both of one round saw the same machine."""
    return median(a / b for a, b in zip(numerator.samples, denominator.samples, strict=True))


def machine_load() -> str:
    """One line that says how busy the machine is, for the head of a table."""
    one, five, _ = os.getloadavg()
    return f"load average {one:.2f} (1 min) {five:.2f} (5 min) on {os.cpu_count()} cores"
