"""Cut a pretrained dense model into experts and tune it until it can do without some of them.

python recipes/uoe/train.py                      # SmolLM2-135M-Instruct, 2 of 3 attention experts, LoRA
python recipes/uoe/train.py --smoke              # seconds, a tiny random model

Several GPUs: put `accelerate launch` in front. An interrupted run goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_attn
from hf_attn.bench.recipe_models import RANDOM, base_with_encoder
from hf_attn.models.uoe import order_neurons
from hf_attn.training.data import blocks, reference_text

HERE = Path(__file__).parent
# A tiny random model over bytes: shows within seconds that everything runs.
SMOKE = {
    "model": RANDOM,
    "length": 64,
    "train_rows": 64,
    "evaluation_rows": 4,
    "calibration_rows": 4,
    "convert": {"attn_top_k": 1, "mlp_experts": 4, "mlp_top_k": 3},
    "training": {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 4},
}
SMOKE_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def trainer_of(
    model: torch.nn.Module, options: dict[str, Any], train: list, held_out: list, folder: Path, adapt: bool
) -> Trainer:
    """A Trainer for one model, with adapters where `adapt` is true."""
    if adapt and options["lora"]:
        lora = dict(options["lora"])
        if not any(name.endswith("uoe_gate") for name, _ in model.named_modules()):
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


def trained(trainer: Trainer, folder: Path) -> float:
    """Train to the end, from the last checkpoint if there is one; the held-out loss."""
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    return trainer.evaluate()["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="every option, with comments")
    parser.add_argument("--output", type=Path, help="folder for model and results (default: output_dir of the config)")
    parser.add_argument("--seed", type=int, help="instead of the config's")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds")
    arguments = parser.parse_args()
    options = yaml.safe_load(arguments.config.read_text())
    if arguments.smoke:
        for key, value in SMOKE.items():
            options[key] = {**options.get(key, {}), **value} if isinstance(value, dict) else value
    if arguments.seed is not None:
        options["seed"] = arguments.seed
    output = arguments.output or Path(options["output_dir"] + ("-smoke" if arguments.smoke else ""))
    output.mkdir(parents=True, exist_ok=True)
    set_seed(options["seed"])

    dense, encode = base_with_encoder(options["model"], SMOKE_SIZES)
    train, held_out = (blocks(encode(text), options["length"]) for text in reference_text())
    train, calibration = train[options["calibration_rows"] :], train[: options["calibration_rows"]]
    train, held_out = train[: options["train_rows"] or None], held_out[: options["evaluation_rows"]]
    ids = torch.stack([row["input_ids"] for row in calibration])
    measured: dict[str, float] = {}

    def measure(model: torch.nn.Module) -> float:
        return trainer_of(model, options, train, held_out, output / "none", adapt=False).evaluate()["eval_loss"]

    # 1. Where we come from, and what leaving experts out costs without training: random gates, and fitted ones.
    measured["dense"] = measure(dense)
    convert = options["convert"]
    if convert.get("mlp_top_k") is not None:
        order_neurons(dense, ids, convert["mlp_experts"])
    measured["uoe, random gates"] = measure(hf_attn.convert(dense, "uoe", **convert))
    model = hf_attn.convert(dense, "uoe", calibration=ids, **convert)
    measured["uoe, fitted gates"] = measure(model)

    # 2. Train, and train the dense model the same way: what part of the gain is the text?
    control = copy.deepcopy(dense) if options["compare_dense"] else None
    trainer = trainer_of(model, options, train, held_out, output / "uoe", adapt=True)
    measured["uoe, trained"] = trained(trainer, output / "uoe")
    trainer.save_model(str(output / "result"))
    if control is not None:
        set_seed(options["seed"])
        plain = trainer_of(control, options, train, held_out, output / "control", adapt=True)
        measured["dense, trained the same way"] = trained(plain, output / "control")

    (output / "results.json").write_text(json.dumps(measured, indent=1))
    print("| model | held-out loss |\n|---|---|")
    for name, loss in measured.items():
        print(f"| {name} | {loss:.4f} |")
    gap = measured["uoe, fitted gates"] - measured["dense"]
    if gap > 0:
        closed = (measured["uoe, fitted gates"] - measured["uoe, trained"]) / gap
        print(f"fitted gates cost {gap:.3f}; training brought back {closed:.0%} of it")


if __name__ == "__main__":
    main()
