"""Convert a pretrained model to Mixture-of-Head attention and tune it with LoRA until it is as good as before.

python recipes/moh/train.py                       # SmolLM2-135M-Instruct, 7 of 9 heads, one seed
python recipes/moh/train.py --seeds 0 1 2 --variants learned query_norm random
python recipes/moh/train.py --smoke               # seconds, a tiny random model

Several GPUs: put `accelerate launch` in front (configs in recipes/accelerate). An interrupted run goes on where it
stopped when started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from accelerate import PartialState
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_attn
from hf_attn.bench.recipe_models import RANDOM, base_with_encoder
from hf_attn.training.data import blocks, reference_text
from hf_attn.training.head_load import HeadLoad

HERE = Path(__file__).parent
ON_CPU = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
PROCESS = PartialState(cpu=ON_CPU)  # the only one, or one of those of `accelerate launch`
VARIANTS = ("learned", "query_norm", "random")
# A tiny random model over bytes: shows within seconds that everything runs and the loss falls.
SMOKE = {
    "model": RANDOM,
    "length": 64,
    "train_rows": 32,
    "evaluation_rows": 4,
    "calibration_rows": 2,
    "variants": list(VARIANTS),
    "convert": {"shared_heads": 1, "top_k": 2},
    "training": {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "save_steps": 6},
}
SMOKE_SIZES = {
    "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def load(options: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    """The dense model, and a function from text to token ids."""
    if options["model"] == RANDOM:
        torch.manual_seed(0)
    model, encode = base_with_encoder(options["model"], SMOKE_SIZES, dtype=options["dtype"])
    return model.eval(), encode


def converted(variant: str, options: dict[str, Any], calibration: torch.Tensor) -> torch.nn.Module:
    """A fresh base, converted with the router of a variant."""
    router = "query_norm" if variant == "query_norm" else "learned"
    model = hf_attn.convert(load(options)[0], "moh", router=router, tokens=calibration, **options["convert"])
    if variant == "random":
        for name, weight in model.named_parameters():
            if "router" in name:
                torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return model.eval()


def trainer_of(model: torch.nn.Module, options: dict[str, Any], seed: int, train: list, held_out: list, folder: Path):
    """A Trainer for one model with LoRA adapters, and its routers trained whole."""
    set_seed(seed)
    lora = dict(options["lora"])
    if not any("router." in name for name, _ in model.named_parameters()):
        lora.pop("modules_to_save", None)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    arguments = TrainingArguments(
        output_dir=str(folder), seed=seed, data_seed=seed, report_to=[], save_total_limit=1, disable_tqdm=True,
        use_cpu=ON_CPU, **options["training"],
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=held_out, callbacks=[HeadLoad()])


@torch.no_grad()
def evaluate(model: torch.nn.Module, rows: list) -> float:
    """Mean loss a token of rows, without the load-balance term."""
    model.eval()
    losses = [model(**{name: x[None].to(model.device) for name, x in row.items()}).loss for row in rows]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def head_load(model: torch.nn.Module, rows: list) -> tuple[float, float]:
    """Load of the least and the most chosen routed head over all layers, as a multiple of an even load."""
    base, total = model.get_base_model(), None
    for row in rows:
        base(input_ids=row["input_ids"][None].to(base.device))
        load = torch.tensor(base.head_load())
        total = load if total is None else total + load
    shares = total / total.mean(1, keepdim=True)
    return float(shares.min()), float(shares.max())


def train_and_measure(trainer: Trainer, folder: Path, held_out: list) -> dict[str, float]:
    """Train to the end, from the last checkpoint if there is one; what the result is worth."""
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    trainer.save_model(str(folder / "adapter"))
    found = {"loss": evaluate(trainer.model, held_out)}
    if hasattr(trainer.model.get_base_model(), "head_load"):
        found["load_min"], found["load_max"] = head_load(trainer.model, held_out)
    return found


def run_seed(seed: int, options: dict[str, Any], output: Path) -> dict[str, dict[str, float]]:
    """All variants of one seed; finished ones are read from their result.json."""
    dense, encode = load(options)
    train, held_out = (blocks(encode(text), options["length"]) for text in reference_text())
    train, held_out = train[: options["train_rows"] or None], held_out[: options["evaluation_rows"]]
    calibration = torch.stack([row["input_ids"] for row in train[: options["calibration_rows"]]])
    results = {"dense": {"loss": evaluate(dense, held_out)}}
    for variant in [*options["variants"], *(["dense tuned"] if options["compare_dense"] else [])]:
        folder = output / f"{variant.replace(' ', '_')}-{seed}"
        done = folder / "result.json"
        if not done.is_file():
            set_seed(seed)
            model = load(options)[0] if variant == "dense tuned" else converted(variant, options, calibration)
            before = evaluate(model, held_out)
            trainer = trainer_of(model, options, seed, train, held_out, folder)
            found = {"before": before, **train_and_measure(trainer, folder, held_out)}
            if hasattr(model, "config") and variant != "dense tuned":
                model.config.save_pretrained(folder / "adapter" / "base_config")
            if PROCESS.is_main_process:
                done.write_text(json.dumps(found, indent=1))
            PROCESS.wait_for_everyone()
        results[variant] = json.loads(done.read_text())
    return results


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Means over seeds: losses, part of the zero-shot gap that training closed, perplexity against the tuned base."""
    lines = [
        "| model | before | after | gap closed | perplexity / tuned base | head load |",
        "|---|---|---|---|---|---|",
    ]
    seeds = list(results.values())

    def mean(name: str, key: str) -> float | None:
        values = [seed[name][key] for seed in seeds if key in seed[name]]
        return sum(values) / len(values) if values else None

    dense, tuned = mean("dense", "loss"), mean("dense tuned", "loss") if "dense tuned" in seeds[0] else None
    lines.append(f"| dense | {dense:.4f} | | | | |")
    for name in [name for name in seeds[0] if name != "dense"]:
        before, after = mean(name, "before"), mean(name, "loss")
        closed = "" if name == "dense tuned" else f"{100 * (before - after) / (before - dense):.0f} %"
        ratio = "" if tuned is None else f"{math.exp(after - tuned):.3f}"
        low, high = mean(name, "load_min"), mean(name, "load_max")
        spread = "" if low is None else f"{low:.2f} to {high:.2f}"
        lines.append(f"| {name} | {before:.4f} | {after:.4f} | {closed} | {ratio} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="every option, with comments")
    parser.add_argument("--output", type=Path, help="folder for models and results (default: output_dir of the config)")
    parser.add_argument("--seeds", type=int, nargs="+", help="one run a seed; the table has means")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="routers to train")
    parser.add_argument("--top-k", type=int, help="routed heads a token computes")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds")
    arguments = parser.parse_args()
    options = yaml.safe_load(arguments.config.read_text())
    if arguments.smoke:
        for key, value in SMOKE.items():
            options[key] = {**options.get(key, {}), **value} if isinstance(value, dict) else value
    options["variants"] = arguments.variants or options["variants"]
    options["seeds"] = arguments.seeds or options["seeds"]
    if arguments.top_k is not None:
        options["convert"]["top_k"] = arguments.top_k
    output = arguments.output or Path(options["output_dir"] + ("-smoke" if arguments.smoke else ""))
    output.mkdir(parents=True, exist_ok=True)

    results = {str(seed): run_seed(seed, options, output) for seed in options["seeds"]}
    if not PROCESS.is_main_process:
        return
    (output / "results.json").write_text(json.dumps(results, indent=1))
    (output / "results.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
