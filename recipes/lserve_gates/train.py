"""Train one gate a KV head by distillation, to tell retrieval heads from streaming heads (DuoAttention's recipe).

    accelerate launch recipes/lserve_gates/train.py --output gates            # one or several processes
    python recipes/lserve_gates/train.py --output gates --smoke               # seconds, a tiny random model
    python recipes/lserve_gates/train.py --output gates steps=2000 dtype=bfloat16

Killed runs go on from their last checkpoint when the same command is given again. All options: config.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

import hf_attn
from hf_attn.analysis.head_classes import HeadCalibration
from hf_attn.analysis.head_files import load_heads, save_head_folder
from hf_attn.analysis.texts import read_texts
from hf_attn.bench.models import SMOLLM2
from hf_attn.bench.recipe_models import RANDOM, base_with_tokenizer
from hf_attn.training.head_gates import GateTrainer, TwoWayAttention
from hf_attn.training.passkeys import PasskeyText

HERE = Path(__file__).parent
SMOKE = {
    "model": RANDOM, "context_min": 320, "context_max": 384, "context_steps": 3, "keys": 1, "words": 2, "sink": 8,
    "local": 32, "steps": 6, "save_every": 1, "log_every": 1, "eval_rows": 2, "eval_calibration_tokens": 320,
}  # fmt: skip
SMOKE_SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
# May change between a checkpoint and the run that goes on from it.
FREE = ("save_every", "log_every", "eval_rows", "eval_draws", "eval_calibration_tokens", "static_sparsity")


@dataclass
class Settings:
    """The options of config.yaml, which explains them."""

    model: str | None
    dtype: str
    text: list[str]
    start: str | None
    sink: int
    local: int
    context_min: int
    context_max: int
    context_steps: int
    keys: int
    words: int
    depths: list[float]
    steps: int
    batch_size: int
    learning_rate: float
    regularisation: float
    seed: int
    gradient_checkpointing: bool
    shard: bool
    static_sparsity: float
    eval_rows: int
    eval_draws: int
    eval_calibration_tokens: int
    save_every: int
    log_every: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Train gates of retrieval and streaming heads.")
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="YAML file with every option")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and the result")
    parser.add_argument("--smoke", action="store_true", help="seconds, a tiny random model unless one is named")
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="options that win over the file")
    arguments = parser.parse_args()
    settings = read_settings(arguments.config, SMOKE if arguments.smoke else {}, arguments.options)
    if (arguments.output / "heads").exists():
        raise SystemExit(f"{arguments.output / 'heads'} exists already: the run is finished; choose another --output")
    arguments.output.mkdir(parents=True, exist_ok=True)

    accelerator = Accelerator()
    torch.manual_seed(settings.seed)
    model, tokenizer = base_with_tokenizer(settings.model, SMOKE_SIZES, dtype=settings.dtype)
    model.eval()
    data = passkeys(settings, tokenizer)
    trainer = prepare(settings, model, accelerator)
    checkpoint = arguments.output / "checkpoint.safetensors"
    resume(trainer, checkpoint, settings, accelerator)
    while trainer.done < settings.steps:
        rows = training_rows(settings, data, trainer.done, accelerator.process_index, accelerator.num_processes)
        step = trainer.done
        figures = trainer.step(*(t.to(accelerator.device) for t in rows), reduce=average(accelerator))
        if accelerator.is_main_process and (trainer.done % settings.save_every == 0 or trainer.done == settings.steps):
            save(trainer, checkpoint, settings)
        if trainer.done % settings.log_every == 0 or step == 0:
            accelerator.print(f"step {trainer.done}/{settings.steps} " + json.dumps(figures), flush=True)
    finish(trainer, model, tokenizer, data, settings, arguments.output, accelerator)


def read_settings(file: Path, smoke: dict[str, Any], pairs: list[str]) -> Settings:
    """The file's options, then those of the smoke run, then NAME=VALUE pairs; unknown or missing names end the run."""
    values = {**yaml.safe_load(file.read_text()), **smoke}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SystemExit(f"options are NAME=VALUE, got {pair!r}; example: steps=100")
        values[name] = yaml.safe_load(value)
    known = {f.name for f in fields(Settings)}
    if wrong := sorted(values.keys() ^ known):
        raise SystemExit(f"unknown or missing options: {', '.join(wrong)}; {HERE / 'config.yaml'} lists them")
    return Settings(**values)


def passkeys(settings: Settings, tokenizer: Any) -> PasskeyText:
    """Rows of passkeys in real text."""
    text = "\n\n".join(read_texts(settings.text))
    filler = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return PasskeyText(tokenizer, filler, settings.keys, settings.words, tuple(settings.depths))


def prepare(settings: Settings, model: Any, accelerator: Accelerator) -> GateTrainer:
    """The frozen model with two-way attention, and the trainer of its gates."""
    text_config = model.config.get_text_config()
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    gates = torch.ones(text_config.num_hidden_layers, heads)
    if settings.start is not None:
        found = load_heads(settings.start).gates
        if found.shape != gates.shape:
            raise SystemExit(
                f"start={settings.start} has gates {tuple(found.shape)}, this model needs {tuple(gates.shape)} "
                "([layers, KV heads]); name the folder of a run with the same model"
            )
        gates = found.float()
    gates = gates.to(accelerator.device)
    attention = TwoWayAttention(gates, settings.sink, settings.local)
    hf_attn.register_mechanism(attention.mechanism("gate_training"))
    hf_attn.apply(model, "gate_training")
    body = model.base_model.to(accelerator.device)
    if settings.gradient_checkpointing:
        # Checkpointing is active in training mode only.
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.shard:
        shard(body, accelerator)
    options = {"learning_rate": settings.learning_rate, "regularisation": settings.regularisation}
    return GateTrainer(body, attention, steps=settings.steps, **options)


