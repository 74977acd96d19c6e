"""Plug a vision backbone of hf-attn into a segmentation model of transformers, and take a training step.

python examples/segment_with_backbone.py                                   # UperNet on BiFormer-T
python examples/segment_with_backbone.py --family patnet --preset t0 --size 512 --classes 150
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoConfig, UperNetConfig, UperNetForSemanticSegmentation

import hf_attn  # noqa: F401  (registers the backbones)

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="biformer")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--classes", type=int, default=19)
    args = parser.parse_args()
    backbone = type(AutoConfig.for_model(args.family)).preset(args.preset, out_features=STAGES)
    # The second head reads stage3; the widths are the backbone's.
    config = UperNetConfig(
        backbone_config=backbone, auxiliary_in_channels=backbone.stage_channels[3], num_labels=args.classes
    )
    model = UperNetForSemanticSegmentation(config)
    # Official weights of the backbone: model.backbone.load_official_weights(state)
    images = torch.randn(2, 3, args.size, args.size)
    labels = torch.randint(0, args.classes, (2, args.size, args.size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, weight_decay=0.01)
    for step in range(2):
        outputs = model(images, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {outputs.loss.item():.3f}, logits {tuple(outputs.logits.shape)}")


if __name__ == "__main__":
    main()
