"""Train a Titans model to recall pairs from further back than its window, and two models without a memory beside it.

python recipes/titans_needle/train.py                      # all models and seeds, one after the other
python recipes/titans_needle/train.py --seed 0             # one seed
python recipes/titans_needle/train.py --smoke              # seconds, any machine

An interrupted run goes on where it stopped when started again; runs that are done are not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_attn  # noqa: F401  registers the model type
from hf_attn.training.recall import RecallRows, open_gates, recall_accuracy, silenced_memory

HERE = Path(__file__).parent
MEMORY, SILENT = "memory", "memory switched off"
# Sizes that show within seconds that everything runs and the loss falls.
SMOKE = {
    "seeds": [0],
    "task": {"pairs": 2, "keys": 4, "values": 2, "filler": 2},
    "data": {"distance": [2, 4], "rows": 16, "stages": [{"pairs": 1, "steps": 8}, {"pairs": 2, "steps": 12}]},
    "model": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "memory_inner_size": 12,
        "memory_chunk_size": 8,
        "num_attention_heads": 2,
        "window": 2,
    },
    "evaluation": {"rows": 8, "times": [1, 4]},
    "training": {
        "save_steps": 5,
        "logging_steps": 5,
        "warmup_steps": 2,
        "lr_scheduler_kwargs": {"num_decay_steps": 5},
    },
}


class Batches(IterableDataset):
    """One batch a step, of a distance drawn for it; the same for the same seed."""

    def __init__(self, task: RecallRows, options: dict[str, Any], seed: int) -> None:
        self.task, self.options, self.seed = task, options, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + 1000)
        low, high = self.options["distance"]
        for stage in self.options["stages"]:
            task = dataclasses.replace(self.task, pairs=stage["pairs"])
            for _ in range(stage["steps"]):
                distance = int(torch.randint(low, high + 1, (), generator=generator))
                ids, labels = task.rows(self.options["rows"], distance, generator)
                yield {"input_ids": ids, "labels": labels}

    @property
    def steps(self) -> int:
        """Batches of all stages."""
        return sum(stage["steps"] for stage in self.options["stages"])


def one_batch(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The dataset makes whole batches."""
    return {key: torch.cat([feature[key] for feature in features]) for key in features[0]}


def build(name: str, options: dict[str, Any], task: RecallRows) -> torch.nn.Module:
    """A new model; those without a memory get a feed-forward that makes them as large as the one with it."""
    fields = {"vocab_size": task.vocabulary, "bos_token_id": None, "eos_token_id": None, "pad_token_id": task.padding}
    model = options["model"]
    if name == MEMORY:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("titans", **fields, **model))
    kind = {"full attention": "llama", "sliding window": "mistral"}[name]
    if kind == "mistral":
        fields["sliding_window"] = model["window"]
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    fields |= {field: model[field] for field in shared} | {"num_key_value_heads": model["num_attention_heads"]}
    with torch.device("meta"):
        size = build(MEMORY, options, task).num_parameters()
        least = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, intermediate_size=8, **fields))
    missing = size - least.num_parameters()
    width = 8 + round(missing / (3 * model["hidden_size"] * model["num_hidden_layers"]))
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, intermediate_size=width, **fields))


