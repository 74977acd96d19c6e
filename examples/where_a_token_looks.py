"""Draw which parts of an image one position of a BiFormer reads.

python examples/where_a_token_looks.py --image photo.jpg --row 20 --column 30     # BiFormer-T with random weights
python examples/where_a_token_looks.py --image photo.jpg --model FOLDER --stage 3 --row 7 --column 7

The position is marked green; red is attention, mean over the heads. Regions that the router did not choose stay grey.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_attn.models.biformer import BiFormerConfig
from hf_attn.models.biformer.looking import attention_map

SIDE = 448


def picture(pixels: torch.Tensor, weights: torch.Tensor, row: int, column: int) -> Image.Image:
    """The image in grey, `[C, H, W]`, with weights `[rows, columns]` in red over it."""
    grey = pixels.mean(0)
    grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp_min(1e-6) * 200
    base = Image.fromarray(grey.byte().numpy(), "L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    strength = Image.fromarray((weights / weights.max() * 200).byte().numpy(), "L")
    strength = strength.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    out = Image.composite(Image.new("RGB", (SIDE, SIDE), "red"), base.convert("RGB"), strength)
    high, wide = SIDE / weights.shape[0], SIDE / weights.shape[1]
    box = (column * wide, row * high, (column + 1) * wide - 1, (row + 1) * high - 1)
    ImageDraw.Draw(out).rectangle(box, outline="lime", width=3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True)
    parser.add_argument("--model", help="a saved BiFormer with its image processor")
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--row", type=int, default=0, help="on the map of the stage: 56 x 56, 28, 14, 7 at 224 pixels")
    parser.add_argument("--column", type=int, default=0)
    parser.add_argument("--output", default="looking.png")
    args = parser.parse_args()
    if args.model:
        model = AutoModelForImageClassification.from_pretrained(args.model)
        processor = AutoImageProcessor.from_pretrained(args.model)
    else:
        config = BiFormerConfig.preset("tiny")
        model, processor = AutoModelForImageClassification.from_config(config), config.image_processor()
    pixels = processor(Image.open(args.image).convert("RGB"), return_tensors="pt")["pixel_values"]
    position = (args.row, args.column)
    weights = attention_map(model.eval(), pixels, stage=args.stage, block=args.block, position=position)[0]
    picture(pixels[0], weights, *position).save(args.output)
    read = int((weights > 0).sum())
    print(f"position {position} of stage {args.stage} reads {read} of {weights.numel()} positions; see {args.output}")


if __name__ == "__main__":
    main()
