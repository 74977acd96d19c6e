"""Teach a pretrained dense model to live with MoBA: convert, then train while top_k falls from dense to its target.

python recipes/moba_convert/train.py                      # SmolLM2-135M-Instruct, LoRA on q and k, key convolution
python recipes/moba_convert/train.py --smoke              # seconds, a tiny random model

Several GPUs: put `accelerate launch` in front. An interrupted run goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_attn
from hf_attn.bench.recipe_models import RANDOM, base_with_encoder
from hf_attn.training.data import blocks, reference_text
from hf_attn.training.schedule import AttentionSwitch, TopKSchedule, set_options

HERE = Path(__file__).parent
# A tiny random model over bytes: shows within seconds that everything runs and the loss falls.
SMOKE = {
    "model": RANDOM,
    "length": 128,
    "train_rows": 64,
    "evaluation_rows": 4,
    "convert": {"block_size": 8, "top_k": 2},
    "training": {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "save_steps": 10},
}
SMOKE_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def trainer_of(model: torch.nn.Module, options: dict[str, Any], train: list, held_out: list, folder: Path) -> Trainer:
    """A Trainer for one model, adapters added where the config asks for them."""
    if options["lora"]:
        import peft

        lora = dict(options["lora"])
        if not any("k_conv1d" in name for name, _ in model.named_modules()):
            lora.pop("modules_to_save", None)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=options["seed"],
        data_seed=options["seed"],
        report_to=[],
        save_total_limit=1,
        disable_tqdm=True,
        **options["training"],
    )
    return Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=held_out)


def train_and_measure(trainer: Trainer, folder: Path) -> float:
    """Train to the end, from the last checkpoint if there is one; the held-out loss."""
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    return trainer.evaluate()["eval_loss"]


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
    output.mkdir(parents=True, exist_ok=True)
    set_seed(options["seed"])

    dense, encode = base_with_encoder(options["model"], SMOKE_SIZES)
    train, held_out = (blocks(encode(text), options["length"]) for text in reference_text())
    train = train[: options["train_rows"] or None]
    held_out = held_out[: options["evaluation_rows"]]
    measured: dict[str, float] = {}

    # 1. Where we come from, and what switching MoBA on costs without any training.
    before = trainer_of(dense, {**options, "lora": None}, train, held_out, output / "dense")
    measured["dense"] = before.evaluate()["eval_loss"]
    convert = dict(options["convert"])
    if convert.get("kconv_width"):
        model = hf_attn.convert(dense, "moba", **convert)
    else:
        convert.pop("kconv_width", None)
        model = hf_attn.apply(dense, "moba", **convert)
    trainer = trainer_of(model, options, train, held_out, output / "moba")
    measured["moba, not trained"] = trainer.evaluate()["eval_loss"]

    # 2. With as many blocks as there are, MoBA is dense attention: training starts at the dense loss.
    count = -(-options["length"] // convert["block_size"])
    set_options(trainer.model, top_k=count)
    measured["moba, first step of the schedule"] = trainer.evaluate()["eval_loss"]

    # 3. Train while the blocks become fewer.
    schedule = options["schedule"]
    trainer.add_callback(TopKSchedule(convert["top_k"], count, schedule["dense_share"]))
    if schedule["full_attention_after"] is not None:
        trainer.add_callback(AttentionSwitch(schedule["full_attention_after"]))
    measured["moba, trained"] = train_and_measure(trainer, output / "moba")
    if convert.get("kconv_width"):
        names = {"dense": "dense", "before": "moba, not trained", "after": "moba, trained"}
        row = {column: measured[name] for column, name in names.items()}
        what = (
            f"LoRA on {', '.join(options['lora']['target_modules'])}, and the convolutions"
            if options["lora"]
            else "all"
        )
        data = f"{len(train)} rows of {options['length']} tokens of the Python language reference"
        hf_attn.set_card(trainer.model, trained=what, data=data, metrics={"held-out loss": row})
    trainer.save_model(str(output / "result"))

    # 4. The same training without MoBA: what part of the gain is the text?
    if options["compare_dense"]:
        set_seed(options["seed"])
        plain, _ = base_with_encoder(options["model"], SMOKE_SIZES)
        control = trainer_of(plain, options, train, held_out, output / "control")
        measured["dense, trained the same way"] = train_and_measure(control, output / "control")

    (output / "results.json").write_text(json.dumps(measured, indent=1))
    print("| model | held-out loss |\n|---|---|")
    for name, loss in measured.items():
        print(f"| {name} | {loss:.4f} |")


if __name__ == "__main__":
    main()
