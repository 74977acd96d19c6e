"""Videos of bright shapes that move over a dark background, and a tiny Wan model that learns them in minutes.

No VAE and no text encoder: pixels are the latents, and a caption of two words has fixed embeddings. Everything is made
from seeds, so that a run that is interrupted goes on with the numbers it would have had.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hf_attn.checks import require_int

SHAPES = ("square", "disc", "cross", "ring")
COLOURS = {"red": (1.0, -0.4, -0.6), "green": (-0.5, 0.9, -0.5), "blue": (-0.5, 0.0, 1.0), "yellow": (1.0, 0.9, -0.6)}
CHANNELS = 3
# 1000 training noise levels, as the pipelines of flow-matching models count them.
_LEVELS = 1000
_HELD_OUT_SEED = 1 << 40


def moving_shapes(
    count: int, *, frames: int = 8, height: int = 16, width: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """`count` videos with two shapes each, of the same kind and colour, that bounce off the borders.

    Args:
        frames, height, width: size in latent pixels, >= 1.
        seed: the same numbers give the same videos on every machine.

    Returns:
        videos float32 `[count, 3, frames, height, width]` in -1 to 1, and captions int64 `[count, 2]`: number of the
        kind in `SHAPES` and of the colour in `COLOURS`.
    """
    for name, value in (("count", count), ("frames", frames), ("height", height), ("width", width)):
        require_int(name, value, 1)
    generator = torch.Generator().manual_seed(seed)
    captions = torch.stack([torch.randint(len(x), (count,), generator=generator) for x in (SHAPES, COLOURS)], 1)
    size = torch.tensor([height, width], dtype=torch.float32)
    place = torch.rand(count, 2, 2, generator=generator) * size
    speed = (torch.rand(count, 2, 2, generator=generator) * 2 - 1) * size / 8
    radius = (0.12 + 0.1 * torch.rand(count, 2, generator=generator)) * size.amin()
    shade, slope = torch.rand(count, 2, generator=generator).mul(0.3).unbind(1)

    time = torch.arange(frames).view(frames, 1)
    path = place[:, :, None] + speed[:, :, None] * time  # [count, 2, frames, 2]
    path = (path % (2 * size) - size).abs()  # a triangle wave: the shape bounces
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    dy = rows[:, None] - path[..., 0, None, None]
    dx = columns - path[..., 1, None, None]  # [count, 2, frames, height, width]
    inside = (0.5 - _distance(dy, dx, radius[..., None, None, None], captions[:, 0])).clamp(0, 1).amax(1)

    ramp = (rows / height)[:, None] * slope.view(-1, 1, 1) + (columns / width) * shade.view(-1, 1, 1)
    background = (ramp - 0.9)[:, None, None]
    colour = torch.tensor(list(COLOURS.values()))[captions[:, 1]].view(count, CHANNELS, 1, 1, 1)
    return background + (colour - background) * inside[:, None], captions


def _distance(dy: Tensor, dx: Tensor, radius: Tensor, kind: Tensor) -> Tensor:
    """Signed distance to the border of the shape, in pixels, `[count, 2, frames, height, width]`."""
    square = torch.maximum(dy.abs(), dx.abs()) - radius
    disc = (dy.square() + dx.square()).sqrt() - radius
    cross = torch.maximum(square, torch.minimum(dy.abs(), dx.abs()) - radius / 3)
    ring = (disc + radius / 4).abs() - radius / 4
    return torch.stack([square, disc, cross, ring])[kind, torch.arange(len(kind))]


def caption_embeds(captions: Tensor, width: int) -> Tensor:
    """Text embeddings `[count, 2, width]` of captions `[count, 2]`: fixed random vectors, one a word."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randn(len(SHAPES) + len(COLOURS), width, generator=generator)
    return words[captions + torch.tensor([0, len(SHAPES)])]


