"""Training of a class-conditional denoiser by noise prediction, with or without a learned variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hf_attn.checks import require_int


def denoising_loss(
    model: nn.Module, scheduler: DDPMScheduler, images: Tensor, labels: Tensor, noise: Tensor, times: Tensor
) -> Tensor:
    """Mean squared error of the predicted noise; with variance channels plus the variational term that trains them.

    The sum is that of improved DDPM (arXiv 2102.09672) as DiT uses it: the variance is learned in its range, and the
    variational term does not reach the noise prediction.

    Args:
        model: `(images, times, labels) -> .sample`, `[B, C or 2C, H, W]`.
        scheduler: its noise levels.
        images, noise: `[B, C, H, W]`; labels, times: int `[B]`.
    """
    noisy = scheduler.add_noise(images, noise, times)
    predicted = model(noisy, times, labels).sample
    channels = images.shape[1]
    loss = mse_loss(predicted[:, :channels], noise)
    if predicted.shape[1] == channels:
        return loss
    return loss + variational_term(scheduler, images, noisy, times, predicted).mean()


def variational_term(
    scheduler: DDPMScheduler, images: Tensor, noisy: Tensor, times: Tensor, predicted: Tensor
) -> Tensor:
    """KL divergence of the posterior of one step from the model's step, bits a value, `[B]`.

    predicted: `[B, 2C, H, W]`, noise (no gradient through it) and variance v in -1 to 1, which interpolates the log
    variance between the posterior's and beta. At t = 0 it is the negative log density of the images instead.
    """
    noise, v = predicted.chunk(2, 1)
    alphas = scheduler.alphas_cumprod.to(images.device, torch.float32)
    now = alphas[times]
    before = torch.where(times > 0, alphas[(times - 1).clamp(min=0)], 1.0)
    now, before = (t.view(-1, 1, 1, 1) for t in (now, before))
    beta = 1 - now / before
    # The posterior's variance is 0 at t = 0, where its logarithm is taken from t = 1.
    first = (1 - alphas[0]) / (1 - alphas[1]) * (1 - alphas[1] / alphas[0])
    shortest = torch.where(times.view(-1, 1, 1, 1) > 0, (1 - before) / (1 - now) * beta, first).log()
    log_variance = torch.lerp(shortest, beta.log().expand_as(shortest), (v + 1) / 2)

    def mean(clean: Tensor) -> Tensor:
        return (before.sqrt() * beta * clean + (now / before).sqrt() * (1 - before) * noisy) / (1 - now)

    guess = ((noisy - (1 - now).sqrt() * noise.detach()) / now.sqrt()).clamp(-1, 1)
    distance = (mean(images) - mean(guess)).square()
    divergence = log_variance - shortest + (shortest - log_variance).exp() + distance * (-log_variance).exp() - 1
    density = log_variance + math.log(2 * math.pi) + (images - mean(guess)).square() * (-log_variance).exp()
    terms = torch.where(times.view(-1, 1, 1, 1) > 0, divergence, density)
    return 0.5 * terms.flatten(1).mean(1) / math.log(2)


def train_denoiser(
    model: nn.Module,
    scheduler: DDPMScheduler,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: int = 100,
    ema: float = 0.999,
    seed: int = 0,
    folder: Path | None = None,
    save_every: int = 200,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train by AdamW with a linear rise and half a cosine; the model ends with the averaged weights.

    Args:
        images: `[N, C, H, W]` in about -1 to 1; labels int `[N]`.
        steps: optimizer steps, >= 1; step s draws images, noise and times from `seed` and s alone.
        ema: decay of the average of the weights, which starts faster; 0 keeps the last weights.
        folder: where a checkpoint is written every `save_every` steps and at the end, and read if there is one.
        report: called with the number and the loss of every step.

    Returns the loss of every step.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("save_every", save_every)):
        require_int(name, value, 1)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = [p.detach().clone() for p in parameters]
    losses = _resume(folder, parameters, average, optimizer)
    for step in range(len(losses), steps):
        optimizer.param_groups[0]["lr"] = learning_rate * _rate(step, warmup, steps)
        torch.manual_seed(seed * 1_000_003 + step)
        picked = torch.randint(len(images), (batch_size,))
        noise = torch.randn(batch_size, *images.shape[1:])
        times = torch.randint(scheduler.config.num_train_timesteps, (batch_size,))
        batch = [t.to(images.device) for t in (noise, times)]
        loss = denoising_loss(model, scheduler, images[picked], labels[picked], *batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(ema, (1 + step) / (10 + step)))
        losses.append(loss.item())
        report(step, losses[-1])
        if folder is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
            _save(folder, parameters, average, optimizer, losses)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    model.eval()
    return losses


def _rate(step: int, warmup: int, steps: int) -> float:
    """Share of the learning rate: a linear rise, then half a cosine down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def _save(
    folder: Path, parameters: list[Tensor], average: list[Tensor], optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    """One file, put in place at once: an interrupted write leaves the previous checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for number, (parameter, mean) in enumerate(zip(parameters, average, strict=True)):
        tensors |= {f"parameter.{number}": parameter.detach().contiguous(), f"average.{number}": mean.contiguous()}
        tensors.update({f"{key}.{number}": value.contiguous() for key, value in optimizer.state[parameter].items()})
    save_file(tensors, folder / "checkpoint.part")
    (folder / "checkpoint.part").replace(folder / "checkpoint.safetensors")


def _resume(
    folder: Path | None, parameters: list[Tensor], average: list[Tensor], optimizer: torch.optim.Optimizer
) -> list[float]:
    """Losses so far; weights, their average and moments as they were."""
    if folder is None or not (folder / "checkpoint.safetensors").is_file():
        return []
    tensors = load_file(folder / "checkpoint.safetensors")
    for number, (parameter, mean) in enumerate(zip(parameters, average, strict=True)):
        with torch.no_grad():
            parameter.copy_(tensors[f"parameter.{number}"])
            mean.copy_(tensors[f"average.{number}"])
        moments = {key: tensors[f"{key}.{number}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()}
    return tensors["losses"].tolist()
