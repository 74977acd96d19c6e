"""Speed of what OneFormer and DiNAT spend their time on, each against the plain way in the same run.

    python -m hf_attn.bench.oneformer_speed                    # all three, one thread
    python -m hf_attn.bench.oneformer_speed --parts dinat --pixels 512

Every case is checked first; a case that fails gets no speed.

- deformable: ms_deform_attn, table rows against the grid_sample loop of transformers, forward and with gradients.
- dinat: a DiNAT backbone with tiled neighborhood attention against SDPA with the neighborhood as its mask. The masks
  are made outside of the clock and the position biases are zero, which favours SDPA.
- decoder: the masked decoder with 150 queries, sdpa against eager.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DinatConfig, OneFormerConfig, SwinConfig

from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import interleaved, machine_load, paired_ratio
from hf_attn.integrations.transformers.repairs import become
from hf_attn.integrations.transformers.repairs.dinat import MendedNeighborhoodAttention
from hf_attn.models.dinat import VARIANTS, DinatAttnBackbone
from hf_attn.models.oneformer import OneFormerAttnModel
from hf_attn.ops import ms_deform_attn, neighborhood_mask

FIGURES = ("speed-up",)
STAGES = [f"stage{i}" for i in range(1, 5)]


def report(name: str, plain: Callable[[], Tensor], ours: Callable[[], Tensor], bound: float, repeats: int) -> Row:
    """One line: error, milliseconds of both, and the median of the paired ratios."""
    wanted, got = plain().detach(), ours().detach()
    error = float((got - wanted).abs().max() / wanted.abs().max())
    if not error < bound:
        line = f"{name:<44} {error:.1e}  FAILED: no speed for a wrong result"
        return Row(name, line, problem=f"check failed: error {error:.1e}")
    times = interleaved({"plain": plain, "ours": ours}, repeats=repeats, warmup=0)
    first, second = (times[key].median * 1e3 for key in ("plain", "ours"))
    ratio = paired_ratio(times["plain"], times["ours"])
    line = f"{name:<44} {error:>8.1e} {first:>10.1f} {second:>10.1f} {ratio:>7.2f}x"
    return Row(name, line, {"speed-up": ratio}, times["plain"].spread)


def deformable(args: argparse.Namespace) -> Iterator[Row]:
    """S = Q = 21 504 tokens of three levels, 8 heads of 32 channels, 4 points; locations near the own pixel."""
    shapes, heads, dim, points = [(32, 32), (64, 64), (128, 128)], 8, 32, 4
    total = sum(h * w for h, w in shapes)
    own = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1) for h, w in shapes]
    spread = 2 * torch.randn(1, total, heads, len(shapes), points, 2)
    sizes = torch.tensor([(w, h) for h, w in shapes])[:, None]
    locations = torch.cat(own)[None, :, None, None, None] + spread / sizes
    weights = torch.rand(1, total, heads, len(shapes), points).flatten(3).softmax(-1).view(spread.shape[:-1])
    leaves = [torch.randn(1, total, heads, dim), locations, weights]
    upstream = torch.randn(1, total, heads * dim)

    def run(backend: str, backward: bool) -> Callable[[], Tensor]:
        def call() -> Tensor:
            given = [x.requires_grad_(backward) for x in leaves]
            out = ms_deform_attn(given[0], shapes, *given[1:], backend=backend)
            return torch.autograd.grad(out, given, upstream)[0] if backward else out

        return call

    for name, backward in (("forward", False), ("forward and backward", True)):
        plain, ours = run("grid_sample", backward), run("torch", backward)
        yield report(f"deformable, S={total}, {name}", plain, ours, 1e-4, args.repeats)


class DenseNeighborhoodAttention(MendedNeighborhoodAttention):
    """Neighbourhood attention as SDPA with a mask."""

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
        heads = [
            layer(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).flatten(1, 2).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mask = self.masks[hidden_states.shape[1:3], self.dilation]
        return (scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).reshape(hidden_states.shape),)


@torch.no_grad()
def dinat(args: argparse.Namespace) -> Iterator[Row]:
    """A published variant as a backbone, batch 1."""
    model = DinatAttnBackbone(DinatConfig(**VARIANTS[args.variant], out_features=STAGES)).eval()
    pixels = torch.randn(1, 3, args.pixels, args.pixels)
    layers = [module for module in model.modules() if isinstance(module, MendedNeighborhoodAttention)]
    masks: dict[tuple, Tensor] = {}

    def note(layer: MendedNeighborhoodAttention, inputs: tuple[Tensor, ...]) -> None:
        space = inputs[0].shape[1:3]
        if (space, layer.dilation) not in masks:
            size = (layer.kernel_size,) * 2
            masks[space, layer.dilation] = neighborhood_mask(space, kernel_size=size, dilation=layer.dilation)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    model(pixels)
    for hook in hooks:
        hook.remove()
    DenseNeighborhoodAttention.masks = masks

    def plain() -> Tensor:
        restore = become(layers, DenseNeighborhoodAttention)
        try:
            return model(pixels).feature_maps[-1]
        finally:
            restore(model)

    def ours() -> Tensor:
        return model(pixels).feature_maps[-1]

    yield report(f"dinat {args.variant}, {args.pixels} px", plain, ours, 1e-3, args.slow_repeats)


@torch.no_grad()
def decoder(args: argparse.Namespace) -> Iterator[Row]:
    """Nine layers over maps of 32, 64 and 128 pixels a side (an image of 1024), masks of 256 x 256."""
    tiny = SwinConfig(embed_dim=4, depths=[1] * 4, num_heads=[1] * 4, out_features=STAGES)
    model = OneFormerAttnModel(OneFormerConfig(backbone_config=tiny)).eval()
    features = [torch.randn(1, 256, size, size) for size in (32, 64, 128)]
    mask_features, task = torch.randn(1, 256, args.mask_size, args.mask_size), torch.randn(1, 256)

    def run(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            model.set_attn_implementation({"": name})
            return model.transformer_module(features, mask_features, task).prediction_class

        return call

    # Masks are thresholded: a difference in the last bit may let a query see one pixel more.
    yield report("decoder, Q=150, up to 128x128", run("eager"), run("sdpa"), 5e-2, args.slow_repeats)


PARTS = {"deformable": deformable, "dinat": dinat, "decoder": decoder}


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", choices=VARIANTS, default="mini")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--mask-size", type=int, default=128, help="side of the mask features")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow-repeats", type=int, default=1, help="of a whole backbone or decoder")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"fp32, {args.threads} thread(s), torch {torch.__version__}, {machine_load()}")
    print(f"{'case':<44} {'error':>8} {'plain ms':>10} {'ours ms':>10} {'speed':>8}")
    return [show(row) for part in args.parts for row in PARTS[part](args)]


if __name__ == "__main__":
    main()
