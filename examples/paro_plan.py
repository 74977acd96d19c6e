"""Calibrate PAROAttention for one size of a video model, save the plan, and generate with it.

python examples/paro_plan.py --size 480x832x81 --steps 30 --plan wan-480p              # Wan 2.1 1.3B
python examples/paro_plan.py --size 480x832x81 --steps 30 --plan wan-480p --bits 8     # the plan is there: generates
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import hf_attn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="Hub id or folder of a pipeline")
parser.add_argument("--size", default="480x832x81", help="HEIGHTxWIDTHxFRAMES")
parser.add_argument("--steps", type=int, default=30, help="denoising steps")
parser.add_argument("--prompt", default="A red fox runs through fresh snow, the camera follows.")
parser.add_argument("--density", type=float, default=0.3, help="share of the attention blocks to keep")
parser.add_argument("--block-size", type=int, default=64)
parser.add_argument("--bits", type=int, choices=(8, 4), help="quantise q k^T to so many bits")
parser.add_argument("--plan", default="plan", help="folder of the plan; calibrated when it does not exist")
arguments = parser.parse_args()

height, width, frames = map(int, arguments.size.split("x"))
call = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": arguments.steps}
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=dtype).to(device)

if not Path(arguments.plan).exists():
    # Two prompts that differ from the one below; killed and started again, it goes on where it was.
    prompts = ["A street market at night in the rain.", "Waves break on a rocky shore, seen from above."]
    settings = {"density": arguments.density, "block_size": arguments.block_size}
    plan = hf_attn.calibrate(pipe, "paro", prompts=prompts, call=call, checkpoint=f"{arguments.plan}.part", **settings)
    hf_attn.save_plan(plan, arguments.plan)

hf_attn.load_plan(pipe, arguments.plan, min_tokens=0, qk_bits=arguments.bits)
pipe(arguments.prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **call)
for layer, counters in hf_attn.stats(pipe)["layers"].items():
    density = "-" if counters["density"] is None else f"{counters['density']:.1%}"
    sparse, fallbacks = counters["sparse_calls"], counters["fallbacks"]
    print(f"layer {layer}: {sparse} sparse calls at density {density}, {fallbacks} fallbacks")
