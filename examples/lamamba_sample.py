"""Draw digits with a LaMamba-Diff pipeline, trained by recipes/lamamba_digits or fresh, and save and load it.

python examples/lamamba_sample.py --pipeline lamamba_digits_output/pipeline      # what the recipe made
python examples/lamamba_sample.py                                                # random weights: noise, in seconds
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import hf_attn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pipeline", help="folder or Hub id of a LaMambaDiffPipeline; default: a small untrained one")
parser.add_argument("--classes", type=int, nargs="+", default=[0, 1, 2, 3], help="one image for each")
parser.add_argument("--guidance-scale", type=float, default=1.5)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="lamamba_sample", help="folder for the pictures")
arguments = parser.parse_args()

if arguments.pipeline:
    pipe = DiffusionPipeline.from_pretrained(arguments.pipeline)  # import hf_attn is all it needs
else:
    torch.manual_seed(0)
    model = hf_attn.LaMambaDiffTransformer2DModel(
        sample_size=8, in_channels=1, out_channels=1, num_classes=10, base_channels=16, depths=[1, 1, 1, 0],
        bottleneck_depth=1, num_heads=2, window_size=4, ssm_state_size=1,
    )  # fmt: skip
    hf_attn.LaMambaDiffPipeline(transformer=model, vae=None, scheduler=DDIMScheduler()).save_pretrained(
        f"{arguments.output}/pipeline"
    )
    pipe = DiffusionPipeline.from_pretrained(f"{arguments.output}/pipeline")

pipe.set_progress_bar_config(disable=True)
images = pipe(
    arguments.classes,
    guidance_scale=arguments.guidance_scale,
    num_inference_steps=arguments.steps,
    generator=torch.Generator().manual_seed(0),
).images
pipe.save_pretrained(f"{arguments.output}/pipeline")
for number, (label, image) in enumerate(zip(arguments.classes, images, strict=True)):
    image.save(f"{arguments.output}/{number}_class{label}.png")
count = sum(p.numel() for p in pipe.transformer.parameters())
print(f"{type(pipe).__name__}: {len(images)} images of {images[0].size}, {count / 1e6:.2f} M parameters")
