"""Speed of a whole Wan transformer call on the CPU with a mechanism, against the stock model of the same run.

    python -m hf_attn.bench.video_speed --density 0.2 0.125
    python -m hf_attn.bench.video_speed --model small --mechanism vmoba "vmoba scope=head_global" psa
    python -m hf_attn.bench.video_speed --attention --density 0.2 0.125
    python -m hf_attn.bench.video_speed --default          # the options of a user who gives none

A mechanism may be followed by options, "name option=value ...", in one argument. Selection, reordering and statistics
are counted. The share of attention a is measured: time of the stock call against that of a call whose self-attention
does nothing; 1 / (1 - a + a * density) is Amdahl's bound. Calls are interleaved, ratios are medians over the rounds.
`--attention` times the attention of one layer alone.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hf_attn
from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import Timing, interleaved, machine_load, paired_ratio
from hf_attn.bench.video_quality import parse_options
from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.grid import TokenGrid
from hf_attn.mechanism import (
    Capabilities,
    DiffusionConfig,
    Mechanism,
    get_mechanism,
    register_mechanism,
    unregister_mechanism,
)

FIGURES = ("speed-up", "of bound", "time")
# Heads, head dimension, width of the feed-forward. Three layers: one of every partition of VMoBA.
MODELS = {"wan": (4, 128, 3072), "small": (2, 64, 512)}
LAYERS = 3
GRIDS = {512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16), 8192: (16, 16, 32)}
SPARSE = {"dense_steps": 0, "min_tokens": 0, "strict": True}
NOTHING = Mechanism(
    name="nothing",
    summary="gives the values back",
    source="this bench",
    config=DiffusionConfig,
    capabilities=Capabilities(diffusers=True),
    attend=lambda call, config: call.value,
)


def wan(name: str) -> WanTransformer3DModel:
    """A Wan transformer with random weights."""
    return random_wan(*MODELS[name], LAYERS)


def random_wan(heads: int, dim: int, width: int, layers: int) -> WanTransformer3DModel:
    """A Wan transformer of any size, `width` that of its feed-forward, always with the same random weights."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=dim, in_channels=16, out_channels=16,
        text_dim=64, freq_dim=64, ffn_dim=width, num_layers=layers,
    ).eval()  # fmt: skip


