"""Train a model with landmark attention and ask it for pass keys at lengths it never saw.

python recipes/landmark/train.py                                            # a small model from scratch
python recipes/landmark/train.py --config recipes/landmark/smollm2.yaml     # LoRA on a pretrained model
python recipes/landmark/train.py --smoke                                    # seconds, any machine

Several GPUs: put `accelerate launch` in front. An interrupted run goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_attn
from hf_attn.bench.models import load_language_model
from hf_attn.training.data import IGNORED, blocks, reference_text
from hf_attn.training.landmark import add_landmark_token, passkey_score
from hf_attn.training.passkeys import KEY_DIGITS, DigitPasskeys, passkey_text

HERE = Path(__file__).parent
# Sizes that show within seconds that everything runs and the loss falls.
SMOKE = {
    "model": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "landmark": {"block_size": 8, "top_k": 2, "train_length": 32},
    "stages": [
        {"task": "repeats", "length": 21, "steps": 20, "rows": 16},
        {"task": "passkeys", "length": 28, "steps": 10, "rows": 8},
    ],
    "evaluation": {"prompts": 4, "times": [1, 4]},
    "training": {"learning_rate": 5e-3, "save_steps": 10, "warmup_steps": 2},
}
VARIANTS = {"retrieval": None, "no blocks": "none", "random blocks": "random"}


class Stages(IterableDataset):
    """Batches of rows, one a step, of the tasks and lengths of the stages; the same for the same seed."""

    def __init__(self, task: DigitPasskeys, stages: list[dict[str, Any]], seed: int) -> None:
        self.task, self.stages, self.seed = task, stages, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for stage in self.stages:
            for _ in range(stage["steps"]):
                make = self.task.repeats if stage["task"] == "repeats" else self.task.rows
                ids, labels = make(stage["rows"], stage["length"], generator)
                yield {"input_ids": ids, "labels": labels}

    @property
    def steps(self) -> int:
        """Batches of all stages."""
        return sum(stage["steps"] for stage in self.stages)


def one_batch(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The dataset makes whole batches."""
    return {key: torch.cat([feature[key] for feature in features]) for key in features[0]}


def small_model(options: dict[str, Any], task: DigitPasskeys) -> torch.nn.Module:
    """A Llama with landmarks, new weights."""
    landmark = {f"landmark_{key}": value for key, value in options["landmark"].items()}
    config = AutoConfig.for_model(
        "landmark_llama",
        vocab_size=task.vocabulary,
        landmark_token_id=task.landmark,
        pad_token_id=task.padding,
        bos_token_id=None,
        eos_token_id=None,
        **landmark,
        **options["model"],
    )
    return AutoModelForCausalLM.from_config(config)


