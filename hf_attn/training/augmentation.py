"""Training augmentation of the vision papers: RandAugment on PIL images, random erasing on batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Magnitudes run to this.
LARGEST = 10.0
# What comes in from outside an image: the mean colour of ImageNet.
OUTSIDE = (124, 116, 104)


class RandAugment:
    """Some random changes of a PIL image (RandAugment, arXiv 1909.13719), all stronger with the magnitude.

    The choice among 15 operations, each then done with probability 0.5 and a magnitude drawn around the given one,
    and their ranges are those of the recipes that BiFormer, EMOv2, PATNet and OverLoCK name ("m9", "m5", "m7").

    Args:
        magnitude: 0 .. 10; 0 changes nothing.
        operations: drawn for an image, with repeats.
        deviation: of the normal distribution of magnitudes.

    Raises ValueError for values out of range.
    """

    def __init__(self, magnitude: float, *, operations: int = 2, deviation: float = 0.5) -> None:
        if not 0 <= magnitude <= LARGEST:
            raise ValueError(f"magnitude must be in [0, {LARGEST:.0f}], got {magnitude}")
        if operations < 1 or deviation < 0:
            raise ValueError(f"operations must be >= 1 and deviation >= 0, got {operations} and {deviation}")
        self.magnitude, self.operations, self.deviation = magnitude, operations, deviation

    def __call__(self, image: Any) -> Any:
        """An RGB image of the same size; draws from torch's generator."""
        if not self.magnitude:
            return image
        names = list(OPERATIONS)
        for choice in torch.randint(len(names), (self.operations,)).tolist():
            if _uniform() < 0.5:
                continue
            magnitude = self.magnitude + self.deviation * float(torch.randn(()))
            image = OPERATIONS[names[choice]](image, min(max(magnitude, 0.0), LARGEST) / LARGEST)
        return image


def random_erasing(
    pixels: Tensor,
    probability: float,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: float = 0.3,
) -> Tensor:
    """A box of some images becomes normal noise (random erasing, arXiv 1708.04896); images are normalised already.

    Args:
        pixels: `[B, C, H, W]`.
        probability: of every image, in [0, 1]; 0 returns the images themselves.
        area: smallest and largest share of the image.
        ratio: height to width lies between this and its inverse, in (0, 1].

    Returns a new tensor. Raises ValueError for values out of range.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    if not (0 < area[0] <= area[1] <= 1 and 0 < ratio <= 1):
        raise ValueError(f"area must be 0 < smallest <= largest <= 1 and ratio in (0, 1], got {area} and {ratio}")
    if not probability:
        return pixels
    pixels = pixels.clone()
    height, width = pixels.shape[2:]
    for image in pixels:
        if _uniform() >= probability:
            continue
        for _ in range(10):  # boxes that do not fit are drawn again
            size = (area[0] + _uniform() * (area[1] - area[0])) * height * width
            shape = math.exp((2 * _uniform() - 1) * math.log(ratio))
            high, wide = round(math.sqrt(size * shape)), round(math.sqrt(size / shape))
            if 0 < high < height and 0 < wide < width:
                top, left = (int(torch.randint(room + 1, ())) for room in (height - high, width - wide))
                image[:, top : top + high, left : left + wide].normal_()
                break
    return pixels


def _uniform() -> float:
    return float(torch.rand(()))


def _either(amount: float) -> float:
    """The amount with a random sign."""
    return amount if _uniform() < 0.5 else -amount


def _affine(image: Any, row: tuple[float, float, float], column: tuple[float, float, float]) -> Any:
    from PIL import Image

    return image.transform(
        image.size, Image.Transform.AFFINE, (*row, *column), Image.Resampling.BILINEAR, fillcolor=OUTSIDE
    )


def _rotate(image: Any, level: float) -> Any:
    from PIL import Image

    return image.rotate(_either(30 * level), Image.Resampling.BILINEAR, fillcolor=OUTSIDE)


def _posterize(image: Any, level: float) -> Any:
    from PIL import ImageOps

    return ImageOps.posterize(image, max(4 - int(4 * level), 1))


def _solarize(image: Any, level: float) -> Any:
    from PIL import ImageOps

    return ImageOps.solarize(image, 256 - min(256, int(256 * level)))


def _solarize_add(image: Any, level: float) -> Any:
    amount = min(128, int(110 * level))
    return image.point([min(255, value + amount) if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: str) -> Callable[[Any, float], Any]:
    """Less or more of a property; 1 leaves an image as it is."""

    def change(image: Any, level: float) -> Any:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, kind)(image).enhance(max(0.1, 1 + _either(0.9 * level)))

    return change


def _plain(kind: str) -> Callable[[Any, float], Any]:
    """Operations without a magnitude."""

    def change(image: Any, level: float) -> Any:
        from PIL import ImageOps

        return getattr(ImageOps, kind)(image)

    return change


# Each takes an RGB image and a level in 0 .. 1.
OPERATIONS: dict[str, Callable[[Any, float], Any]] = {
    "auto contrast": _plain("autocontrast"),
    "equalize": _plain("equalize"),
    "invert": _plain("invert"),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize add": _solarize_add,
    "color": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "brightness": _enhance("Brightness"),
    "sharpness": _enhance("Sharpness"),
    "shear x": lambda image, level: _affine(image, (1, _either(0.3 * level), 0), (0, 1, 0)),
    "shear y": lambda image, level: _affine(image, (1, 0, 0), (_either(0.3 * level), 1, 0)),
    "move x": lambda image, level: _affine(image, (1, 0, _either(0.45 * level) * image.width), (0, 1, 0)),
    "move y": lambda image, level: _affine(image, (1, 0, 0), (0, 1, _either(0.45 * level) * image.height)),
}