def inputs(grid: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timestep and a text of 64 tokens."""
    generator = torch.Generator().manual_seed(1)
    frames, height, width = grid
    latents = torch.randn(1, 16, frames, 2 * height, 2 * width, generator=generator)
    return latents, torch.tensor([500]), torch.randn(1, 64, 64, generator=generator)


def with_mechanism(model: WanTransformer3DModel, name: str, options: dict[str, Any]) -> WanTransformer3DModel:
    """A copy of the model that uses a mechanism."""
    return hf_attn.apply(copy.deepcopy(model), name, **options)


def split(text: str) -> tuple[str, dict[str, Any]]:
    """`vmoba scope=head_global` -> name and options."""
    name, *options = text.split()
    return name, parse_options([f"{name}.{option}" for option in options]).get(name, {})


def measure_model(args: argparse.Namespace) -> Iterator[Row]:
    """A line for every density and mechanism, all of them and the stock model in the same rounds."""
    stock, call = wan(args.model), inputs(GRIDS[args.length])
    rest = with_mechanism(stock, "nothing", SPARSE)
    sparse = {}
    for density in _densities(args):
        for text in args.mechanism:
            name, options = split(text)
            sparse[text, density] = with_mechanism(stock, name, _options(args, density) | options)
    models: dict[Any, WanTransformer3DModel] = {"stock": stock, "rest": rest, **sparse}
    times = interleaved({key: partial(model, *call) for key, model in models.items()}, repeats=args.repeats)
    share = 1 - paired_ratio(times["rest"], times["stock"])
    for (text, density), model in sparse.items():
        found = hf_attn.stats(model)["totals"]
        realised = 1.0 if found["density"] is None else found["density"]
        pair = {"stock": times["stock"], "sparse": times[text, density]}
        yield _row(f"{text} {density or 'default'}", text, density, realised, pair, share)


def measure_attention(args: argparse.Namespace) -> Iterator[Row]:
    """A line for every mechanism and layer: attention is all there is."""
    heads, dim, _ = MODELS[args.model]
    dim = args.head_dim or dim
    generator = torch.Generator().manual_seed(0)
    # Heads last in memory, as diffusers hands them over.
    query, key, value = (
        torch.randn(1, args.length, args.heads or heads, dim, generator=generator).transpose(1, 2) for _ in range(3)
    )
    tokens = TokenLayout(1, args.length, args.length, grid=TokenGrid(*GRIDS[args.length]))
    for density, text in itertools.product(_densities(args), args.mechanism):
        name, options = split(text)
        mechanism = get_mechanism(name)
        config = mechanism.config.from_dict(_options(args, density) | options)
        for layer in range(LAYERS):
            seen: dict[str, Any] = {}
            context = LayerContext(index=layer, count=LAYERS, record=seen.update)
            call = AttentionCall(query, key, value, dim**-0.5, False, tokens, context)
            dense = partial(scaled_dot_product_attention, query, key, value)
            times = interleaved({"stock": dense, "sparse": partial(mechanism, call, config)}, repeats=args.repeats)
            realised = float(seen["computed"] / seen["visible"]) if "computed" in seen else 1.0
            case = f"{text} {density or 'default'} layer {layer}"
            yield _row(case, f"{text} ({seen['path']})", density, realised, times, 1.0)


def _densities(args: argparse.Namespace) -> list[float | None]:
    return [None] if args.default else args.density


def _options(args: argparse.Namespace, density: float | None) -> dict[str, Any]:
    return ({} if args.default else SPARSE) | ({} if density is None else {"density": density})


def _row(case: str, text: str, density: float | None, realised: float, times: dict[str, Timing], share: float) -> Row:
    bound = 1 / (1 - share + share * realised)
    ratio = paired_ratio(times["stock"], times["sparse"])
    line = (
        f"{text:<42}{density or '-':>7}{realised:>9.3f}{times['stock'].median * 1e3:>8.0f}"
        f"{times['sparse'].median * 1e3:>8.0f}{share:>6.2f}{ratio:>9.2f}{bound:>7.2f}{ratio / bound:>7.0%}"
    )
    figures = {"speed-up": ratio, "of bound": ratio / bound, "time": 1 / ratio}
    return Row(case, line, figures, times["stock"].spread)


def _list(run: Callable[[argparse.Namespace], Iterator[Row]], args: argparse.Namespace) -> list[Row]:
    names = ("density", 7), ("realised", 9), ("stock", 8), ("sparse", 8), ("a", 6), ("speed-up", 9), ("bound", 7)
    print(f"{'mechanism':<42}{''.join(f'{name:>{width}}' for name, width in names)}{'of it':>7}")
    return [show(row) for row in run(args)]


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanism", nargs="+", default=["vmoba", "vmoba scope=head_global"])
    parser.add_argument("--density", nargs="+", type=float, default=[0.2, 0.125])
    parser.add_argument("--default", action="store_true", help="no options at all")
    parser.add_argument("--model", choices=MODELS, default="wan")
    parser.add_argument("--length", type=int, choices=GRIDS, default=8192)
    parser.add_argument("--attention", action="store_true", help="attention alone, a line for every layer")
    parser.add_argument("--heads", type=int, help="of --attention, if not the model's")
    parser.add_argument("--head-dim", type=int, help="of --attention, if not the model's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    what = "attention of a layer" if args.attention else "transformer call"
    print(
        f"{args.model}: {what}, {args.length} tokens, times in ms; torch {torch.__version__}, {args.threads} thread(s)"
    )
    print(machine_load())
    if args.attention:
        return _list(measure_attention, args)
    register_mechanism(NOTHING)
    try:
        return _list(measure_model, args)
    finally:
        unregister_mechanism("nothing")


if __name__ == "__main__":
    main()
