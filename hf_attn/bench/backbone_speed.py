"""Forward of the vision backbones on the CPU against their authors' order of operations, same weights, same run.

    python -m hf_attn.bench.backbone_speed                       # the tiny variants at 224 pixels, one thread
    python -m hf_attn.bench.backbone_speed --families biformer --compile

A variant whose logits differ from the reference's by more than 1e-4 of their largest shows no speed. Columns:
`reference`, `ours`, `deploy` (after `reparameterize()`, where it does something), each in ms, and their ratio to the
reference (lower is faster). `--compile` adds `compiled` (one graph, needs a C++ compiler and minutes) and its ratio to
`ours`. `--clock thread` counts the processor time of this thread, for machines that are busy.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import pkgutil
import shutil
import time
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

import hf_attn  # noqa: F401  (registers the backbones)
from hf_attn.bench import backbones
from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import interleaved, machine_load, paired_ratio

FIGURES = ("ours", "deploy", "compiled", "compiled over eager")
TOLERANCE = 1e-4


def families() -> list[str]:
    """Families that have a reference."""
    return sorted(module.name for module in pkgutil.iter_modules(backbones.__path__))


def pair(family: str, preset: str) -> tuple[nn.Module, nn.Module]:
    """The reference and our model of one variant, with the same random weights and batch-norm statistics."""
    module: ModuleType = importlib.import_module(f"{backbones.__name__}.{family}")
    config = type(AutoConfig.for_model(family)).preset(preset, num_labels=1000)
    torch.manual_seed(0)
    reference = module.Reference(config).eval()
    with torch.no_grad():
        for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif "lookup_table" in name:
                tensor.normal_(0, 0.5)
    model = AutoModelForImageClassification.from_config(config).eval()
    model.load_official_weights(reference.state_dict())
    return reference, model


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest absolute value."""
    return float((found - expected).abs().max() / expected.abs().max())


def deployed(model: nn.Module) -> nn.Module | None:
    """A reparameterised copy; None where nothing changes."""
    other = copy.deepcopy(model).reparameterize()
    return other if _size(other) != _size(model) else None


def compiler_obstacle() -> str | None:
    """Why torch.compile cannot serve a CPU here; None where it can."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return None if any(map(shutil.which, names)) else f"no C++ compiler ({', '.join(names)})"


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measure(family: str, preset: str, args: argparse.Namespace) -> Row:
    """The row of one variant; its figures are times over the reference's."""
    reference, model = pair(family, preset)
    images = torch.randn(args.batch, 3, args.size, args.size)
    expected = reference(images)
    runs: dict[str, Callable[[], object]] = {"reference": lambda: reference(images)}
    wrong = []
    candidates = {"ours": model, "deploy": deployed(model)}
    if args.compile:
        candidates["compiled"] = torch.compile(model, fullgraph=True)
    for name, candidate in candidates.items():
        if candidate is None:
            continue
        worst = error(candidate(images).logits, expected)
        if not worst <= TOLERANCE:
            wrong.append(f"{name} differs by {worst:.1e}: no speed shown")
            continue
        runs[name] = lambda candidate=candidate: candidate(images)
    times = interleaved(runs, repeats=args.repeats, warmup=2)
    figures: dict[str, float] = {}
    cells = [f"{family + ' ' + preset:16}{times['reference'].median * 1e3:10.1f}"]
    for name in ("ours", "deploy", *(["compiled"] if args.compile else [])):
        if name in times:
            ratio = figures[name] = paired_ratio(times[name], times["reference"])
            cells.append(f"{times[name].median * 1e3:10.1f}{ratio:7.2f}x")
        else:
            cells.append(f"{'-':>18}")
    if "compiled" in times:
        over = figures["compiled over eager"] = paired_ratio(times["compiled"], times["ours"])
        cells.append(f"{over:8.2f}x")
    spread = times["reference"].spread
    line = " ".join(["".join(cells), f"{spread:8.0%}", *wrong])
    return Row(f"{family} {preset}", line, figures, spread, "; ".join(wrong))


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=families(), default=families())
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also torch.compile (minutes)")
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.clock == "thread":
        if args.threads != 1:
            parser.error("--clock thread counts one thread; use --threads 1")
        time.perf_counter = time.thread_time
    print(f"{args.batch} x {args.size} x {args.size}, fp32, {args.threads} thread(s), {args.clock} time in ms")
    print(f"torch {torch.__version__}, {machine_load()}")
    if args.compile and (missing := compiler_obstacle()):
        print(f"compiled: left out, {missing}")
        args.compile = False
    names = ("ours", "deploy", *(["compiled"] if args.compile else []))
    compiled = f"{'/ ours':>9}" if args.compile else ""
    columns = "".join(f"{name:>10}{'ratio':>8}" for name in names)
    print(f"{'variant':16}{'reference':>10}{columns}{compiled}   spread")
    variants = [(f, p) for f in args.families for p in importlib.import_module(f"{backbones.__name__}.{f}").PRESETS]
    return [show(measure(family, preset, args)) for family, preset in variants]


if __name__ == "__main__":
    main()
