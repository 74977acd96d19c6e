"""A vision backbone of hf-attn under a segmentation model of transformers: train, save, segment through a pipeline.

python examples/segmentation_backbone.py                                      # EMOv2-1M under UperNet
python examples/segmentation_backbone.py --backbone overlock --preset xt
python examples/segmentation_backbone.py --backbone emov2 --checkpoint folder # backbone weights of a trained classifier

The data are scikit-learn's handwritten digits: every pixel of a stroke has the digit as its class, the rest is paper.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import AutoBackbone, AutoConfig, UperNetConfig, UperNetForSemanticSegmentation, pipeline
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

import hf_attn  # noqa: F401  (registers the backbones)
from hf_attn.training.images import digits

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backbone", default="emov2", help="model type: biformer, emov2, overlock or patnet")
parser.add_argument("--preset", default="1m", help="published variant of it")
parser.add_argument("--checkpoint", help="folder or Hub id of a classifier of that type; default: from scratch")
parser.add_argument("--size", type=int, default=64, help="side of the images, pixels; a multiple of 32")
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--output", default="segmenter", help="folder of the trained model")
arguments = parser.parse_args()
torch.manual_seed(0)

# Published EMOv2 starts every block at 1e-6, which needs the published 300 epochs.
FROM_SCRATCH = {"emov2": {"layer_scale_init_value": 1.0}}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
config_class = type(AutoConfig.for_model(arguments.backbone))
if arguments.checkpoint:
    backbone_config = config_class.from_pretrained(arguments.checkpoint, out_features=STAGES)
else:
    fields = FROM_SCRATCH.get(arguments.backbone, {})
    backbone_config = config_class.preset(arguments.preset, out_features=STAGES, **fields)

model = UperNetForSemanticSegmentation(
    UperNetConfig(
        backbone_config=backbone_config,
        hidden_size=64,
        use_auxiliary_head=False,
        id2label={0: "paper", **{1 + digit: f"digit {digit}" for digit in range(10)}},
    )
)
if arguments.checkpoint:
    backbone_class = AutoBackbone._model_mapping[config_class]
    model.backbone = backbone_class.from_pretrained(arguments.checkpoint, config=backbone_config)


def enlarged(pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits `[N, 1, 8, 8]` as colour images and class maps of the wanted size."""
    images = interpolate(pixels, (arguments.size,) * 2, mode="bilinear").expand(-1, 3, -1, -1)
    return (images - 0.5) / 0.5, torch.where(images[:, 0] > 0.5, labels[:, None, None] + 1, 0)


train, held_out = digits("random")
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=arguments.steps)
for step in range(arguments.steps):
    rows = torch.randint(len(train), (16,))
    images, masks = enlarged(train.pixels[rows], train.labels[rows])
    loss = model(images, labels=masks).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 20 == 0 or step == arguments.steps - 1:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)

model.eval()
images, masks = enlarged(held_out.pixels[:120], held_out.labels[:120])
with torch.no_grad():
    found = model(images).logits.argmax(1)
strokes = masks > 0
print(f"held out: {(found == masks).float().mean():.1%} of all pixels, {(found == masks)[strokes].float().mean():.1%}"
      " of those on strokes (always paper: "
      f"{(masks == 0).float().mean():.1%} and 0.0%)")  # fmt: skip

model.save_pretrained(arguments.output)
processor = SegformerImageProcessorPil(
    size={"height": arguments.size, "width": arguments.size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
)
processor.save_pretrained(arguments.output)
digit = Image.fromarray((held_out.pixels[0, 0] * 255).byte().numpy()).convert("RGB").resize((96, 96))
for part in pipeline("image-segmentation", arguments.output)(digit):
    print(f"a picture of a {int(held_out.labels[0])}: {part['label']}, {sum(part['mask'].histogram()[1:])} pixels")
