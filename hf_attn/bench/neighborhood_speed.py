"""Neighborhood attention against dense attention, with a mask and without, in the same run.

    python -m hf_attn.bench.neighborhood_speed                  # CPU, one thread: 56x56 K=7 and 16x32x32 window 5x7x7
    python -m hf_attn.bench.neighborhood_speed --device cuda --dtype float16 --head-dim 64 --heads 16
    python -m hf_attn.bench.neighborhood_speed --compiled       # compiled FlexAttention beside it (needs a compiler)

Every case is compared with masked dense attention first; where it differs no time is shown. "of limit" is the speed-up
over unmasked dense attention times the share of the pairs that are computed: 100 % means pairs cost what dense ones do.
The dense mask of a large grid does not fit beside the rest, so masked attention is timed on some query rows and scaled.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn import ops
from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import interleaved, machine_load, paired_ratio

FIGURES = ("over masked", "over plain")
# Query rows whose masked attention is timed where a whole mask would be too large.
MASKED_ROWS = 2048
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Setting:
    """A grid, its window, and the speed-ups asked of it."""

    space: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    heads: int
    bar_masked: float
    bar_plain: float = 5.0

    def __str__(self) -> str:
        text = f"{'x'.join(map(str, self.space))} K={'x'.join(map(str, self.kernel))}"
        return text + (f" S={'x'.join(map(str, self.stride))}" if max(self.stride) > 1 else "")

    @property
    def tokens(self) -> int:
        return math.prod(self.space)

    @property
    def density(self) -> float:
        return math.prod(self.kernel) / self.tokens


SETTINGS = (
    Setting((56, 56), (7, 7), (1, 1), 2, 8.0),
    Setting((16, 32, 32), (5, 7, 7), (1, 1, 1), 1, 10.0),
    Setting((16, 32, 32), (4, 8, 8), (4, 8, 8), 1, 10.0),
)


def steps_of(function: Callable[[], Tensor], backward: bool, leaves: list[Tensor], upstream: Tensor) -> Callable:
    """Forward, or forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            function()

    def both() -> None:
        torch.autograd.grad(function(), leaves, upstream)

    return both if backward else forward


def run_case(setting: Setting, args: argparse.Namespace) -> Iterator[Row]:
    """Lines of the table, forward and forward + backward."""
    generator = torch.Generator().manual_seed(0)
    dtype, heads = getattr(torch, args.dtype), args.heads or setting.heads
    shape = (1, *setting.space, heads, args.head_dim)
    near = [torch.randn(shape, generator=generator).to(args.device, dtype).requires_grad_() for _ in range(3)]
    flat = [x.detach().flatten(1, -3).transpose(1, 2).contiguous().requires_grad_() for x in near]
    window = {"kernel_size": setting.kernel, "stride": setting.stride}
    rows = min(setting.tokens, MASKED_ROWS if setting.tokens > 4096 else setting.tokens)
    visible = ops.neighborhood_mask(setting.space, **window)[:rows].to(args.device)
    mask = torch.zeros(visible.shape, dtype=dtype, device=args.device).masked_fill_(~visible, float("-inf"))
    some = [flat[0].detach()[:, :, :rows].clone().requires_grad_(), *flat[1:]]

    def windowed() -> Tensor:
        return ops.neighborhood_attention(*near, **window)

    def masked() -> Tensor:
        return scaled_dot_product_attention(*some, attn_mask=mask)

    def plain() -> Tensor:
        return scaled_dot_product_attention(*flat)

    with torch.no_grad():
        error = (windowed().flatten(1, -3).transpose(1, 2)[:, :, :rows] - masked()).abs().max().item()
    if not error <= TOLERANCE[dtype]:
        reason = f"check failed: differs from masked attention by {error:.1e}"
        for kind in ("fwd", "fwd+bwd"):
            yield Row(f"{setting} {kind}", f"{setting!s:<28} {kind:<8} {reason}, no time", problem=reason)
        return
    calls = {"near": (windowed, near), "masked": (masked, some), "plain": (plain, flat)}
    if args.compiled:
        calls["flex"] = (_flex(flat, setting, args.device), flat)
    wait = torch.cuda.synchronize if near[0].is_cuda else lambda: None
    for backward in (False, True):
        if backward and args.compiled and not near[0].is_cuda:
            calls.pop("flex", None)  # FlexAttention has no compiled backward on CPUs
        functions = {}
        for name, (function, leaves) in calls.items():
            functions[name] = steps_of(function, backward, leaves, torch.ones_like(function().detach()))
        times = interleaved(functions, repeats=args.repeats, synchronize=wait)
        scale = setting.tokens / rows
        over_masked = paired_ratio(times["masked"], times["near"]) * scale
        over_plain = paired_ratio(times["plain"], times["near"])
        met = over_masked >= setting.bar_masked and over_plain >= setting.bar_plain
        flex = f"{times['flex'].median * 1e3:>9.2f}" if "flex" in times else f"{'-':>9}"
        kind = "fwd+bwd" if backward else "fwd"
        line = (
            f"{setting!s:<28} {kind:<8} {times['near'].median * 1e3:>9.2f} "
            f"{times['masked'].median * scale * 1e3:>9.1f} {times['plain'].median * 1e3:>9.1f} {flex} "
            f"{over_masked:>8.1f}x {over_plain:>7.1f}x {over_plain * setting.density:>9.1%}  "
            f">={setting.bar_masked:.0f}x, >={setting.bar_plain:.0f}x {'met' if met else 'MISSED'}"
        )
        figures = {"over masked": over_masked, "over plain": over_plain}
        spread = max(times["masked"].spread, times["plain"].spread)
        yield Row(f"{setting} {kind}", line, figures, spread)


def _flex(flat: list[Tensor], setting: Setting, device: str) -> Callable[[], Tensor]:
    """Compiled FlexAttention of the same windows."""
    from torch.nn.attention.flex_attention import flex_attention

    from hf_attn.ops.hfattn_sparse.neighborhood.flex_path import block_mask
    from hf_attn.ops.hfattn_sparse.neighborhood.op import windows_of

    axes = len(setting.space)
    found = block_mask(windows_of(setting.space, setting.kernel, setting.stride, [1] * axes, [False] * axes), 0, device)
    attend = torch.compile(flex_attention)
    return lambda: attend(*flat, block_mask=found)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--heads", type=int, help="default 2 on the image and 1 on the video")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="also compiled FlexAttention")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}, D={args.head_dim}, {args.threads} thread(s)")
    print(machine_load())
    print(
        f"{'grid':<28} {'pass':<8} {'ms':>9} {'masked':>9} {'plain':>9} {'flex':>9} {'/masked':>9} {'/plain':>8} "
        f"{'of limit':>9}  bar"
    )
    return [show(row) for setting in SETTINGS for row in run_case(setting, args)]


if __name__ == "__main__":
    main()
