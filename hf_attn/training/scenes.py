"""Pictures of rectangles and discs on noise with their segments, and the targets of OneFormer's three tasks.

Everything follows from seeds: a run that is interrupted goes on with the pictures and tasks it would have had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn.checks import require_int, require_one_of

TASKS = ("semantic", "instance", "panoptic")
CLASSES = ("noise", "rectangle", "disc")
# Class numbers whose segments are countable objects.
THINGS = (1, 2)


@dataclass(frozen=True)
class Scene:
    """A picture and its segments.

    image: `[3, H, W]`, about zero mean and unit variance; masks: bool `[n, H, W]`, disjoint, all pixels covered;
    classes: int64 `[n]`, of each mask.
    """

    image: Tensor
    masks: Tensor
    classes: Tensor

    @property
    def labels(self) -> Tensor:
        """int64 `[H, W]`, the class of every pixel; -1 where no mask is."""
        found = torch.full(self.masks.shape[1:], -1)
        for mask, number in zip(self.masks, self.classes, strict=True):
            found[mask] = number
        return found


def scenes(count: int, *, size: int = 64, seed: int = 0) -> list[Scene]:
    """`count` pictures of `size` x `size` pixels with two or three shapes; nearer ones hide what is behind."""
    require_int("count", count, 1)
    require_int("size", size, 16)
    return [_scene(size, torch.Generator().manual_seed(seed * 100_003 + number)) for number in range(count)]


def _scene(size: int, random: torch.Generator) -> Scene:
    image = 0.5 * torch.randn(3, size, size, generator=random)
    owner = torch.zeros(size, size, dtype=torch.int64)
    kinds = [0]
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for _ in range(2 + int(torch.randint(0, 2, (1,), generator=random))):
        kind = THINGS[int(torch.randint(0, len(THINGS), (1,), generator=random))]
        y, x = (torch.rand(2, generator=random) * 0.7 + 0.15) * size
        half_y, half_x = (torch.rand(2, generator=random) * 0.14 + 0.12) * size
        inside = (rows - y).abs().le(half_y) & (columns - x).abs().le(half_x)
        if kind == 2:
            inside = (rows - y) ** 2 + (columns - x) ** 2 <= half_y**2
        sign = 2.0 * torch.randint(0, 2, (3,), generator=random) - 1
        colour = sign * (0.9 + 0.9 * torch.rand(3, generator=random))
        image = torch.where(inside, colour[:, None, None] + 0.3 * image, image)
        owner[inside] = len(kinds)
        kinds.append(kind)
    kept = [number for number in range(len(kinds)) if bool((owner == number).any())]
    masks = torch.stack([owner == number for number in kept])
    return Scene(image, masks, torch.tensor([kinds[number] for number in kept]))


def task_targets(scene: Scene, task: str, things: tuple[int, ...] = THINGS) -> tuple[Tensor, Tensor]:
    """Masks fp32 `[m, H, W]` and classes `[m]` that a task asks for, derived from the segments.

    "semantic": one mask a class; "instance": one an object; "panoptic": one an object, and one for each other class.
    """
    require_one_of("task", task, TASKS)
    masks, classes = [], []
    for number in scene.classes.unique().tolist():
        own = scene.masks[scene.classes == number]
        countable = number in things
        if task == "instance" and not countable:
            continue
        merged = [own.any(0)] if task == "semantic" or not countable else list(own)
        masks += merged
        classes += [number] * len(merged)
    shape = scene.masks.shape[1:]
    stacked = torch.stack(masks).float() if masks else torch.zeros(0, *shape)
    return stacked, torch.tensor(classes, dtype=torch.int64)


def task_texts(classes: Tensor, task: str, names: tuple[str, ...], count: int) -> list[str]:
    """`count` sentences for the contrastive loss: one a mask, then the task's own (OneFormer, section 3.2).

    The article is right for "instance" only, as in the official code.
    """
    article = "an" if task == "instance" else "a"
    texts = [f"a photo with a {names[number]}" for number in classes.tolist()][:count]
    return texts + [f"{article} {task} photo"] * (count - len(texts))


def word_encoder(names: tuple[str, ...], length: int) -> tuple[Callable[[str], list[int]], int]:
    """A tokenizer of one id a word for models that start from nothing, and the size of its vocabulary.

    Ids are padded with 0 to `length`; the last id of a sentence is the largest of the vocabulary, which is how the text
    tower finds the end.
    """
    words = ["a", "an", "photo", "with", "the", "task", "is", *TASKS, *(w for name in names for w in name.split())]
    ids = {word: number for number, word in enumerate(dict.fromkeys(words), 1)}
    end = len(ids) + 1

    def encode(sentence: str) -> list[int]:
        found = [ids[word] for word in sentence.split()][: length - 1] + [end]
        return found + [0] * (length - len(found))

    return encode, end + 1


def class_map(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of every pixel, int64 `[B, H, W]`: softmax over classes times sigmoid of masks, summed over queries.

    class_logits: `[B, Q, C + 1]`; mask_logits: `[B, Q, h, w]`, resized to `size`.
    """
    masks = torch.nn.functional.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", class_logits.softmax(-1)[..., :-1], masks).argmax(1)


def mean_iou(found: Tensor, wanted: Tensor, classes: int) -> float:
    """Mean over the classes that occur of intersection over union; pixels with a negative label do not count."""
    real = wanted >= 0
    shares = []
    for number in range(classes):
        a, b = (found == number) & real, wanted == number
        if bool(b.any()):
            shares.append(float((a & b).sum() / (a | b).sum()))
    return sum(shares) / len(shares)
