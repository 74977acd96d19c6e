"""Train a tiny Wan on moving shapes with dense attention, VMoBA and 1D MoBA at equal steps, and compare them.

python recipes/vmoba_finetune/train.py                                             # from random weights
python recipes/vmoba_finetune/train.py --config recipes/vmoba_finetune/tune.yaml   # from a model trained dense
python recipes/vmoba_finetune/train.py --smoke                                     # seconds, any machine

An interrupted run goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import WanTransformer3DModel
from peft import LoraConfig

import hf_attn
from hf_attn.training.moving_shapes import held_out_loss, tiny_wan, train

HERE = Path(__file__).parent
# Options of VMoBA that hold in training: every call is sparse.
ALWAYS = {"dense_steps": 0, "min_tokens": 0, "strict": True}
# Sizes that show within seconds that everything runs and the loss falls.
SMOKE = {
    "seeds": [0],
    "base": {"model": {"num_layers": 3, "num_attention_heads": 2, "ffn_dim": 64}},
    "training": {"steps": 10, "warmup": 2, "save_every": 5, "batch_size": 2},
    "evaluation": {"videos": 8},
}


def base_model(options: dict[str, Any], seed: int, folder: Path) -> WanTransformer3DModel:
    """What all variants of a seed start from: random weights, or a model trained dense."""
    base = options["base"]
    model = tiny_wan(seed, **base["model"])
    if base["steps"]:
        train(model, **{**options["training"], "steps": base["steps"]}, seed=seed, size=options["size"], folder=folder)
    if base["lora_rank"]:
        torch.manual_seed(seed)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        model.add_adapter(LoraConfig(r=base["lora_rank"], lora_alpha=base["lora_rank"], target_modules=targets))
    return model


def run(options: dict[str, Any], name: str, seed: int, output: Path) -> dict[str, float | None]:
    """Train one variant with one seed; what is finished is read, what was interrupted goes on."""
    folder = output / f"{name}-{seed}"
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    model = base_model(options, seed, output / f"base-{seed}")
    if options["variants"][name] is not None:
        hf_attn.apply(model, "vmoba", **ALWAYS, **options["variants"][name])
    evaluation = {"count": options["evaluation"]["videos"], "size": options["size"]}
    before = held_out_loss(model, **evaluation)
    # Seeds from here on name data that the base model did not see.
    losses = train(model, **options["training"], seed=seed + 1000, size=options["size"], folder=folder)
    measured = {
        "start_loss": before,
        "train_loss": sum(losses[-20:]) / len(losses[-20:]),
        "loss": held_out_loss(model, **evaluation),
        "density": hf_attn.stats(model)["totals"]["density"],
    }
    hf_attn.remove(model)
    if options["base"]["lora_rank"]:
        model.save_lora_adapter(folder / "model")
    else:
        model.save_pretrained(folder / "model")
    (folder / "vmoba.json").write_text(json.dumps(options["variants"][name], indent=1))
    result.write_text(json.dumps(measured, indent=1))
    return measured


def table(results: dict[str, list[dict[str, float | None]]]) -> str:
    """Mean and range over the seeds, by variant."""
    lines = ["| variant | loss at start | held-out loss | range | density |", "|---|---|---|---|---|"]
    for name, rows in results.items():
        start, end = ([row[key] for row in rows] for key in ("start_loss", "loss"))
        densities = [row["density"] for row in rows if row["density"] is not None]
        density = f"{sum(densities) / len(densities):.3f}" if densities else "-"
        cells = [
            name,
            f"{sum(start) / len(start):.4f}",
            f"{sum(end) / len(end):.4f}",
            f"{min(end):.4f} to {max(end):.4f}",
        ]
        lines.append(f"| {' | '.join([*cells, density])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="every option, with comments")
    parser.add_argument("--output", type=Path, help="folder for models and results (default: output_dir of the config)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds")
    arguments = parser.parse_args()
    options = yaml.safe_load(arguments.config.read_text())
    if arguments.smoke:
        for key, value in SMOKE.items():
            options[key] = {**options[key], **value} if isinstance(value, dict) else value
        options["base"]["steps"] = min(options["base"]["steps"], 10)
    output = arguments.output or Path(options["output_dir"] + ("-smoke" if arguments.smoke else ""))
    results: dict[str, list[dict[str, float | None]]] = {}
    for seed in options["seeds"]:
        for name in options["variants"]:
            measured = run(options, name, seed, output)
            results.setdefault(name, []).append(measured)
            figures = ", ".join(f"{key} {value:.4f}" for key, value in measured.items() if value is not None)
            print(f"{name}, seed {seed}: {figures}", flush=True)
    (output / "results.json").write_text(json.dumps(results, indent=1))
    (output / "results.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