def train_small(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """From scratch, on digits in a tiny vocabulary."""
    task = DigitPasskeys(**options["task"])
    set_seed(options["seed"])
    data = Stages(task, options["stages"], options["seed"])
    model = small_model(options, task)
    fit(model, data, one_batch, options, folder, max_steps=data.steps, per_device_train_batch_size=1)
    evaluation, rows = options["evaluation"], []
    length = options["stages"][-1]["length"]
    for times in evaluation["times"]:
        generator = torch.Generator().manual_seed(options["seed"] + 1)
        ids, _ = task.rows(evaluation["prompts"], times * length, generator, held_out=True)
        rows += compare(model, ids[:, :-KEY_DIGITS], ids[:, -KEY_DIGITS:], times, evaluation)
    return {"rows": rows}


def fit(model: Any, data: Any, collate: Any, options: dict[str, Any], folder: Path, **more: Any) -> None:
    """Train, or go on from the last checkpoint."""
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        seed=options["seed"],
        report_to=[],
        save_total_limit=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        **{**options["training"], **more},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    checkpoints = folder / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    trainer.save_model(str(folder / "model"))


def compare(
    model: Any, prompts: torch.Tensor, answers: torch.Tensor, times: float, evaluation: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row of the table for each way to read the cache: as configured, no block, random blocks, everything."""
    selection, rows = model.config.landmark_selection, []
    names = [*VARIANTS, "full attention"]
    for name in names:
        model.config.landmark_selection = VARIANTS.get(name) or selection
        dense = name == "full attention"
        score = passkey_score(model, prompts, answers, batch=evaluation["batch"], dense=dense)
        row = {"variant": name, "times": times, "tokens": prompts.shape[1], **score.__dict__}
        read = "-" if score.read is None else f"{score.read:.1%}"
        print(f"{times}x, {row['tokens']} tokens, {name}: exact {score.exact:.1%}, digits {score.digits:.1%}, {read}")
        rows.append(row)
    model.config.landmark_selection = selection
    return rows


def tune(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """LoRA on a pretrained model: losses before and after, and pass keys in text."""
    from peft import LoraConfig, get_peft_model

    name = None if options["base"] == "smollm2" else options["base"]
    base, tokenizer = load_language_model(name, getattr(torch, options["dtype"]))
    token = add_landmark_token(tokenizer)
    length = options["length"]
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in reference_text()]
    train, held_out = (blocks(ids, length) for ids in texts)
    held_out = held_out[: options["evaluation"]["rows"]]
    data = tuning_batches(train, tokenizer, options)
    set_seed(options["seed"])
    losses = {"dense": mean_loss(base, held_out)}
    model = hf_attn.convert(base, "landmark", token_id=token, **options["landmark"])
    losses["landmarks, untrained"] = mean_loss(model, held_out)
    lora = LoraConfig(task_type="CAUSAL_LM", trainable_token_indices={"embed_tokens": [token]}, **options["lora"])
    adapted = get_peft_model(model, lora)
    adapted.print_trainable_parameters()
    more = {"max_steps": len(data), "per_device_train_batch_size": 1, "label_names": ["labels"]}
    fit(adapted, data, one_batch, options, folder, **more)
    losses["landmarks, trained"] = mean_loss(adapted, held_out)
    gap = losses["landmarks, untrained"] - losses["dense"]
    closed = (losses["landmarks, untrained"] - losses["landmarks, trained"]) / gap
    print(", ".join(f"{name} {value:.3f}" for name, value in losses.items()) + f"; {closed:.0%} of the gap closed")
    merged, rows = adapted.merge_and_unload(), []
    tokenizer.save_pretrained(str(folder / "model"))
    generator = torch.Generator().manual_seed(options["seed"] + 1)
    for characters in options["evaluation"]["characters"]:
        times = None  # of the first prompt: others differ by a few tokens and belong into the same row of the table
        for _ in range(options["evaluation"]["prompts"]):
            prompt, key = passkey_text(characters, generator, held_out=True)
            pair = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, " " + key))
            ids, answer = (torch.tensor([found]) for found in pair)
            times = round(ids.shape[1] / length, 1) if times is None else times
            rows += compare(merged, ids, answer, times, options["evaluation"])
    return {"losses": losses, "gap_closed": closed, "rows": rows}


def tuning_batches(
    train: list[dict[str, torch.Tensor]], tokenizer: Any, options: dict[str, Any]
) -> list[dict[str, torch.Tensor]]:
    """Batches of text, and every `passkeys_every`-th of passkey prompts, of which the answer is trained; one a step."""
    generator = torch.Generator().manual_seed(options["seed"])
    order: list[int] = []
    batches = []
    for step in range(options["steps"]):
        if options["passkeys_every"] and step % options["passkeys_every"] == 0:
            rows = [passkey_row(tokenizer, options["length"], generator) for _ in range(options["rows"])]
        else:
            while len(order) < options["rows"]:
                order += torch.randperm(len(train), generator=generator).tolist()
            rows = [{**train[order.pop(0)]} for _ in range(options["rows"])]
            for row in rows:
                row["attention_mask"] = torch.ones_like(row["input_ids"])
        batches.append({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
    return batches


def passkey_row(tokenizer: Any, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A prompt with a key that evaluation never asks for, and its answer, padded at the right to `length` tokens."""

    def encode(characters: int) -> tuple[list[int], list[int]]:
        prompt, key = passkey_text(characters, generator)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, " " + key))

    bare, wide = (sum(map(len, encode(characters))) for characters in (0, 1000))
    characters = int(1000 * (length - bare) / (wide - bare))
    while True:
        if characters < 0:
            raise ValueError(f"length={length} has no room for a passkey prompt ({bare} tokens without filler)")
        ids, answer = encode(characters)
        spare = length - len(ids) - len(answer)
        if spare >= 0:
            break
        characters -= 8
    labels = [IGNORED] * len(ids) + answer + [IGNORED] * spare
    row = {"input_ids": ids + answer + [0] * spare, "labels": labels}
    row["attention_mask"] = [1] * (length - spare) + [0] * spare
    return {name: torch.tensor(values) for name, values in row.items()}


@torch.no_grad()
def mean_loss(model: Any, rows: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss of rows of one length, without a cache."""
    training = model.training
    model.eval()
    losses = [
        float(model(input_ids=row["input_ids"][None], labels=row["labels"][None], use_cache=False).loss) for row in rows
    ]
    model.train(training)
    return sum(losses) / len(losses)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over prompts of one variant and one length."""
    found: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["variant"], row["times"]), []).append(row)
    lines = ["| variant | length | prompts | exact keys | digits | cached blocks read |", "|---|---|---|---|---|---|"]
    for (name, times), group in found.items():
        prompts = sum(row["prompts"] for row in group)
        exact, digits = (sum(row[key] * row["prompts"] for row in group) / prompts for key in ("exact", "digits"))
        reads = [row["read"] for row in group if row["read"] is not None]
        read = f"{sum(reads) / len(reads):.1%}" if reads else "all"
        lines.append(f"| {name} | {times}x | {prompts} | {exact:.1%} | {digits:.1%} | {read} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="every option, with comments")
    parser.add_argument("--output", type=Path, help="folder for model and results (default: output_dir of the config)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds")
    arguments = parser.parse_args()
    options = yaml.safe_load(arguments.config.read_text())
    if arguments.smoke:
        for key, value in SMOKE.items():
            options[key] = {**options.get(key, {}), **value} if isinstance(value, dict) else value
    output = arguments.output or Path(options["output_dir"] + ("-smoke" if arguments.smoke else ""))
    results = (tune if "base" in options else train_small)(options, output)
    (output / "results.json").write_text(json.dumps(results, indent=1))
    (output / "results.md").write_text(table(results["rows"]) + "\n")
    print(table(results["rows"]))


if __name__ == "__main__":
    main()
