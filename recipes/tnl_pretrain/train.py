"""Train a small TransNormerLLM and a Llama of the same size on the same text, each with its best learning rate.

python recipes/tnl_pretrain/train.py            # three learning rates, three seeds: ten runs of a few minutes on a CPU
python recipes/tnl_pretrain/train.py --smoke    # seconds, any machine

Several GPUs: put `accelerate launch` in front. An interrupted run goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_attn  # noqa: F401  (its model types in the Auto classes)
from hf_attn.training.data import BYTE_VOCABULARY, blocks, byte_ids, reference_text

HERE = Path(__file__).parent
# Sizes that show within seconds that everything runs and the loss falls.
SMOKE = {
    "seeds": [0, 1],
    "learning_rates": [1e-2, 3e-2],
    "length": 64,
    "evaluation_rows": 8,
    "long_factor": 2,
    "long_rows": 4,
    "sizes": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2},
    "training": {"max_steps": 20, "warmup_steps": 2, "eval_steps": 4, "save_steps": 8, "logging_steps": 10},
}  # fmt: skip


def build(options: dict[str, Any], name: str, seed: int) -> torch.nn.Module:
    """One model with fresh weights."""
    fields = dict(options["models"][name]) | options.get("sizes", {})
    kind = fields.pop("model_type")
    fields |= {"vocab_size": BYTE_VOCABULARY, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    fields |= {"tie_word_embeddings": True, "max_position_embeddings": options["length"] * options["long_factor"]}
    set_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))


def run(options: dict[str, Any], name: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train one model; what is finished is read, what was interrupted goes on."""
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    train, held_out = (blocks(byte_ids(text), options["length"]) for text in reference_text())
    arguments = TrainingArguments(
        output_dir=str(folder), seed=seed, data_seed=seed, learning_rate=rate, report_to=[], save_total_limit=1,
        disable_tqdm=True, **options["training"],
    )  # fmt: skip
    model = build(options, name, seed)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=held_out[: options["evaluation_rows"]]
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    curve = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    steps = sorted(curve)
    late = next(step for step in steps if step >= 0.8 * steps[-1])
    found = {
        "loss": curve[steps[-1]],
        "last_fifth": 1 - curve[steps[-1]] / curve[late],
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": [[step, curve[step]] for step in steps],
        "by_position": by_position(model, options),
    }
    if trainer.is_world_process_zero():
        trainer.save_model(str(folder / "model"))
        result.write_text(json.dumps(found, indent=1))
    return found


@torch.no_grad()
def by_position(model: torch.nn.Module, options: dict[str, Any]) -> list[float]:
    """Mean loss of held-out text in each stretch of `length` positions, up to `long_factor` of them.

    Rows start `length` tokens apart and overlap, so all stretches but the outermost see the same text: what differs is
    how much came before.
    """
    length, factor = options["length"], options["long_factor"]
    ids = torch.tensor(byte_ids(reference_text()[1]))
    rows = ids.unfold(0, length * factor + 1, length)[: options["long_rows"]]
    total = torch.zeros(factor)
    for row in rows:
        logits = model(row[None, :-1].to(model.device), use_cache=False).logits[0].float().cpu()
        total += cross_entropy(logits, row[1:], reduction="none").view(factor, length).mean(1)
    return (total / len(rows)).tolist()


def all_runs(options: dict[str, Any], output: Path) -> dict[str, dict[str, Any]]:
    """Every model with each learning rate on the first seed, then its best one on the other seeds."""
    results: dict[str, dict[str, Any]] = {}
    for name in options["models"]:
        first = options["seeds"][0]

        def one(rate: float, seed: int, name: str = name) -> dict[str, Any]:
            found = run(options, name, rate, seed, output / f"{name}-{rate:g}-{seed}")
            print(f"{name}, learning rate {rate:g}, seed {seed}: held-out loss {found['loss']:.4f}", flush=True)
            return found

        tried = {rate: one(rate, first) for rate in options["learning_rates"]}
        best = min(tried, key=lambda rate: tried[rate]["loss"])
        seeds = [tried[best], *(one(best, seed) for seed in options["seeds"][1:])]
        results[name] = {"rate": best, "tried": {f"{r:g}": t["loss"] for r, t in tried.items()}, "seeds": seeds}
    return results


def mean(rows: list[dict[str, Any]], key: str) -> float:
    """Mean of a number over seeds."""
    return sum(row[key] for row in rows) / len(rows)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Means over the seeds: loss, what the last fifth of the steps still gained, loss far behind the trained length."""
    lines = [
        "| model | weights | learning rate | held-out loss | range | gain of the last fifth | furthest / first |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        rows = found["seeds"]
        losses = [row["loss"] for row in rows]
        far = sum(row["by_position"][-1] / row["by_position"][0] for row in rows) / len(rows)
        lines.append(
            f"| {name} | {rows[0]['parameters']} | {found['rate']:g} | {mean(rows, 'loss'):.4f} | "
            f"{min(losses):.4f} to {max(losses):.4f} | {100 * mean(rows, 'last_fifth'):.1f} % | {far:.3f} |"
        )
    return "\n".join(lines)


def picture(results: dict[str, dict[str, Any]], length: int, path: Path) -> None:
    """Held-out loss by step, and by position; the thin lines are single seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, found) in enumerate(results.items()):
        for seed in found["seeds"]:
            label = name if seed is found["seeds"][0] else None
            left.plot(*zip(*seed["curve"], strict=True), color=f"C{number}", linewidth=1, label=label)
            places = [length * (i + 0.5) for i in range(len(seed["by_position"]))]
            right.plot(places, seed["by_position"], color=f"C{number}", linewidth=1, label=label)
    left.set(xlabel="step", ylabel="held-out loss")
    right.set(xlabel="position", ylabel="held-out loss")
    right.axvline(length, color="0.6", linewidth=1, linestyle=":")
    left.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="every option, with comments")
    parser.add_argument("--output", type=Path, help="folder for models and results (default: output_dir of the config)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds")
    arguments = parser.parse_args()
    options = yaml.safe_load(arguments.config.read_text())
    if arguments.smoke:
        for key, value in SMOKE.items():
            options[key] = {**options.get(key, {}), **value} if isinstance(value, dict) else value
    output = arguments.output or Path(options["output_dir"] + ("-smoke" if arguments.smoke else ""))
    results = all_runs(options, output)
    (output / "results.json").write_text(json.dumps(results, indent=1))
    (output / "results.md").write_text(table(results) + "\n")
    picture(results, options["length"], output / "curves.png")
    print(table(results))


if __name__ == "__main__":
    main()