def tiny_wan(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """An untrained Wan of 6 layers, 4 heads x 24, whose tokens are 1 x 2 x 2 pixels; `changes`: config fields."""
    fields = {
        "patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 24, "in_channels": CHANNELS,
        "out_channels": CHANNELS, "text_dim": 32, "freq_dim": 64, "ffn_dim": 256, "num_layers": 6,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(**{**fields, **changes})


def flow_loss(model: nn.Module, videos: Tensor, embeds: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Rectified flow: the squared error of the velocity `noise - video` at `(1 - sigma) video + sigma noise`.

    Args:
        videos, noise: `[B, 3, F, H, W]`; embeds `[B, 2, width]`; sigma `[B]` in 0 to 1.
    """
    mixed = torch.lerp(videos, noise, sigma.view(-1, 1, 1, 1, 1))
    (velocity,) = model(mixed, timestep=sigma * _LEVELS, encoder_hidden_states=embeds, return_dict=False)
    return mse_loss(velocity, noise - videos)


def batch(count: int, seed: int, size: dict[str, int], text_width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Videos, embeddings, noise and noise levels of one step; levels lean to the middle, as in training of Wan."""
    videos, captions = moving_shapes(count, seed=seed, **size)
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(videos.shape, generator=generator)
    sigma = torch.randn(count, generator=generator).sigmoid()
    return videos, caption_embeds(captions, text_width), noise, sigma


@torch.no_grad()
def held_out_loss(model: nn.Module, *, count: int = 32, size: dict[str, int] | None = None) -> float:
    """The loss on `count` videos that training never sees, the same ones and the same noise for every model."""
    model.eval()
    losses = []
    for first in range(0, count, 8):
        videos, embeds, noise, _ = batch(8, _HELD_OUT_SEED + first, size or {}, model.config.text_dim)
        for level in (0.15, 0.4, 0.65, 0.9):
            losses.append(float(flow_loss(model, videos, embeds, noise, torch.full((8,), level))))
    return sum(losses) / len(losses)


def train(
    model: nn.Module,
    *,
    steps: int,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    warmup: int = 20,
    seed: int = 0,
    size: dict[str, int] | None = None,
    folder: Path | None = None,
    save_every: int = 100,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train by AdamW with a cosine schedule; returns the loss of every step.

    Args:
        model: a Wan transformer, with or without a mechanism applied; its trainable parameters are trained.
        steps: optimizer steps, >= 1; step s draws its batch from `seed` and s alone.
        warmup: steps over which the learning rate rises.
        size: `frames`, `height`, `width` of `moving_shapes`.
        folder: where a checkpoint is written every `save_every` steps and at the end, and read if there is one.
        report: called with the number and the loss of every step.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("save_every", save_every)):
        require_int(name, value, 1)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    losses = _resume(folder, parameters, optimizer)
    for step in range(len(losses), steps):
        optimizer.param_groups[0]["lr"] = learning_rate * _rate(step, warmup, steps)
        loss = flow_loss(model, *batch(batch_size, seed * 1_000_003 + 2 * step, size or {}, model.config.text_dim))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        report(step, losses[-1])
        if folder is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
            _save(folder, parameters, optimizer, losses)
    model.eval()
    return losses


def _rate(step: int, warmup: int, steps: int) -> float:
    """Share of the learning rate: a linear rise, then half a cosine down to a twentieth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def _save(folder: Path, parameters: list[Tensor], optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    """One file, put in place at once: an interrupted write leaves the previous checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for number, parameter in enumerate(parameters):
        tensors[f"parameter.{number}"] = parameter.detach()
        tensors.update({f"{key}.{number}": value for key, value in optimizer.state[parameter].items()})
    save_file(tensors, folder / "checkpoint.part")
    (folder / "checkpoint.part").replace(folder / "checkpoint.safetensors")


def _resume(folder: Path | None, parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
    """Losses so far; weights and moments as they were."""
    if folder is None or not (folder / "checkpoint.safetensors").is_file():
        return []
    tensors = load_file(folder / "checkpoint.safetensors")
    for number, parameter in enumerate(parameters):
        with torch.no_grad():
            parameter.copy_(tensors[f"parameter.{number}"])
        optimizer.state[parameter] = {key: tensors[f"{key}.{number}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return tensors["losses"].tolist()


def trained_wan(folder: str | Path, *, steps: int = 1000, seed: int = 0, **options: Any) -> WanTransformer3DModel:
    """The tiny Wan trained with dense attention; read from `folder` when it has been trained there before.

    The first call takes minutes; one that was interrupted goes on. `options` are those of `train`.
    """
    folder = Path(folder)
    facts = {"steps": steps, "seed": seed, **{key: value for key, value in options.items() if key != "report"}}
    done = folder / "trained.json"
    if done.is_file():
        if json.loads(done.read_text()) != facts:
            raise ValueError(f"{folder} holds a model trained with {done.read_text()}, not {facts}; use another folder")
        return WanTransformer3DModel.from_pretrained(folder / "transformer").eval()
    model = tiny_wan(seed)
    train(model, steps=steps, seed=seed, folder=folder, **options)
    model.save_pretrained(folder / "transformer")
    done.write_text(json.dumps(facts))
    return model


def shapes_pipeline(model: WanTransformer3DModel) -> WanPipeline:
    """A WanPipeline without VAE and text encoder around the model; see `generate`."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=_LEVELS, shift=1.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: WanPipeline, captions: Tensor, *, seed: int, steps: int = 20, size: dict[str, int] | None = None
) -> Tensor:
    """Videos `[count, 3, F, H, W]`, about -1 to 1, for captions `[count, 2]`, by the pipeline without guidance."""
    size = {"frames": 8, "height": 16, "width": 16, **(size or {})}
    temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    return pipe(
        prompt_embeds=caption_embeds(captions, pipe.transformer.config.text_dim),
        height=size["height"] * spatial,
        width=size["width"] * spatial,
        num_frames=(size["frames"] - 1) * temporal + 1,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames


def psnr(video: Tensor, wanted: Tensor) -> float:
    """Peak signal to noise ratio in dB of values in -1 to 1; inf for equal ones."""
    error = mse_loss(video.clamp(-1, 1).double(), wanted.clamp(-1, 1).double()).item()
    return 10 * math.log10(4.0 / error) if error else math.inf
