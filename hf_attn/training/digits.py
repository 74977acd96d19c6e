"""scikit-learn's handwritten digits of 8 x 8 pixels, a judge that reads them, and how good generated ones are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CLASSES = 10
SIDE = 8
_HELD_OUT = 360


class Digits(NamedTuple):
    """Images `[N, 1, 8, 8]` in -1 to 1 and labels int `[N]`, 1437 to train on and 360 held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_digits() -> Digits:
    """The digits of the UCI repository (1797 images, 17 grey levels) in one fixed split; nothing is downloaded."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'hf-attn[recipes]'") from error
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:_HELD_OUT], order[_HELD_OUT:]
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


class Judge(nn.Sequential):
    """A small convolutional classifier: `[B, 1, 8, 8]` -> `[B, 10]`."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, CLASSES),
        )  # fmt: skip


def train_judge(digits: Digits, *, epochs: int = 20, seed: int = 0) -> Judge:
    """A judge trained on the training images, frozen; its right answers on held-out digits are `accuracy`'s to tell."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-2)
        batches = [part for _ in range(epochs) for part in torch.randperm(len(digits.labels)).split(64)]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(batches))
        for part in batches:
            loss = cross_entropy(judge(digits.images[part]), digits.labels[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the judge reads as their label."""
    return float((judge(images).argmax(1) == labels).float().mean())


def nearest(images: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance of every image to the nearest of the others, in pixel values, `[N]`."""
    return torch.cdist(images.flatten(1).double(), others.flatten(1).double()).amin(1)


def quality(images: Tensor, labels: Tensor, digits: Digits, judge: Judge) -> dict[str, float]:
    """How good generated digits `[N, 1, 8, 8]` of the classes `labels` are.

    recognised: share that the judge reads as the class that was asked for. copying: median distance to the nearest
    training image over that of held-out digits; far below 1 would mean that training images are repeated.
    judge: right answers on held-out digits.
    """
    real = nearest(digits.held_out_images, digits.images).median()
    return {
        "judge": accuracy(judge, digits.held_out_images, digits.held_out_labels),
        "recognised": accuracy(judge, images, labels),
        "copying": float(nearest(images, digits.images).median() / real),
    }
