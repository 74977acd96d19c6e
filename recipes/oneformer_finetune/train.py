"""Train OneFormer on three tasks at once: a tiny DiNAT model from nothing, or a checkpoint on a folder of pictures.

python recipes/oneformer_finetune/train.py               # a tiny model on 8 synthetic pictures, minutes on one core
python recipes/oneformer_finetune/train.py --smoke       # seconds

Several GPUs: put `accelerate launch` in front. An interrupted run goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, DinatConfig, OneFormerConfig, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_attn.models.oneformer import OneFormerAttnForUniversalSegmentation
from hf_attn.training.scenes import (
    TASKS,
    Scene,
    class_map,
    mean_iou,
    scenes,
    task_targets,
    task_texts,
    word_encoder,
)

HERE = Path(__file__).parent
SMOKE = {
    "images": 4,
    "size": 64,
    "build": {"encoder_layers": 1, "decoder_layers": 2, "train_num_points": 64},
    "training": {"max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 4, "logging_steps": 2,
                 "warmup_steps": 2},
}  # fmt: skip
IGNORED = 255


class Tasks(Dataset):
    """Item i is picture i modulo their number with a task drawn from (seed, i): the same after an interruption."""

    def __init__(
        self, pictures: list[Scene], options: dict[str, Any], encode: Callable[[str], list[int]], config: Any
    ) -> None:
        training = options["training"]
        self.pictures, self.options, self.encode = pictures, options, encode
        self.texts = config.num_queries - config.text_encoder_n_ctx
        self.length = max(training["max_steps"] * training["per_device_train_batch_size"], len(pictures))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        picture = self.pictures[number % len(self.pictures)]
        random = torch.Generator().manual_seed(self.options["seed"] * 1_000_003 + number)
        task = TASKS[int(torch.randint(0, len(TASKS), (1,), generator=random))]
        masks, classes = task_targets(picture, task, tuple(self.options["things"]))
        texts = task_texts(classes, task, tuple(self.options["classes"]), self.texts)
        return {
            "pixel_values": picture.image,
            "task_inputs": torch.tensor(self.encode(f"the task is {task}"), dtype=torch.float32),
            "text_inputs": torch.tensor([self.encode(text) for text in texts]),
            "mask_labels": masks,
            "class_labels": classes,
        }


def collate(items: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Pictures and texts in one tensor, masks and classes in lists."""
    lists = ("mask_labels", "class_labels")
    return {key: [x[key] for x in items] if key in lists else torch.stack([x[key] for x in items]) for key in items[0]}


