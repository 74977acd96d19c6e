"""Generate a video or an image with sparse attention, and show what every layer did.

python examples/faster_video.py --model wan                              # Wan 2.1 1.3B, 480x832, 81 frames
python examples/faster_video.py --model cogvideox --mechanism psa --density 0.25
python examples/faster_video.py --model your/pipeline --size 480x832x81 --steps 30
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import DiffusionPipeline

import hf_attn

# Hub id, height x width x frames, steps.
MODELS = {
    "wan": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "480x832x81", 50),
    "cogvideox": ("THUDM/CogVideoX-5b", "480x720x49", 50),
    "hunyuan": ("hunyuanvideo-community/HunyuanVideo", "544x960x129", 30),
    "flux": ("black-forest-labs/FLUX.1-dev", "2048x2048", 28),
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="wan", help=f"{', '.join(MODELS)}, or a Hub id or folder of a pipeline")
parser.add_argument("--size", help="HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES; default the model's own")
parser.add_argument("--steps", type=int, help="denoising steps")
parser.add_argument("--prompt", default="A red fox runs through fresh snow, the camera follows.")
parser.add_argument("--mechanism", default="psa", help="see hf_attn.list_mechanisms()")
parser.add_argument("--density", type=float, help="share of the attention to compute; default the mechanism's")
parser.add_argument("--min-tokens", type=int, default=4096, help="shorter sequences stay dense")
parser.add_argument("--output", default="output.png", help="the middle frame")
arguments = parser.parse_args()

repository, size, steps = MODELS.get(arguments.model, (arguments.model, "480x832x81", 30))
height, width, *frames = map(int, (arguments.size or size).split("x"))
call = {"height": height, "width": width, "num_inference_steps": arguments.steps or steps}
if frames:
    call["num_frames"] = frames[0]

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = DiffusionPipeline.from_pretrained(repository, torch_dtype=dtype).to(device)
density = {} if arguments.density is None else {"density": arguments.density}
hf_attn.apply(pipe, arguments.mechanism, min_tokens=arguments.min_tokens, **density)
print(hf_attn.doctor(pipe, height=height, width=width, num_frames=frames[0] if frames else 1))

start = time.perf_counter()
result = pipe(arguments.prompt, generator=torch.Generator().manual_seed(0), output_type="pil", **call)
print(f"{time.perf_counter() - start:.1f} seconds")
images = result.frames[0] if hasattr(result, "frames") else result.images
images[len(images) // 2].save(arguments.output)

for layer, counters in hf_attn.stats(pipe)["layers"].items():
    reasons = ", ".join(f"{count} dense: {reason}" for reason, count in counters["dense_reasons"].items())
    density = "-" if counters["density"] is None else f"{counters['density']:.0%}"
    print(f"layer {layer}: {counters['sparse_calls']} sparse calls at density {density}; {reasons}")
