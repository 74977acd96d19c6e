"""How near a mechanism's videos come to those of dense attention: a tiny Wan trained on moving shapes, by PSNR.

    python -m hf_attn.bench.video_quality --mechanism psa vmoba --density 0.25

The first call trains the model (about ten minutes on one core; an interrupted one goes on) and keeps it in `--folder`.
Every seed generates four videos, once dense and once with each mechanism, from the same noise. `--option` sets options
of one mechanism, e.g. `--option psa.block_size=32`; mechanisms that need a calibrated plan take `--plan NAME=FOLDER`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import hf_attn
from hf_attn.training.moving_shapes import COLOURS, SHAPES, generate, psnr, shapes_pipeline, trained_wan

# Blocks that cut 512 tokens into 16 pieces; the defaults of these mechanisms are made for 10 to 100 times the tokens.
OPTIONS: dict[str, dict[str, Any]] = {"psa": {"block_size": 32}}
VIDEOS = 4


def captions_of(seed: int) -> Tensor:
    """Captions int64 `[4, 2]` of one seed: every kind of shape, colours in turn."""
    kinds = torch.arange(VIDEOS)
    return torch.stack([kinds % len(SHAPES), (kinds + seed) % len(COLOURS)], 1)


def compare(
    pipe: Any, name: str, options: dict[str, Any], *, seeds: list[int], steps: int, plan: str | None = None
) -> tuple[list[float], float]:
    """PSNR to dense generation in dB for every seed, and the density of the calls that were not dense.

    Raises RuntimeError when a call fell back to dense attention: the figure would not be the mechanism's.
    """
    wanted = [generate(pipe, captions_of(seed), seed=seed, steps=steps) for seed in seeds]
    if plan is None:
        hf_attn.apply(pipe, name, **options)
    else:
        hf_attn.load_plan(pipe, plan)
    try:
        found = [generate(pipe, captions_of(seed), seed=seed, steps=steps) for seed in seeds]
        totals = hf_attn.stats(pipe)["totals"]
    finally:
        hf_attn.remove(pipe)
    if totals["fallbacks"]:
        raise RuntimeError(f"{name} fell back to dense attention: {totals['fallback_reasons']}")
    if totals["density"] is None:
        raise RuntimeError(f"{name} computed nothing sparse: {totals['dense_reasons']}")
    return [psnr(video, dense) for video, dense in zip(found, wanted, strict=True)], totals["density"]


def parse_options(items: list[str]) -> dict[str, dict[str, Any]]:
    """`psa.block_size=32` -> {"psa": {"block_size": 32}}; values are JSON, or words."""
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        path, _, text = item.partition("=")
        name, _, option = path.partition(".")
        if not (name and option and text):
            raise ValueError(f"--option must look like psa.block_size=32, got {item!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        found.setdefault(name, {})[option] = value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanism", nargs="+", default=["psa"], help="names of hf_attn.list_mechanisms()")
    parser.add_argument("--density", nargs="+", type=float, default=[0.25])
    parser.add_argument("--dense-steps", type=float, default=0.25, help="share of the steps that stays dense")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--option", nargs="*", default=[], help="NAME.OPTION=VALUE")
    parser.add_argument("--plan", nargs="*", default=[], help="NAME=FOLDER of a calibrated plan")
    parser.add_argument(
        "--folder", type=Path, default=Path("moving_shapes_wan"), help="where the trained model is kept"
    )
    parser.add_argument("--train-steps", type=int, default=1000)
    args = parser.parse_args()
    options, plans = parse_options(args.option), dict(item.split("=", 1) for item in args.plan)
    pipe = shapes_pipeline(trained_wan(args.folder, steps=args.train_steps, report=_progress))
    print(f"PSNR in dB to dense generation, {VIDEOS} videos a seed, {args.steps} steps, {args.dense_steps:.0%} dense")
    print(f"{'mechanism':<24}{'density':>8}{'realised':>10}{'mean':>8}   seeds")
    for density in args.density:
        for name in args.mechanism:
            common = {"density": density, "dense_steps": args.dense_steps, "min_tokens": 0, "strict": True}
            chosen = {**OPTIONS.get(name, {}), **common, **options.get(name, {})}
            found, share = compare(pipe, name, chosen, seeds=args.seeds, steps=args.steps, plan=plans.get(name))
            print(
                f"{name:<24}{density:>8}{share:>10.3f}{mean(found):>8.2f}   {', '.join(f'{x:.2f}' for x in found)}",
                flush=True,
            )


def _progress(step: int, loss: float) -> None:
    if step % 100 == 0:
        print(f"training, step {step}: loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
