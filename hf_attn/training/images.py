"""Image sets, augmentation and a Trainer for image classification: mixing, soft targets, averaged weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate, one_hot
from torch.utils.data import Dataset

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class TensorImages(Dataset):
    """Images in memory: `pixels` fp32 `[N, C, H, W]`, `labels` int64 `[N]`."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def digits(split: str, seed: int = 0, held_out: int = 360) -> tuple[TensorImages, TensorImages]:
    """scikit-learn's 1797 real handwritten digits, `[N, 1, 8, 8]` in 0 .. 1, for training and held out.

    Args:
        split: "random" holds out images drawn with `seed`; "tail" the last ones in file order, which other people
            wrote than the first: the harder test.
        held_out: images held out.

    Raises ImportError without scikit-learn, ValueError for other splits.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).float()[:, None] / 16
    labels = torch.from_numpy(bunch.target).long()
    if split == "random":
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    elif split == "tail":
        order = torch.arange(len(labels))
    else:
        raise ValueError(f"split must be 'random' or 'tail', got {split!r}")
    first, last = order[:-held_out], order[-held_out:]
    return TensorImages(pixels[first], labels[first]), TensorImages(pixels[last], labels[last])


SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def colored_shapes() -> tuple[TensorImages, TensorImages]:
    """The images of easy-VQA, `[N, 3, 64, 64]` in 0 .. 1: one shape in one of eight colours, anywhere, of any size.

    Labels number the pairs of `SHAPES` and `COLORS`, 24 classes. Of its own 4000 and 1000 images those are
    taken whose questions tell both: 3542 and 880. Raises ImportError without the package easy-vqa (or pillow).
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("the coloured shapes come with easy-vqa: pip install easy-vqa") from error
    train = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    test = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    return _labelled(*train), _labelled(*test)


def _labelled(questions: tuple[list[str], list[str], list[int]], paths: dict[int, str]) -> TensorImages:
    from PIL import Image

    known: dict[int, dict[str, str]] = {}
    for question, answer, image in zip(*questions, strict=True):
        of_image = known.setdefault(image, {})
        # "what is the blue shape?" tells both; "is there a circle?" with yes, or "is there not a circle?" with no, one.
        words = question.strip("?").split()
        denied = not {"no", "not"}.isdisjoint(words)
        told = words if answer not in ("yes", "no") or (answer == "yes") != denied else []
        for word in (*told, answer):
            if word in SHAPES:
                of_image["shape"] = word
            elif word in COLORS:
                of_image["color"] = word
    pixels, labels = [], []
    for image, facts in sorted(known.items()):
        if len(facts) == 2:
            with Image.open(paths[image]) as picture:
                data = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
                pixels.append(data.view(picture.height, picture.width, 3).permute(2, 0, 1))
            labels.append(SHAPES.index(facts["shape"]) * len(COLORS) + COLORS.index(facts["color"]))
    return TensorImages(torch.stack(pixels).float() / 255, torch.tensor(labels))


