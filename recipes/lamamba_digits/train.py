"""Train a small LaMamba-Diff on scikit-learn's handwritten digits, in pixel space, and judge what it draws.

python recipes/lamamba_digits/train.py                       # CPU, 15 minutes
python recipes/lamamba_digits/train.py --smoke               # seconds

An interrupted run goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from torch import Tensor

from hf_attn import LaMambaDiffPipeline, LaMambaDiffTransformer2DModel
from hf_attn.training.denoising import train_denoiser
from hf_attn.training.digits import CLASSES, SIDE, load_digits, quality, train_judge

HERE = Path(__file__).parent
# Sizes that show within seconds that everything runs and the loss falls.
SMOKE = {
    "model": {"base_channels": 8, "num_heads": 2, "depths": [1, 0, 0, 0], "bottleneck_depth": 0},
    "training": {"steps": 20, "batch_size": 16, "warmup": 2, "save_every": 10},
    "sampling": {"count": 20, "batch_size": 20, "steps": 3},
    "judge": {"epochs": 1},
}


def train(options: dict[str, Any], output: Path) -> LaMambaDiffPipeline:
    """The trained pipeline; read from `output` when it is there."""
    if (output / "pipeline" / "model_index.json").is_file():
        return LaMambaDiffPipeline.from_pretrained(output / "pipeline")
    torch.manual_seed(options["seed"])
    model = LaMambaDiffTransformer2DModel(**options["model"])
    scheduler = DDPMScheduler(**options["scheduler"])
    digits = load_digits()

    def report(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)

    losses = train_denoiser(
        model, scheduler, digits.images, digits.labels,
        **options["training"], seed=options["seed"], folder=output, report=report,
    )  # fmt: skip
    (output / "losses.json").write_text(json.dumps(losses))
    pipe = LaMambaDiffPipeline(
        transformer=model,
        vae=None,
        scheduler=DDIMScheduler.from_config(scheduler.config, clip_sample=True),
        id2label={number: str(number) for number in range(CLASSES)},
    )
    pipe.save_pretrained(output / "pipeline")
    return pipe


def draw(pipe: LaMambaDiffPipeline, options: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    """Images `[count, 1, 8, 8]` in -1 to 1, none of them chosen, and the classes that were asked for."""
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(options["count"]) % CLASSES
    generator = torch.Generator().manual_seed(seed)
    parts = [
        pipe(
            part.tolist(),
            guidance_scale=options["guidance_scale"],
            num_inference_steps=options["steps"],
            generator=generator,
            output_type="pt",
        ).images
        for part in labels.split(options["batch_size"])
    ]
    return torch.cat(parts) * 2 - 1, labels


def grid(images: Tensor, file: Path, rows: int = 10, scale: int = 4) -> None:
    """The first images as a picture, ten in a row: one column a class."""
    count = min(rows, len(images) // CLASSES)
    tiles = (images[: count * CLASSES, 0] / 2 + 0.5).clamp(0, 1).view(count, CLASSES, SIDE, SIDE)
    pixels = torch.zeros(count, CLASSES, SIDE + 2, SIDE + 2)
    pixels[..., 1:-1, 1:-1] = tiles
    pixels = pixels.permute(0, 2, 1, 3).reshape(count * (SIDE + 2), CLASSES * (SIDE + 2))
    picture = Image.fromarray((pixels * 255).round().byte().numpy())
    picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST).save(file, optimize=True)


def curve(losses: list[float], file: Path) -> None:
    """Training loss by step, single steps and their running mean; left out without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture of the loss: pip install matplotlib")
        return
    width = max(1, len(losses) // 50)
    mean = torch.tensor(losses).unfold(0, width, 1).mean(1)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, linewidth=0.4, color="lightgray")
    axes.plot(range(width - 1, len(losses)), mean)
    axes.set(xlabel="step", ylabel="error of the predicted noise", yscale="log")
    figure.savefig(file, dpi=90)


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
            options[key] = {**options[key], **value}
    if arguments.seed is not None:
        options["seed"] = arguments.seed
    output = arguments.output or Path(options["output_dir"] + ("-smoke" if arguments.smoke else ""))
    output.mkdir(parents=True, exist_ok=True)

    pipe = train(options, output)
    losses = json.loads((output / "losses.json").read_text())
    images, labels = draw(pipe, options["sampling"], options["seed"])
    digits = load_digits()
    measured = quality(images, labels, digits, train_judge(digits, **options["judge"]))
    tail = losses[-max(1, len(losses) // 20) :]
    measured |= {"loss_at_start": losses[0], "loss": sum(tail) / len(tail)}
    grid(images, output / "grid.png")
    curve(losses, output / "curve.png")
    (output / "results.json").write_text(json.dumps(measured, indent=1))
    print("| measure | value |\n|---|---|")
    for name, value in measured.items():
        print(f"| {name} | {value:.4f} |")


if __name__ == "__main__":
    main()
