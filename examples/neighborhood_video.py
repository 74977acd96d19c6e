"""Sliding windows on a video or an image: how much of the attention is computed, and where one token looks.

python examples/neighborhood_video.py                          # 16x32x32 tokens, windows of 5x7x7
python examples/neighborhood_video.py --grid 32x48 --kernel 9 --stride 3
python examples/neighborhood_video.py --pipeline Wan-AI/Wan2.1-T2V-1.3B-Diffusers --density 0.1 --stride 4
"""

from __future__ import annotations

import argparse
import math
import time

import torch

import hf_attn
from hf_attn import ops

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--grid", default="16x32x32", help="FRAMESxHEIGHTxWIDTH or HEIGHTxWIDTH, in tokens")
parser.add_argument("--kernel", default="5x7x7", help="one number, or one an axis")
parser.add_argument("--stride", type=int, default=1, help="queries that share a window")
parser.add_argument("--pipeline", help="Hub id or folder of a diffusers pipeline to run instead")
parser.add_argument("--density", type=float, default=0.1, help="share of the attention a pipeline computes")
arguments = parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split("x")]


def run_pipeline() -> None:
    """Generate with windows of the grid's proportions; the first quarter of the steps stays dense."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(arguments.pipeline, torch_dtype=torch.bfloat16)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    hf_attn.apply(pipe, "neighborhood", density=arguments.density, stride=arguments.stride)
    pipe("A red fox runs through fresh snow, the camera follows.")
    print(hf_attn.stats(pipe)["totals"])


def run_op() -> None:
    """Time the windows beside full attention and draw the window of the middle token."""
    space, kernel = numbers(arguments.grid), numbers(arguments.kernel)
    kernel = kernel * len(space) if len(kernel) == 1 else kernel[-len(space) :]
    window = {"kernel_size": kernel, "stride": [min(arguments.stride, k) for k in kernel]}
    query, key, value = (torch.randn(1, *space, 2, 32) for _ in range(3))
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (query, key, value)]
    seconds = {}
    for name, function in (
        ("windows", lambda: ops.neighborhood_attention(query, key, value, **window)),
        ("full", lambda: torch.nn.functional.scaled_dot_product_attention(*flat)),
    ):
        function()
        start = time.perf_counter()
        function()
        seconds[name] = time.perf_counter() - start
    share = math.prod(kernel) / math.prod(space)
    print(f"{share:.1%} of the pairs; {seconds['windows'] * 1e3:.1f} ms, full attention {seconds['full'] * 1e3:.1f} ms")
    height, width = space[-2:]
    image = {"kernel_size": kernel[-2:], "stride": window["stride"][-2:]}
    middle = height // 2 * width + width // 2
    seen = ops.neighborhood_mask((height, width), **image)[middle].view(height, width)
    for row in range(height):
        line = ("o" if row * width + column == middle else "#" if seen[row, column] else "." for column in range(width))
        print("".join(line))


if arguments.pipeline:
    run_pipeline()
else:
    run_op()
