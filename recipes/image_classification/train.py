"""Train vision backbones of hf-attn from scratch: real digits on a CPU, or a folder of images.

python recipes/image_classification/train.py                                     # every backbone of config.yaml
python recipes/image_classification/train.py --backbones biformer                # one of them
python recipes/image_classification/train.py --smoke                             # seconds, any machine

Several GPUs: put `accelerate launch` in front. An interrupted run goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForImageClassification, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_attn  # noqa: F401  (registers the backbones)
from hf_attn.training.augmentation import RandAugment
from hf_attn.training.image_trainer import ImageTrainer, WeightAverage
from hf_attn.training.images import COLORS, SHAPES, ImageFolder, colored_shapes, digits, nearest_neighbour

HERE = Path(__file__).parent
# Sets that a package brings, in memory: their classes.
SETS = {"digits": list("0123456789"), "shapes": [f"{color} {shape}" for shape in SHAPES for color in COLORS]}
# Sizes that show within seconds that everything runs and the loss falls.
SMOKE = {
    "seeds": [0],
    "splits": ["random"],
    "augment": {"degrees": 0, "shift": 0.0, "zoom": 0.0},
    "mixing": {"mixup": 0.0, "cutmix": 0.0},
    "erasing": 0.0,
    "training": {"num_train_epochs": 2, "save_steps": 20, "warmup_steps": 4},
}


def datasets(options: dict[str, Any], config: Any, split: str, seed: int) -> tuple[Any, Any]:
    """Images for training and held-out images."""
    if options["data"] == "digits":
        return digits(split, seed)
    if options["data"] == "shapes":
        return colored_shapes()
    folder, processor = Path(options["data"]), config.image_processor()
    change = RandAugment(options["rand_augment"]) if options["rand_augment"] else None
    train = ImageFolder(folder / "train", processor, crop=options["crop"], change=change)
    held_out = ImageFolder(folder / "validation", processor)
    if train.classes != held_out.classes:
        raise ValueError(f"{folder}/train and {folder}/validation have different classes")
    return train, held_out


def build(options: dict[str, Any], name: str) -> Any:
    """Config of a backbone: a published preset, or fields of its own."""
    fields = dict(options["backbones"][name])
    classes = SETS.get(options["data"]) or _classes(Path(options["data"]))
    kind, preset = fields.pop("model_type"), fields.pop("preset", None)
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    fields = {**options["model"], **fields, **labels}
    config_class = type(AutoConfig.for_model(kind))
    return config_class.preset(preset, **fields) if preset else config_class(**fields)


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())


def accuracy(predictions: Any) -> dict[str, float]:
    """Share of images whose most likely class is the right one."""
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def run(options: dict[str, Any], name: str, split: str, seed: int, folder: Path) -> dict[str, float]:
    """Train one backbone once; what is finished is read, what was interrupted goes on."""
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    set_seed(seed)
    config = build(options, name)
    train, held_out = datasets(options, config, split, seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        report_to=[],
        save_total_limit=1,
        disable_tqdm=True,
        label_names=["labels"],
        remove_unused_columns=False,
        **options["training"],
    )
    average = WeightAverage(options["ema_decay"])
    trainer = ImageTrainer(
        model=AutoModelForImageClassification.from_config(config),
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=accuracy,
        callbacks=[average],
        augment=options["augment"],
        mixing=options["mixing"],
        smoothing=options["label_smoothing"],
        erasing=options["erasing"],
        resize=options["data"] in SETS,
    )
    before, start = trainer.evaluate(), time.perf_counter()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    seconds, last = time.perf_counter() - start, trainer.evaluate()
    average.load_into(trainer.model)
    after = trainer.evaluate()
    measured = {
        "start_loss": before["eval_loss"],
        "loss": after["eval_loss"],
        "accuracy": after["eval_accuracy"],
        "accuracy_without_ema": last["eval_accuracy"],
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seconds": seconds,
    }
    if options["data"] in SETS:
        measured["nearest_neighbour"] = nearest_neighbour(train, held_out)
    if trainer.is_world_process_zero():
        trainer.save_model(str(folder / "model"))
        if config.num_channels == 3:
            # These were trained on whole images in -1 .. 1.
            plain = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_pct": 1.0}
            processor = config.image_processor(**(plain if options["data"] in SETS else {}))
            processor.save_pretrained(folder / "model")
        result.write_text(json.dumps(measured, indent=1))
    return measured


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Mean and range over the seeds, by backbone and split."""
    head = "| backbone | parameters | split | accuracy | range | 1-nearest neighbour | seconds a run |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for name, splits in results.items():
        for split, rows in splits.items():
            found = [row["accuracy"] for row in rows]
            nearest = [row["nearest_neighbour"] for row in rows if "nearest_neighbour" in row]
            cells = [
                name,
                f"{rows[0]['parameters']:,}",
                split,
                f"{_mean(found):.2%}",
                f"{min(found):.2%} to {max(found):.2%}",
                f"{_mean(nearest):.2%}" if nearest else "-",
                f"{_mean([row['seconds'] for row in rows]):.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="every option, with comments")
    parser.add_argument("--backbones", nargs="+", help="only these of the config")
    parser.add_argument("--output", type=Path, help="folder for models and results (default: output_dir of the config)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds")
    arguments = parser.parse_args()
    options = yaml.safe_load(arguments.config.read_text())
    if arguments.smoke:
        for key, value in SMOKE.items():
            options[key] = {**options[key], **value} if isinstance(value, dict) else value
    unknown = set(arguments.backbones or ()) - set(options["backbones"])
    if unknown:
        parser.error(f"unknown backbones {sorted(unknown)}; the config has {', '.join(options['backbones'])}")
    if options["data"] not in SETS and not (Path(options["data"]) / "train").is_dir():
        parser.error(f"data must be {', '.join(SETS)} or a folder with train/ and validation/, got {options['data']!r}")
    if options["data"] in SETS and options["rand_augment"]:
        parser.error(f"rand_augment changes images of folders; set it to 0 for {options['data']}, and use augment")
    output = arguments.output or Path(options["output_dir"] + ("-smoke" if arguments.smoke else ""))
    torch.set_num_threads(options["threads"] or torch.get_num_threads())
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in arguments.backbones or options["backbones"]:
        for split in options["splits"] if options["data"] in SETS else ["validation"]:
            for seed in options["seeds"]:
                measured = run(options, name, split, seed, output / f"{name}-{split}-{seed}")
                results.setdefault(name, {}).setdefault(split, []).append(measured)
                figures = ", ".join(f"{key} {value:.4g}" for key, value in measured.items())
                print(f"{name}, {split} split, seed {seed}: {figures}", flush=True)
    (output / "results.json").write_text(json.dumps(results, indent=1))
    (output / "results.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