def read_folder(folder: Path, size: int) -> list[Scene]:
    """The pictures of a folder, resized, normalised as ImageNet models expect."""
    found = []
    mean, std = (np.array(x, dtype=np.float32) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for path in sorted((folder / "images").glob("*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB").resize((size, size)), dtype=np.float32) / 255
        labels = Image.open(folder / "labels" / path.name).convert("RGB").resize((size, size), Image.Resampling.NEAREST)
        segments = torch.from_numpy(np.asarray(labels, dtype=np.int64))
        number = segments[..., 0] * 256 + segments[..., 1]
        kept = [n for n in number.unique().tolist() if n // 256 != IGNORED]
        if kept:
            masks, classes = torch.stack([number == n for n in kept]), torch.tensor([n // 256 for n in kept])
            found.append(Scene(torch.from_numpy((pixels - mean) / std).permute(2, 0, 1), masks, classes))
    if not found:
        raise ValueError(f"no labelled pictures in {folder}: it needs images/NAME.png and labels/NAME.png")
    return found


def load(options: dict[str, Any]) -> tuple[OneFormerAttnForUniversalSegmentation, Callable[[str], list[int]]]:
    """The model, and a function from a sentence to token ids padded with 0."""
    names = tuple(options["classes"])
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    implementation = options["model_options"]["attn_implementation"]
    if options["model"] is None:
        encode, vocabulary = word_encoder(names, options["build"]["text_encoder_context_length"])
        backbone = DinatConfig(**options["backbone"], out_features=[f"stage{i}" for i in range(1, 5)])
        config = OneFormerConfig(
            backbone_config=backbone, is_training=True, text_encoder_vocab_size=vocabulary, **labels, **options["build"]
        )
        kind = OneFormerAttnForUniversalSegmentation
        return kind._from_config(config, attn_implementation=implementation), encode
    # Published checkpoints have no text tower and heads for their own classes: both start at random.
    model = OneFormerAttnForUniversalSegmentation.from_pretrained(
        options["model"], is_training=True, ignore_mismatched_sizes=True, attn_implementation=implementation, **labels
    )
    tokenizer = AutoTokenizer.from_pretrained(options["model"])

    def encode(sentence: str) -> list[int]:
        ids = tokenizer(sentence, truncation=True, max_length=model.config.task_seq_len)["input_ids"]
        return ids + [0] * (model.config.task_seq_len - len(ids))

    return model, encode


def optimizer_of(model: torch.nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW; the backbone has a rate of its own, norms, biases and embeddings do not decay."""
    training, groups = options["training"], {}
    for name, parameter in model.named_parameters():
        inside = "pixel_level_module.encoder" in name
        decays = parameter.dim() > 1 and "embed" not in name and not name.endswith("rpb")
        groups.setdefault((inside, decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": training["learning_rate"] * (options["backbone_lr"] if inside else 1.0),
                "weight_decay": training["weight_decay"] if decays else 0.0,
            }
            for (inside, decays), parameters in groups.items()
        ]
    )


@torch.no_grad()
def evaluate(model: torch.nn.Module, pictures: list[Scene], encode: Callable[[str], list[int]], classes: int) -> float:
    """Mean IoU of the semantic task."""
    model.eval()
    found = []
    task = torch.tensor([encode("the task is semantic")], dtype=torch.float32, device=model.device)
    for picture in pictures:
        out = model(picture.image[None].to(model.device), task)
        found.append(class_map(out.class_queries_logits, out.masks_queries_logits, picture.image.shape[1:])[0].cpu())
    return mean_iou(torch.stack(found), torch.stack([picture.labels for picture in pictures]), classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="every option, with comments")
    parser.add_argument("--output", type=Path, help="folder for model and results (default: output_dir of the config)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds")
    arguments = parser.parse_args()
    options = yaml.safe_load(arguments.config.read_text())
    if arguments.smoke:
        for key, value in SMOKE.items():
            options[key] = {**options[key], **value} if isinstance(value, dict) else value
    output = arguments.output or Path(options["output_dir"] + ("-smoke" if arguments.smoke else ""))
    set_seed(options["seed"])
    model, encode = load(options)
    if options["data"] is None:
        pictures = scenes(options["images"], size=options["size"], seed=options["seed"])
    else:
        pictures = read_folder(Path(options["data"]), options["size"])

    folder = output / "checkpoints"
    settings = TrainingArguments(
        output_dir=str(folder),
        seed=options["seed"],
        report_to=[],
        save_total_limit=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_first_step=True,
        **options["training"],
    )
    if options["model_options"]["gradient_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    data = Tasks(pictures, options, encode, model.config)
    classes = len(options["classes"])
    before = evaluate(model, pictures, encode, classes)
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=data,
        data_collator=collate,
        optimizers=(optimizer_of(model, options), None),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    trainer.save_model(str(output / "model"))

    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    measured = {
        "loss at start": losses[0],
        "loss": losses[-1],
        "mean IoU at start": before,
        "mean IoU": evaluate(model, pictures, encode, classes),
    }
    (output / "results.json").write_text(json.dumps(measured, indent=1))
    print("| | start | end |\n|---|---|---|")
    for name in ("loss", "mean IoU"):
        print(f"| {name} | {measured[f'{name} at start']:.3f} | {measured[name]:.3f} |")


if __name__ == "__main__":
    main()
