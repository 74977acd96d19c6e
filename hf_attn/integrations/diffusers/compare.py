"""The same generation dense and with a mechanism: PSNR of every frame, time, and a picture to look at."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image, ImageDraw

from hf_attn.integrations.diffusers.model import apply, checked, installed_in, remove, stats

# Columns of the picture, and what the difference is multiplied by in its last row.
COLUMNS, AMPLIFIED = 8, 4
_CAPTION = 14


@dataclass(frozen=True)
class Comparison:
    """What a mechanism changed in one generation.

    psnr: decibels of every frame against the dense one, values in [0, 1] (infinite where nothing differs); density: of
    the sparse calls, None when there was none; sparse_calls, calls: of all attention calls; seconds: dense and sparse
    run, VAE and text encoder included, no warm-up; path: the picture, None when none was asked for.
    """

    mechanism: str
    psnr: tuple[float, ...]
    density: float | None
    sparse_calls: int
    calls: int
    seconds: tuple[float, float]
    path: Path | None = None

    @property
    def mean_psnr(self) -> float:
        """PSNR of all frames together, from the mean of their squared errors."""
        return _decibels(sum(10 ** (-p / 10) for p in self.psnr) / len(self.psnr))

    def __str__(self) -> str:
        density = "dense" if self.density is None else f"density {self.density:.3f}"
        worst = min(range(len(self.psnr)), key=self.psnr.__getitem__)
        lines = [
            f"{self.mechanism}: PSNR {self.mean_psnr:.2f} dB over {len(self.psnr)} frames, worst "
            f"{self.psnr[worst]:.2f} dB (frame {worst})",
            f"{self.sparse_calls} of {self.calls} attention calls sparse, {density}",
            f"{self.seconds[0]:.2f} s dense, {self.seconds[1]:.2f} s with {self.mechanism}",
        ]
        return "\n".join(lines + [f"picture: {self.path}"] * (self.path is not None))


def compare(
    pipe: DiffusionPipeline,
    name: str,
    call: dict[str, Any],
    *,
    path: str | PathLike | None = None,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """Run a pipeline dense and with mechanism `name`, from the same noise, and compare frame by frame.

    Args:
        pipe: a pipeline without a mechanism; it is left as it was.
        name, options: as in `hf_attn.apply`.
        call: arguments of the pipeline's call: prompt, height, width, num_frames, num_inference_steps, ...
        path: write a picture here: up to 8 frames, dense above sparse above 4 times their difference.
        seed: of the noise, drawn on the CPU.

    Raises TypeError unless `pipe` is a pipeline with a supported model; ValueError for bad options, a pipeline that has
    a mechanism, and a call that sets `generator`, `output_type` or `return_dict`.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"hf_attn.compare takes a diffusers pipeline, got {type(pipe).__name__}")
    taken = sorted({"generator", "output_type", "return_dict"} & call.keys())
    if taken:
        raise ValueError(f"call must not hold {', '.join(taken)}: compare sets them; the noise follows seed=")
    if installed_in(pipe):
        raise ValueError("the pipeline has a mechanism already; call hf_attn.remove(pipe) first")
    checked(name, options)
    dense, dense_seconds = _frames(pipe, call, seed)
    apply(pipe, name, **options)
    try:
        sparse, sparse_seconds = _frames(pipe, call, seed)
        totals = stats(pipe)["totals"]
    finally:
        remove(pipe)
    psnr = tuple(_decibels(float(((a - b) ** 2).mean())) for a, b in zip(dense, sparse, strict=True))
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _picture(dense, sparse, psnr, name).save(path)
    counts = totals["density"], totals["sparse_calls"], totals["calls"]
    return Comparison(name, psnr, *counts, (dense_seconds, sparse_seconds), path)


def _frames(pipe: DiffusionPipeline, call: dict[str, Any], seed: int) -> tuple[np.ndarray, float]:
    """Frames (of a video) or images, fp64 `[N, H, W, 3]` in [0, 1], and the seconds they took."""
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    result = pipe(**call, generator=generator, output_type="np")
    seconds = time.perf_counter() - start
    found = result.frames[0] if hasattr(result, "frames") else result.images
    return np.asarray(found, dtype=np.float64), seconds


def _decibels(squared_error: float) -> float:
    return math.inf if squared_error == 0 else -10 * math.log10(squared_error)


def _picture(dense: np.ndarray, sparse: np.ndarray, psnr: tuple[float, ...], name: str) -> Image.Image:
    """Three rows (dense, sparse, amplified difference) of frames spread over the run, with their PSNR."""
    shown = np.unique(np.linspace(0, len(dense) - 1, min(len(dense), COLUMNS)).round().astype(int))
    height, width = dense.shape[1:3]
    line = height + _CAPTION
    canvas = Image.new("RGB", (width * len(shown), 3 * line), "white")
    draw = ImageDraw.Draw(canvas)
    difference = np.abs(dense - sparse) * AMPLIFIED
    for row, (label, frames) in enumerate((("dense", dense), (name, sparse), (f"{AMPLIFIED} x |diff.|", difference))):
        for column, frame in enumerate(shown):
            pixels = (frames[frame].clip(0, 1) * 255).round().astype(np.uint8)
            canvas.paste(Image.fromarray(pixels), (column * width, row * line + _CAPTION))
            text = f"{label} {frame}" if row < 2 else f"{psnr[frame]:.1f} dB"
            draw.text((column * width + 2, row * line + 1), text, fill="black")
    return canvas
