"""Classify an image with a vision backbone of hf-attn, by a pipeline that needs PIL only.

python examples/classify_image.py --image photo.jpg                               # BiFormer-T with random weights
python examples/classify_image.py --image photo.jpg --weights biformer_tiny.pth   # official weights, renamed
python examples/classify_image.py --image photo.jpg --model FOLDER                # e.g. saved by the recipe
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

import hf_attn  # noqa: F401  (registers the backbones)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True)
    parser.add_argument("--model", help="a saved model with its image processor")
    parser.add_argument("--family", default="biformer", help="without --model: model_type of a backbone")
    parser.add_argument("--preset", default="tiny", help="without --model: a published variant of it")
    parser.add_argument("--weights", help="without --model: its official weights (.pth or .safetensors)")
    parser.add_argument("--top", type=int, default=5)
    args = parser.parse_args()
    if args.model:
        model = AutoModelForImageClassification.from_pretrained(args.model)
        processor = AutoImageProcessor.from_pretrained(args.model)
    else:
        config = type(AutoConfig.for_model(args.family)).preset(args.preset, num_labels=1000)
        model, processor = AutoModelForImageClassification.from_config(config), config.image_processor()
    if args.weights:
        safe = args.weights.endswith(".safetensors")
        state = load_file(args.weights) if safe else torch.load(args.weights, weights_only=True, map_location="cpu")
        model.load_official_weights(state)
    # Folds what inference can do without; the logits stay the same.
    model.eval().reparameterize()
    classify = pipeline("image-classification", model=model, image_processor=processor)
    for found in classify(args.image, top_k=args.top):
        print(f"{found['score']:7.2%}  {found['label']}")


if __name__ == "__main__":
    main()
