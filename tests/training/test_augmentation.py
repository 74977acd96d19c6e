"""RandAugment and random erasing: ranges, what stays, what is refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageChops

from hf_attn.training.augmentation import OPERATIONS, OUTSIDE, RandAugment, random_erasing
from hf_attn.training.images import ImageFolder
from tests.models.vision_families import classifier


def picture(size: tuple[int, int] = (40, 30)) -> Image.Image:
    bands = [
        Image.linear_gradient("L").resize(size).rotate(angle).point(lambda v: 20 + v // 2) for angle in (0, 90, 180)
    ]
    return Image.merge("RGB", bands)


def values(image: Image.Image) -> list[tuple[int, ...]]:
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_changes_a_picture_and_keeps_its_size(name):
    torch.manual_seed(0)
    before = picture()
    after = OPERATIONS[name](before, 0.9)
    assert after.size == before.size and after.mode == "RGB"
    assert ImageChops.difference(before, after).getbbox() is not None
    assert values(before) == values(picture())


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"auto contrast", "equalize", "invert", "posterize"}))
def test_level_0_leaves_the_picture(name):
    assert values(OPERATIONS[name](picture(), 0.0)) == values(picture())


def test_operations_at_known_levels():
    torch.manual_seed(0)
    grey = Image.new("RGB", (20, 10), (100, 150, 201))
    assert values(OPERATIONS["invert"](grey, 0.5))[0] == (155, 105, 54)
    assert values(OPERATIONS["solarize"](grey, 0.5))[0] == (100, 105, 54)  # from 128 on
    assert values(OPERATIONS["solarize add"](grey, 1.0))[0] == (210, 150, 201)  # 110 more below 128
    assert values(OPERATIONS["posterize"](grey, 0.5))[0] == (64, 128, 192)  # two bits
    assert {values(OPERATIONS["brightness"](grey, 1.0))[0] for _ in range(20)} == {(10, 15, 20), (190, 255, 255)}
    moved = OPERATIONS["move x"](grey, 1.0)  # 9 of 20 columns come in from outside
    assert sum(value == OUTSIDE for value in values(moved)) == 90


def test_rand_augment():
    assert RandAugment(0)(grey := picture()) is grey
    torch.manual_seed(1)
    changed = [RandAugment(9)(picture()) for _ in range(60)]
    # Neither of two operations is done on a quarter of the images; contrast and the like may also change nothing.
    same = sum(values(image) == values(picture()) for image in changed)
    assert 8 <= same <= 30 and all(image.size == (40, 30) for image in changed)
    torch.manual_seed(1)
    assert [values(RandAugment(9)(picture())) for _ in range(60)] == [values(image) for image in changed]
    for options in ({"magnitude": 11}, {"magnitude": 9, "operations": 0}, {"magnitude": 9, "deviation": -1}):
        with pytest.raises(ValueError, match="must be"):
            RandAugment(**options)


def test_random_erasing():
    torch.manual_seed(0)
    pixels = torch.full((400, 3, 32, 24), 7.0)
    erased = random_erasing(pixels, 0.25)
    assert bool((pixels == 7).all())
    hit = (erased != 7).all(1)
    share = hit.flatten(1).float().mean(1)
    assert 70 <= int((share > 0).sum()) <= 130
    assert share[share > 0].min() > 0.01 and share.max() < 0.36
    for mask in hit[share > 0]:  # one box each
        rows, columns = mask.any(1), mask.any(0)
        assert bool((mask == rows[:, None] & columns).all())
    noise = erased[(erased != 7)]
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert random_erasing(pixels, 0.0) is pixels
    for options in ({"probability": 1.5}, {"probability": 0.5, "area": (0.5, 0.1)}, {"probability": 0.5, "ratio": 0}):
        with pytest.raises(ValueError, match="must be"):
            random_erasing(pixels, **options)


def test_folders_are_changed_before_they_are_normalised(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (40, 40), (10, 20, 30)).save(tmp_path / "a" / "1.png")
    processor = classifier("patnet").config.image_processor(size={"shortest_edge": 32})
    plain = ImageFolder(tmp_path, processor)[0]["pixel_values"]
    inverted = ImageFolder(tmp_path, processor, crop=1.0, change=lambda image: OPERATIONS["invert"](image, 1.0))[0]
    scale = torch.tensor(processor.image_std)[:, None, None]
    expected = torch.tensor([235, 215, 195])[:, None, None] / 255 / scale
    torch.testing.assert_close(inverted["pixel_values"] - plain, expected.expand(3, 32, 32), rtol=1e-4, atol=1e-4)