def shard(body: torch.nn.Module, accelerator: Accelerator) -> None:
    """FSDP2 over the layers of the frozen model; the gates are a few hundred numbers and stay whole everywhere."""
    from torch.distributed.fsdp import fully_shard

    if accelerator.num_processes == 1:
        raise SystemExit("shard: true needs several processes; start with accelerate launch --num_processes N")
    for layer in body.layers:
        fully_shard(layer)
    fully_shard(body)


def average(accelerator: Accelerator):
    """Mean over processes."""
    return lambda tensor: accelerator.reduce(tensor, reduction="mean")


def training_rows(
    settings: Settings, data: PasskeyText, step: int, process: int, processes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one step and process: ids and labelled places, `[batch_size, length]`, a function of seed and numbers."""
    lengths = torch.linspace(settings.context_min, settings.context_max, settings.context_steps).long()
    # One length for all processes, so that none waits for another.
    drawn = torch.randint(len(lengths), (), generator=generator(settings.seed, step, 0))
    first = 1 + process * settings.batch_size
    numbers = range(first, first + settings.batch_size)
    rows = [data.row(int(lengths[drawn]), generator(settings.seed, step, number)) for number in numbers]
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def generator(seed: int, step: int, number: int) -> torch.Generator:
    """A generator of its own for every row; step -1 is the held-out data."""
    return torch.Generator().manual_seed((seed << 48) + ((step + 1) << 16) + number)


def save(trainer: GateTrainer, file: Path, settings: Settings) -> None:
    """Write the checkpoint beside the old one and put it in its place at once."""
    partial = file.with_suffix(".partial")
    save_file(trainer.state(), partial, metadata={"settings": fixed(settings)})
    with partial.open("rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(partial, file)


def resume(trainer: GateTrainer, file: Path, settings: Settings, accelerator: Accelerator) -> None:
    """Go on from the checkpoint when there is one; one of other settings ends the run."""
    if not file.exists():
        return
    with safe_open(file, framework="pt") as stored:
        if stored.metadata()["settings"] != fixed(settings):
            raise SystemExit(
                f"{file} was made with other settings: {stored.metadata()['settings']}; give the same options, or "
                "another --output"
            )
        trainer.load_state({name: stored.get_tensor(name) for name in stored.keys()})
    accelerator.print(f"going on after step {trainer.done}", flush=True)


def fixed(settings: Settings) -> str:
    """The settings that a run and its continuation must share."""
    return json.dumps({name: value for name, value in asdict(settings).items() if name not in FREE})


def finish(trainer, model, tokenizer, data, settings: Settings, output: Path, accelerator: Accelerator) -> None:
    """Compare on held-out rows, then write the folder for the Hub; every process takes part in the comparison."""
    found = HeadCalibration(
        gates=trainer.final_gates,
        kv_scales=None,
        method="gates",
        sink=settings.sink,
        local=settings.local,
        tokens=settings.steps * settings.batch_size * accelerator.num_processes * settings.context_max,
    )
    if settings.eval_rows:
        losses = compare(trainer, model, tokenizer, data, settings, found.gates, accelerator)
        accelerator.print("held-out distillation loss " + json.dumps(losses), flush=True)
        if accelerator.is_main_process:
            (output / "comparison.json").write_text(json.dumps(losses, indent=1) + "\n")
    hf_attn.remove(model)
    hf_attn.unregister_mechanism("gate_training")
    if accelerator.is_main_process:
        base = SMOLLM2 if settings.model is None else settings.model
        about = {"base_model": base, "license": "other" if settings.model else "apache-2.0"}
        share = settings.static_sparsity
        save_head_folder(output / "heads", found, model.config, static_sparsity=share, **about)
        print(f"wrote {output / 'heads'}")


def compare(trainer, model, tokenizer, data, settings: Settings, gates, accelerator) -> dict[str, float]:
    """Mean distillation loss with streaming heads chosen by trained gates, by calibration and at random."""
    rows = [data.row(settings.context_max, generator(settings.seed, -1, n)) for n in range(settings.eval_rows)]
    batches = [(ids[None].to(accelerator.device), labelled[None].to(accelerator.device)) for ids, labelled in rows]
    candidates = {"trained": hf_attn.classify_heads(gates, settings.static_sparsity)}
    for draw in range(settings.eval_draws):
        noise = torch.rand(gates.shape, generator=generator(settings.seed, -1, 1000 + draw))
        candidates[f"random {draw}"] = hf_attn.classify_heads(noise, settings.static_sparsity)
    if not settings.shard:
        measured = hf_attn.calibrate(
            model,
            "lserve",
            tokenizer=tokenizer,
            texts=read_texts(settings.text),
            sink=settings.sink,
            local=settings.local,
            tokens=settings.eval_calibration_tokens,
        )
        candidates["calibrated"] = hf_attn.classify_heads(measured.gates, settings.static_sparsity)
    losses = trainer.evaluate(batches, candidates)
    draws = [losses.pop(f"random {draw}") for draw in range(settings.eval_draws)]
    return {**losses, "random mean": sum(draws) / len(draws), "random lowest": min(draws)}


if __name__ == "__main__":
    main()
