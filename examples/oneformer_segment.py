"""Segment a photograph with OneFormer, by classes, objects or both, without natten, scipy or torchvision.

python examples/oneformer_segment.py --image photo.jpg --output segments.png                      # from the Hub
python examples/oneformer_segment.py --model oneformer_output/model --output segments.png         # a recipe's result

Without --image it is the photograph of a temple that scikit-learn ships. The file that is written shows the segments
over the photograph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, OneFormerProcessor

from hf_attn.models.oneformer import OneFormerAttnForUniversalSegmentation
from hf_attn.training.scenes import class_map, word_encoder


def photograph(path: Path | None) -> Image.Image:
    """The file, or scikit-learn's china.jpg."""
    if path is not None:
        return Image.open(path).convert("RGB")
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def prepare(args: argparse.Namespace, image: Image.Image, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels `[1, 3, H, W]` and the task sentence's ids `[1, task_seq_len]`."""
    sentence = f"the task is {args.task}"
    if (Path(args.model) / "preprocessor_config.json").is_file() or not Path(args.model).is_dir():
        inputs = OneFormerProcessor.from_pretrained(args.model)(image, [args.task], return_tensors="pt")
        return inputs["pixel_values"], inputs["task_inputs"]
    # A model of recipes/oneformer_finetune: one id a word.
    encode, _ = word_encoder(tuple(config.id2label.values()), config.task_seq_len)
    pixels = np.asarray(image.resize((args.size, args.size)), dtype=np.float32) / 127.5 - 1
    ids = torch.tensor([encode(sentence)], dtype=torch.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None], ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shi-labs/oneformer_ade20k_dinat_large", help="Hub id or folder")
    parser.add_argument("--image", type=Path, help="any picture; default: a photograph of scikit-learn's")
    parser.add_argument("--task", choices=("semantic", "instance", "panoptic"), default="semantic")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side, for models of the recipe")
    parser.add_argument("--output", type=Path, default=Path("segments.png"))
    args = parser.parse_args()

    config = AutoConfig.from_pretrained(args.model)
    model = OneFormerAttnForUniversalSegmentation.from_pretrained(args.model, is_training=False).eval()
    image = photograph(args.image)
    pixels, task = prepare(args, image, config)
    with torch.no_grad():
        out = model(pixels, task)
    classes = class_map(out.class_queries_logits, out.masks_queries_logits, (image.height, image.width))[0].numpy()

    colours = np.random.default_rng(0).integers(40, 255, (len(config.id2label), 3), dtype=np.uint8)
    shown = (0.5 * np.asarray(image) + 0.5 * colours[classes]).astype(np.uint8)
    Image.fromarray(shown).save(args.output)
    for number, count in zip(*np.unique(classes, return_counts=True), strict=True):
        print(f"{config.id2label[int(number)]:<24} {count / classes.size:6.1%}")
    print(f"{args.output}: {image.width} x {image.height}, {len(np.unique(classes))} classes")


if __name__ == "__main__":
    main()