def run(name: str, seed: int, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one model, or go on with it, and ask it at every distance; what is in `folder` already is not repeated."""
    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    task = RecallRows(**options["task"])
    set_seed(seed)
    model = build(name, options, task)
    if name == MEMORY:
        open_gates(model, **options["gates"])
    data = Batches(task, options["data"], seed)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        seed=seed,
        report_to=[],
        save_total_limit=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        per_device_train_batch_size=1,
        max_steps=data.steps,
        **options["training"],
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=one_batch)
    checkpoints = folder / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    trainer.save_model(str(folder / "model"))
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    result = {"model": name, "seed": seed, "parameters": model.num_parameters(), "losses": losses, "rows": []}
    result["rows"] = evaluate(name, model, options, task, seed)
    done.write_text(json.dumps(result))
    return result


def evaluate(
    name: str, model: torch.nn.Module, options: dict[str, Any], task: RecallRows, seed: int
) -> list[dict[str, Any]]:
    """Accuracy at every distance, with the memory and without it."""
    found, longest, evaluation = [], options["data"]["distance"][1], options["evaluation"]
    for times in evaluation["times"]:
        generator = torch.Generator().manual_seed(seed + 2000)
        ids, labels = task.rows(evaluation["rows"], times * longest, generator)
        for variant in (MEMORY, SILENT) if name == MEMORY else (name,):
            with silenced_memory(model) if variant == SILENT else contextlib.nullcontext():
                accuracy = recall_accuracy(model, ids, labels, batch=evaluation["batch"])
            found.append({"variant": variant, "times": times, "distance": times * longest, "accuracy": accuracy})
            print(f"{variant}, {times * longest} tokens of filler: {accuracy:.1%}", flush=True)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Mean accuracy of the seeds, and the lowest and highest of them."""
    found: dict[str, dict[int, list[float]]] = {}
    for result in results:
        for row in result["rows"]:
            found.setdefault(row["variant"], {}).setdefault(row["times"], []).append(row["accuracy"])
    sizes = {result["model"]: result["parameters"] for result in results} | {SILENT: "the same"}
    times = sorted({row["times"] for result in results for row in result["rows"]})
    lines = ["| model | parameters | " + " | ".join(f"{n}x the training distance" for n in times) + " |"]
    lines.append("|" + "---|" * (len(times) + 2))
    for name, by_times in found.items():
        cells = []
        for values in (by_times[n] for n in times):
            spread = f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.1%}{spread}")
        lines.append(f"| {name} | {sizes[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Losses of training, and accuracy over the distance. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["variant"] for result in results for row in result["rows"]))
    color = {name: f"C{number}" for number, name in enumerate(names)}
    labelled: set[str] = set()
    for result in results:
        left.plot(*zip(*result["losses"], strict=True), color=color[result["model"]], linewidth=1)
        for name in dict.fromkeys(row["variant"] for row in result["rows"]):
            points = [(row["distance"], row["accuracy"]) for row in result["rows"] if row["variant"] == name]
            label = None if name in labelled else name
            labelled.add(name)
            right.plot(*zip(*points, strict=True), color=color[name], marker="o", markersize=3, label=label)
    left.set(xlabel="step", ylabel="loss on the answers")
    right.set(xlabel="tokens of filler", ylabel="values recalled", ylim=(0, 1.02))
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="every option, with comments")
    parser.add_argument("--output", type=Path, help="folder for models and results (default: output_dir of the config)")
    parser.add_argument("--seed", type=int, help="train this seed only")
    parser.add_argument("--model", help="train this model only: memory, full attention or sliding window")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds")
    arguments = parser.parse_args()
    options = yaml.safe_load(arguments.config.read_text())
    if arguments.smoke:
        for key, value in SMOKE.items():
            options[key] = {**options[key], **value} if isinstance(value, dict) else value
    output = arguments.output or Path(options["output_dir"] + ("-smoke" if arguments.smoke else ""))
    seeds = options["seeds"] if arguments.seed is None else [arguments.seed]
    names = [MEMORY, *options["baselines"]] if arguments.model is None else [arguments.model]
    for seed in seeds:
        for name in names:
            run(name, seed, options, output / f"{name.replace(' ', '_')}_{seed}")
    # Everything that was ever trained here, this time or before.
    results = [json.loads(path.read_text()) for path in sorted(output.glob("*/result.json"))]
    (output / "results.json").write_text(json.dumps(results, indent=1))
    (output / "results.md").write_text(table(results) + "\n")
    picture(results, output / "recall.png")
    print(table(results))


if __name__ == "__main__":
    main()
