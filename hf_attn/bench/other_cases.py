"""Cases of the ops over maps, and of those that are no softmax over a set of keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu

from hf_attn import ops
from hf_attn.bench import memory_speed, selective_scan_speed
from hf_attn.bench.cases import Case, Op, Setting, sample_rows, softmax_rows
from hf_attn.bench.runner import backend
from hf_attn.nn.decay import base_slopes

# First tokens by which recurrences are checked, and their chunk.
PREFIX, CHUNK = 256, 64


def map_of(length: int) -> tuple[int, int]:
    """Height and width of a map of about so many tokens; exactly as many for powers of two."""
    if length & (length - 1) == 0:
        height = 1 << (length.bit_length() - 1) // 2
        return height, length // height
    side = max(1, int(length**0.5))
    return side, side


def flat_map(x: Tensor) -> Tensor:
    """`[B, H, W, heads, D]` -> `[B, heads, N, D]`."""
    return x.flatten(1, 2).transpose(1, 2)


def on_map(setting: Setting) -> tuple[tuple[int, int], list[Tensor]]:
    """The sides of the map and three tensors `[1, height, width, heads, D]`."""
    space = map_of(setting.length)
    shape = (1, *space, setting.shape.heads, setting.shape.head_dim)
    return space, [torch.randn(shape, dtype=setting.shape.dtype, device=setting.shape.device) for _ in range(3)]


def map_case(setting: Setting, run: Callable, leaves: list[Tensor], visible: Callable, share: float, **more) -> Case:
    """A case of an op over `[B, H, W, heads, D]`; `visible(rows)` is bool `[1, 1, R, N]`."""
    flat = tuple(flat_map(x).contiguous() for x in leaves)
    scale = more.pop("scale", setting.shape.scale)

    def expected(rows: Tensor, *given: Tensor) -> Tensor:
        query, key, value = (flat_map(x) for x in given)
        return softmax_rows(query[:, :, rows], key, value, visible(rows), scale)

    rows = sample_rows(flat[0].shape[2], flat[0].device)
    return Case(
        run, leaves, expected, flat, False, share, pick=lambda out, rows: flat_map(out)[:, :, rows], rows=rows, **more
    )


def neighborhood(setting: Setting) -> Case:
    """A window whose share of the map is the density, an odd number of keys along each axis."""
    space, leaves = on_map(setting)
    kernel = [min(n - (n % 2 == 0), max(3, 2 * round((n * setting.density**0.5 - 1) / 2) + 1)) for n in space]

    def near(axis: int, at: Tensor) -> Tensor:
        start = (at - kernel[axis] // 2).clamp(0, space[axis] - kernel[axis])[:, None]
        keys = torch.arange(space[axis], device=at.device)
        return (keys >= start) & (keys < start + kernel[axis])

    def visible(rows: Tensor) -> Tensor:
        return (near(0, rows // space[1])[:, :, None] & near(1, rows % space[1])[:, None]).flatten(1)[None, None]

    run = partial(_neighborhood, kernel=kernel)
    share = kernel[0] * kernel[1] / (space[0] * space[1])
    rivals = {name: partial(run, backend=name) for name in NEIGHBORHOOD_BACKENDS}
    return map_case(setting, run, leaves, visible, share, rivals=rivals)


def _neighborhood(*leaves: Tensor, kernel: list[int], backend: str = "auto") -> Tensor:
    return ops.neighborhood_attention(*leaves, kernel_size=kernel, backend=backend)


def bilevel(setting: Setting) -> Case:
    """BiFormer: 8 x 8 regions, or as many as a small map has; routing is not in the time but in its own column."""
    space, leaves = on_map(setting)
    region = [max(1, n // 8) for n in space]
    space_regions = [n // r for n, r in zip(space, region, strict=True)]
    leaves = [x[:, : space_regions[0] * region[0], : space_regions[1] * region[1]].contiguous() for x in leaves]
    width = space_regions[1] * region[1]
    count = space_regions[0] * space_regions[1]
    options = {"region_size": region, "top_k": max(1, round(setting.density * count))}
    select = partial(ops.select_regions, *leaves[:2], **options)
    routes = select()

    def region_of(position: Tensor) -> Tensor:
        return position // width // region[0] * space_regions[1] + position % width // region[1]

    def visible(rows: Tensor) -> Tensor:
        keys = region_of(torch.arange(leaves[0].shape[1] * width, device=rows.device))
        return (routes[0, region_of(rows)][:, :, None] == keys).any(1)[None, None]

    def run(*given: Tensor) -> Tensor:
        return ops.bilevel_routing_attention(*given, routes=routes, **options)

    scale = (setting.shape.heads * setting.shape.head_dim) ** -0.5
    return map_case(setting, run, leaves, visible, options["top_k"] / count, select=select, scale=scale)


def spanned(setting: Setting) -> Case:
    """EMOv2's hybrid windows: the sum of two attentions, over neighbours and over tokens far apart."""
    space = map_of(setting.length)
    # Two windows of a density each; a window divides both sides.
    window = max(w for w in range(1, min(space) + 1) if all(n % w == 0 for n in space) and _fits(w, space, setting))
    dim, heads = setting.shape.head_dim, setting.shape.heads
    shape = (1, heads * dim, *space)
    leaves = [torch.randn(shape, dtype=setting.shape.dtype, device=setting.shape.device) for _ in range(3)]
    steps = [n // window for n in space]

    def flat(x: Tensor) -> Tensor:
        return x.flatten(2).unflatten(1, (heads, dim)).mT

    def visible(rows: Tensor, remote: bool) -> Tensor:
        keys = torch.arange(space[0] * space[1], device=rows.device)
        same = torch.ones((), dtype=torch.bool, device=rows.device)
        for at, other, step in zip(
            (rows // space[1], rows % space[1]), (keys // space[1], keys % space[1]), steps, strict=True
        ):
            number = (lambda x, step=step: x % step) if remote else (lambda x: x // window)
            same = same & (number(at)[:, None] == number(other))
        return same[None, None]

    def expected(rows: Tensor, *given: Tensor) -> Tensor:
        query, key, value = (flat(x) for x in given)
        parts = [softmax_rows(query[:, :, rows], key, value, visible(rows, r), dim**-0.5) for r in (False, True)]
        return parts[0] + parts[1]

    def run(*given: Tensor) -> Tensor:
        return ops.spanned_window_attention(*given, window, num_heads=heads)

    rows = sample_rows(space[0] * space[1], setting.shape.device)
    dense = tuple(flat(x).contiguous() for x in leaves)
    share = 2 * window**2 / (space[0] * space[1])
    return Case(
        run, leaves, expected, dense, False, share, pick=lambda out, rows: flat(out)[:, :, rows], rows=rows
    )  # fmt: skip


def _fits(window: int, space: tuple[int, int], setting: Setting) -> bool:
    return window == 1 or 2 * window**2 <= setting.density * space[0] * space[1]


def linear(setting: Setting) -> Case:
    """Lightning Attention, a slope a head; a decoding step reads a state instead of keys."""
    shape, length = setting.shape, setting.length
    slopes = base_slopes(shape.heads).to(shape.device)
    dense = shape.tensors()
    rivals = {name: partial(_linear, slopes, name) for name in LINEAR_BACKENDS}
    if setting.decode:
        return _linear_step(setting, slopes, dense)

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        query, key, value = leaves
        key, value = (x.repeat_interleave(shape.heads // shape.kv_heads, 1) for x in (key, value))
        distance = rows[:, None] - torch.arange(length, device=rows.device)
        decay = (-slopes[:, None, None].double() * distance.clamp(min=0)).exp() * (distance >= 0)
        return (query[:, :, rows] @ key.mT * decay.to(query.dtype)) @ value

    return Case(partial(_linear, slopes, "auto"), dense, expected, dense, rivals=rivals)


def _linear(slopes: Tensor, name: str, *leaves: Tensor) -> Tensor:
    return ops.linear_attention(*leaves, slopes, backend=name)


def _linear_step(setting: Setting, slopes: Tensor, dense: tuple[Tensor, Tensor, Tensor]) -> Case:
    shape = setting.shape
    leaves = replace(shape, k_len=1).tensors()
    size = (1, shape.heads, shape.head_dim, shape.value_dim or shape.head_dim)
    state = torch.randn(size, generator=setting.generator()).to(shape.device)

    def run(*given: Tensor) -> Tensor:
        return ops.linear_attention(*given, slopes, initial_state=state)

    def expected(rows: Tensor, *given: Tensor) -> Tensor:
        query, key, value = given
        key, value = (x.repeat_interleave(shape.heads // shape.kv_heads, 1) for x in (key, value))
        decay = (-slopes.double()).exp()[:, None, None]
        return query @ (state.double() * decay + key.double().mT * value.double()).to(query.dtype)

    return Case(run, leaves, expected, dense, False)


def memory(function: Callable, setting: Setting, gates: int | None = None) -> Case:
    """A memory of Titans; its inner network has one hidden layer, four times as wide."""
    shape = setting.shape
    tokens, weights = memory_speed.inputs(setting.length, shape.heads, shape.head_dim, 4 * shape.head_dim, 2)
    if gates is not None:
        tokens = [*tokens[:4], *(x[:, :, ::CHUNK][:, :, : setting.length // CHUNK] for x in tokens[4:])]
    leaves = [x.to(shape.device, shape.dtype) for x in (*tokens, *weights)]
    count = min(PREFIX, setting.length)
    rows = torch.arange(count, device=shape.device)

    def run(*given: Tensor) -> Tensor:
        out = function(*given[:6], list(given[6:]))
        return out if isinstance(out, Tensor) else out[0]

    def expected(rows: Tensor, *given: Tensor) -> Tensor:
        some = [x[:, :, :count] for x in given[:4]] + [
            x[:, :, : count if gates is None else count // CHUNK] for x in given[4:6]
        ]
        with backend("reference"):
            return run(*some, *given[6:])

    dense = tuple(leaves[:3])
    return Case(run, leaves, expected, dense, rows=rows)


def neural_memory(setting: Setting) -> Case:
    return memory(partial(ops.neural_memory, chunk_size=CHUNK), setting)


def gated_memory(setting: Setting) -> Case:
    options = {"chunk_size": CHUNK, "loss_reduction": "sum", "memory_residual_norm": False}
    return memory(partial(ops.chunk_gated_memory, **options), setting, CHUNK)


def scan(setting: Setting) -> Case:
    """Mamba's scan in LaMamba-Diff's four orders; no attention does the same job."""
    shape = setting.shape
    leaves = selective_scan_speed.operands(1, setting.length, shape.heads * shape.head_dim // 4, 16)
    leaves = [x.to(shape.device, shape.dtype) for x in leaves]
    rows = torch.arange(min(PREFIX, setting.length), device=shape.device)

    def expected(rows: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        u, delta, B, C = (x[:, :, : len(rows)] for x in (u, delta, B, C))
        with backend("reference"):
            return ops.selective_scan(u, delta, A, B, C)

    return Case(ops.selective_scan, leaves, expected, None, rows=rows)


def convolution(setting: Setting) -> Case:
    """FlashMoBA's convolution over keys, four taps."""
    shape = setting.shape
    key = shape.tensors()[1]
    weight = torch.randn(shape.kv_heads * shape.head_dim, 4, generator=setting.generator())
    weight = weight.to(shape.device, shape.dtype)

    def expected(rows: Tensor, key: Tensor, weight: Tensor) -> Tensor:
        taps = weight.view(shape.kv_heads, shape.head_dim, -1).unbind(-1)
        total = torch.zeros_like(key[:, :, rows])
        for distance, tap in enumerate(reversed(taps)):
            past = rows - distance
            total = total + tap[:, None] * key[:, :, past.clamp(min=0)] * (past >= 0)[:, None]
        return key[:, :, rows] + silu(total)

    return Case(ops.key_convolution, (key, weight), expected, None)


def deformable(setting: Setting) -> Case:
    """Deformable attention over two maps, one of them half as long on each side; four points near the own pixel."""
    shape, (height, width) = setting.shape, map_of(setting.length)
    maps = [(height, width), (max(1, height // 2), max(1, width // 2))]
    total, generator = sum(h * w for h, w in maps), setting.generator()
    own = torch.cat(
        [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1) for h, w in maps]
    )
    offsets = 2 * torch.randn(1, total, shape.heads, len(maps), 4, 2, generator=generator)
    locations = own[None, :, None, None, None] + offsets / torch.tensor([(w, h) for h, w in maps])[:, None]
    weights = torch.rand(1, total, shape.heads, len(maps), 4, generator=generator)
    weights = weights.flatten(3).softmax(-1).view(weights.shape)
    value = torch.randn(1, total, shape.heads, shape.head_dim, generator=generator)
    value, weights = (x.to(shape.device, shape.dtype) for x in (value, weights))
    locations = locations.to(shape.device)

    def run(value: Tensor, weights: Tensor) -> Tensor:
        return ops.ms_deform_attn(value, maps, locations, weights)

    def expected(rows: Tensor, value: Tensor, weights: Tensor) -> Tensor:
        some = locations[:, rows].to(torch.promote_types(value.dtype, torch.float32)), weights[:, rows]
        return ops.ms_deform_attn(value, maps, *some, backend="grid_sample")

    rows = sample_rows(total, shape.device)
    return Case(run, (value, weights), expected, None, pick=lambda out, rows: out[:, rows], rows=rows)


NEIGHBORHOOD_BACKENDS = {"flex": "torch", "natten": "natten"}
LINEAR_BACKENDS = {"fla": "fla"}
OPS = {
    "neighborhood_attention": Op(neighborhood, backends=NEIGHBORHOOD_BACKENDS),
    "bilevel_routing_attention": Op(bilevel),
    "spanned_window_attention": Op(spanned),
    "linear_attention": Op(linear, ("forward", "backward", "decode"), backends=LINEAR_BACKENDS, dense=False),
    "neural_memory": Op(neural_memory, dense=False),
    "chunk_gated_memory": Op(gated_memory, dense=False),
    "selective_scan": Op(scan, dense=False),
    "key_convolution": Op(convolution, dense=False),
    "ms_deform_attn": Op(deformable, dense=False),
}
