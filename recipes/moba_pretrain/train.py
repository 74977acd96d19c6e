"""Train a small hybrid stack from scratch, in several variants at equal steps, and compare them.

python recipes/moba_pretrain/train.py                                              # real text, next-byte loss
python recipes/moba_pretrain/train.py --config recipes/moba_pretrain/recall.yaml   # associative recall
python recipes/moba_pretrain/train.py --smoke                                      # seconds, any machine

Several GPUs: put `accelerate launch` in front. An interrupted run goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_attn
from hf_attn.models.moba_hybrid import MobaHybridConfig
from hf_attn.training.data import BYTE_VOCABULARY, associative_recall, blocks, byte_ids, reference_text

HERE = Path(__file__).parent
# Sizes that show within seconds that everything runs and the loss falls.
SMOKE = {
    "seeds": [0],
    "length": 128,
    "model": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "training": {"max_steps": 20, "warmup_steps": 2, "learning_rate": 5e-3, "save_steps": 10},
    "evaluation_rows": 8,
    "recall": {"pairs": 4, "queries": 8},
}


def datasets(options: dict[str, Any]) -> tuple[list, list]:
    """Rows for training and held-out rows."""
    length, task = options["length"], options["task"]
    if task == "text":
        train, held_out = (blocks(byte_ids(text), length) for text in reference_text())
        return train, held_out[: options["evaluation_rows"]]
    if task != "recall":
        raise ValueError(f"task must be 'text' or 'recall', got {task!r}")
    recall = {"vocabulary": options["model"]["vocab_size"], **options["recall"]}
    train = associative_recall(options["train_rows"], length, seed=1, **recall)
    return train, associative_recall(options["evaluation_rows"], length, seed=2, **recall)


def build(options: dict[str, Any], variant: dict[str, Any], seed: int) -> torch.nn.Module:
    """The model of one variant; variants of a seed start from the same numbers where they have the same weights."""
    fields = {"vocab_size": BYTE_VOCABULARY, **options["model"], "max_position_embeddings": options["length"]}
    fields |= {key: value for key, value in variant.items() if key != "only_sliding"}
    if variant.get("only_sliding"):
        fields["layer_types"] = ["sliding_attention"] * fields["num_hidden_layers"]
    set_seed(seed)
    return AutoModelForCausalLM.from_config(MobaHybridConfig(bos_token_id=None, eos_token_id=None, **fields))


def accuracy(predictions: Any) -> dict[str, float]:
    """Share of labelled tokens that are the most likely ones."""
    found, labels = predictions.predictions[:, :-1], predictions.label_ids[:, 1:]
    labelled = labels >= 0
    return {"accuracy": float((found == labels)[labelled].mean())}


def run(options: dict[str, Any], name: str, seed: int, folder: Path) -> dict[str, float]:
    """Train one variant with one seed; what is finished is read, what was interrupted goes on."""
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    train, held_out = datasets(options)
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        report_to=[],
        save_total_limit=1,
        disable_tqdm=True,
        **options["training"],
    )
    trainer = Trainer(
        model=build(options, options["variants"][name], seed),
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    after = trainer.evaluate()
    totals = hf_attn.stats(trainer.model)["totals"]
    measured = {
        "start_loss": before["eval_loss"],
        "loss": after["eval_loss"],
        "accuracy": after["eval_accuracy"],
        "density": totals["density"],
    }
    if trainer.is_world_process_zero():
        trainer.save_model(str(folder / "model"))
        result.write_text(json.dumps(measured, indent=1))
    return measured


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean and range over the seeds, by variant."""
    lines = ["| variant | held-out loss | range | accuracy | range | density |", "|---|---|---|---|---|---|"]
    for name, rows in results.items():
        cells = [name]
        for key in ("loss", "accuracy"):
            values = [row[key] for row in rows]
            cells += [f"{sum(values) / len(values):.4f}", f"{min(values):.4f} to {max(values):.4f}"]
        density = rows[0]["density"]
        cells.append("-" if density is None else f"{density:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
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
            options[key] = {**options.get(key, {}), **value} if isinstance(value, dict) else value
    output = arguments.output or Path(options["output_dir"] + ("-smoke" if arguments.smoke else ""))
    results: dict[str, list[dict[str, float]]] = {}
    for seed in options["seeds"]:
        for name in options["variants"]:
            measured = run(options, name, seed, output / f"{name}-{seed}")
            results.setdefault(name, []).append(measured)
            print(f"{name}, seed {seed}: " + ", ".join(f"{k} {v:.4f}" for k, v in measured.items() if v is not None))
    (output / "results.json").write_text(json.dumps(results, indent=1))
    (output / "results.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