class ImageFolder(Dataset):
    """Images of a folder with one subfolder a class, read with PIL and given to a transformers image processor.

    Args:
        folder: holds `<class>/<image>`.
        processor: e.g. `config.image_processor()`.
        crop: share of an image's area that a random crop keeps at least, with random mirroring; None: whole images.
        change: applied to the crop, e.g. `hf_attn.training.augmentation.RandAugment(9)`.

    `classes` are the sorted names of the subfolders. Raises ValueError for a folder without images.
    """

    def __init__(self, folder: str | Path, processor: Any, *, crop: float | None = None, change: Any = None) -> None:
        self.processor, self.crop, self.change = processor, crop, change
        self.classes = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((Path(folder) / name).iterdir())
            if path.suffix.lower() in IMAGE_ENDINGS
        ]
        if not self.files:
            raise ValueError(f"{folder} has no images: it needs <class>/<image> with {', '.join(IMAGE_ENDINGS)}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image, ImageOps

        path, label = self.files[index]
        image = Image.open(path).convert("RGB")
        options = {}
        if self.crop is not None:
            side = self.processor.size["shortest_edge"]
            image = _random_crop(image, self.crop).resize((side, side), Image.Resampling.BICUBIC)
            image = ImageOps.mirror(image) if torch.rand(()) < 0.5 else image
            options = {"crop_pct": 1.0}
        image = self.change(image) if self.change is not None else image
        pixels = self.processor(image, return_tensors="pt", **options)["pixel_values"][0]
        return {"pixel_values": pixels, "labels": label}


def _random_crop(image: Any, smallest: float) -> Any:
    """A crop of random area (from `smallest` of the image to all) and random shape (3/4 to 4/3)."""
    width, height = image.size
    for _ in range(10):
        area = float(torch.empty(()).uniform_(smallest, 1)) * width * height
        ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = (int(torch.randint(0, room + 1, ())) for room in (width - wide, height - high))
            return image.crop((left, top, left + wide, top + high))
    return image


def nearest_neighbour(train: TensorImages, test: TensorImages) -> float:
    """Accuracy of copying the label of the nearest training image (Euclidean, raw pixels): the bar to beat."""
    nearest = torch.cdist(test.pixels.flatten(1), train.pixels.flatten(1)).argmin(1)
    return float((train.labels[nearest] == test.labels).float().mean())


def random_affine(pixels: Tensor, *, degrees: float = 0.0, shift: float = 0.0, zoom: float = 0.0) -> Tensor:
    """Every image turned, moved and scaled by amounts of its own; what comes in from outside is 0.

    Args:
        pixels: `[B, C, H, W]`.
        degrees: turns lie in -degrees .. degrees.
        shift: moves, in shares of the side, lie in -shift .. shift.
        zoom: scales lie in 1 - zoom .. 1 + zoom.
    """
    if not (degrees or shift or zoom):
        return pixels
    draws = torch.rand(4, len(pixels), device=pixels.device) * 2 - 1
    angle, factor = draws[0] * math.radians(degrees), 1 / (1 + draws[1] * zoom)
    rows = torch.stack([angle.cos() * factor, -angle.sin() * factor, 2 * shift * draws[2]], 1)
    columns = torch.stack([angle.sin() * factor, angle.cos() * factor, 2 * shift * draws[3]], 1)
    grid = affine_grid(torch.stack([rows, columns], 1).to(pixels.dtype), list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, align_corners=False)


def mix(pixels: Tensor, targets: Tensor, *, mixup: float = 0.0, cutmix: float = 0.0) -> tuple[Tensor, Tensor]:
    """Blend the batch with its reverse (mixup, arXiv 1710.09412) or paste a box of it (CutMix, arXiv 1905.04899).

    Args:
        pixels: `[B, C, H, W]`; targets: `[B, classes]`, summing to 1.
        mixup, cutmix: parameters of the Beta distributions; 0 switches one off, with both a coin decides per batch.
    """
    if not (mixup or cutmix):
        return pixels, targets
    use_cutmix = bool(cutmix) and (not mixup or bool(torch.rand(()) < 0.5))
    alpha = cutmix if use_cutmix else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    if use_cutmix:
        height, width = pixels.shape[2:]
        side = math.sqrt(1 - share)
        row, column = int(torch.randint(0, height, ())), int(torch.randint(0, width, ()))
        top, bottom = (min(max(round(row + sign * side * height / 2), 0), height) for sign in (-1, 1))
        left, right = (min(max(round(column + sign * side * width / 2), 0), width) for sign in (-1, 1))
        pasted = pixels.clone()
        pasted[:, :, top:bottom, left:right] = pixels.flip(0)[:, :, top:bottom, left:right]
        pixels, share = pasted, 1 - (bottom - top) * (right - left) / (height * width)
    else:
        pixels = share * pixels + (1 - share) * pixels.flip(0)
    return pixels, share * targets + (1 - share) * targets.flip(0)


def enlarge(pixels: Tensor, size: int, channels: int) -> Tensor:
    """`[B, C, h, w]` bilinearly to `[B, channels, size, size]`; one channel is repeated."""
    pixels = interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return pixels.expand(-1, channels, -1, -1)


def soft_loss(outputs: Any, targets: Tensor, smoothing: float = 0.0, aux_weight: float = 0.0) -> Tensor:
    """Cross entropy with targets `[B, classes]`, and `aux_weight` times that of `aux_logits` where a model has them."""
    loss = cross_entropy(outputs["logits"], targets, label_smoothing=smoothing)
    if aux_weight and outputs.get("aux_logits") is not None:
        loss = loss + aux_weight * cross_entropy(outputs["aux_logits"], targets, label_smoothing=smoothing)
    return loss


def as_targets(labels: Tensor, classes: int) -> Tensor:
    """Classes `[B]` as fp32 one-hot rows."""
    return one_hot(labels, classes).float()
