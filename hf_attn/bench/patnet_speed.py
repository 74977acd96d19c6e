"""PATNet-T2 against a partial-convolution network of FasterNet-T2's size, both reparameterised (patnet.md 8.8).

    python -m hf_attn.bench.patnet_speed

The rival is this package's own code without any attention: 96 channels, depths 1, 2, 8, 2. Batch 1, 224 pixels, one
thread. `--clock thread` counts the processor time of this thread, for machines that are busy.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch

from hf_attn.bench.timing import interleaved, machine_load, paired_ratio
from hf_attn.models.patnet import PatNetConfig, PatNetForImageClassification

FASTERNET_T2 = {
    "embed_dim": 96, "depths": [1, 2, 8, 2], "hidden_act": "relu", "use_channel_attn": False, "use_spatial_attn": False,
}  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.clock == "thread":
        time.perf_counter = time.thread_time
    configs = {
        "partial convolutions": PatNetConfig(num_labels=1000, **FASTERNET_T2),
        "T2": PatNetConfig.preset("t2", num_labels=1000),
        "T2 without spatial gates": PatNetConfig.preset("t2", num_labels=1000, use_spatial_attn=False),
    }
    models = {name: PatNetForImageClassification(config).eval().reparameterize() for name, config in configs.items()}
    images = torch.randn(args.batch, 3, 224, 224)
    times = interleaved(
        {name: partial(model, images) for name, model in models.items()}, repeats=args.repeats, warmup=3
    )
    print(f"batch {args.batch}, 224 pixels, fp32, one thread, {args.clock} time, {machine_load()}")
    print(f"{'':26}{'parameters':>12}{'ms':>8}{'of the rival':>14}{'spread':>8}")
    for name, model in models.items():
        ratio = paired_ratio(times[name], times["partial convolutions"])
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:26}{size:12,}{times[name].median * 1e3:8.1f}{ratio:13.2f}x{times[name].spread:8.0%}")


if __name__ == "__main__":
    main()
