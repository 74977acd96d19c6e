"""Mixture of Block Attention for video (VMoBA, arXiv 2506.23858): each query token chooses 1D, 2D or 3D key blocks."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.checks import require_int, require_one_of
from hf_attn.grid import Block, Partition, TokenGrid, partition, suggest_blocks
from hf_attn.mechanism import Capabilities, DiffusionConfig, Mechanism
from hf_attn.ops import dense_attention, routed_block_attention, select_pooled_routes
from hf_attn.ops.pooled_routes import SCOPES, check_pool_rule

PATTERNS = ("1d", "2d", "3d")
# What top-k is fitted to when neither a density nor a number of blocks is given.
DEFAULT_DENSITY = 0.25
# Blocks wanted of each partition; small densities want more, so that a query reads others than its own.
TARGETS = (8, 48, 72)
FEWEST_READ = 2
# Tokens a block should hold at least: smaller blocks choose more finely, but gathering queries for them costs more.
BLOCK_TOKENS = 256
# Short sequences (tests, small images) get smaller blocks, to have so many to choose from.
CHOICE = 32


@dataclass
class VMoBAConfig(DiffusionConfig):
    """Queries attend to their own block of video tokens and the blocks whose mean key they match best.

    Layers cycle through 1D (frames), 2D (columns through time) and 3D (boxes) partitions. Text is read by every query,
    and reads everything. `density`, `dense_steps`, `min_tokens`, `schedule`, `strict`, `layers` are the common ones;
    `density` sets the number of blocks of `select="top_k"`, and is 0.25 when neither it nor `top_k` is given.

    Args:
        temporal_block: frames per 1D block (s_t), a number > 0; 0.5 is half a frame. `None`, as for the next two,
            takes a size that suits the latent grid (`hf_attn.grid.suggest_blocks`).
        spatial_block: (height, width) in tokens of a 2D block through all frames; divides the grid.
        st_block: (frames, height, width) in tokens of a 3D block; divides the grid.
        select: "top_k": a number of blocks; "threshold": the pairs that hold the share `tau` of a pool's similarity.
        scope: which pairs compete, see `ops.select_pooled_routes`. "query_head" is for use without training,
            "head_global" is what the paper trains with.
        tau: share in (0, 1]; 1 takes everything.
        top_k: blocks a query reads, its own included, >= 1; or three numbers, for 1D, 2D and 3D layers.
        pattern_counts: layers of each partition in a cycle.
        first_full_layer: layers before this one stay dense, and the cycle begins with it.
    """

    temporal_block: int | float | None = None
    spatial_block: tuple[int, int] | None = None
    st_block: tuple[int, int, int] | None = None
    select: str = "top_k"
    scope: str = "query_head"
    tau: float = 0.25
    top_k: int | tuple[int, int, int] | None = None
    pattern_counts: tuple[int, int, int] = (1, 1, 1)
    first_full_layer: int = 0

    def __post_init__(self) -> None:
        if self.temporal_block is not None:
            number = isinstance(self.temporal_block, int | float) and not isinstance(self.temporal_block, bool)
            if not number or not self.temporal_block > 0:
                raise ValueError(f"temporal_block must be a number of frames > 0, got {self.temporal_block!r}")
        self.spatial_block = _sizes("spatial_block", self.spatial_block, 2)
        self.st_block = _sizes("st_block", self.st_block, 3)
        require_one_of("select", self.select, ("top_k", "threshold"))
        require_one_of("scope", self.scope, SCOPES)
        check_pool_rule(self.scope if self.select == "threshold" else "query_head", None, self.tau)
        if isinstance(self.top_k, list | tuple):
            self.top_k = _sizes("top_k", self.top_k, 3)
        elif self.top_k is not None:
            require_int("top_k", self.top_k, 1)
        if self.select == "top_k":
            check_pool_rule(self.scope, 1, None)
        elif self.density is not None or self.schedule is not None or self.top_k is not None:
            raise ValueError(
                f"select='threshold' follows tau={self.tau} alone; with density, schedule or top_k use select='top_k'"
            )
        self.pattern_counts = _sizes("pattern_counts", self.pattern_counts, 3, least=0)
        if not sum(self.pattern_counts):
            raise ValueError(f"pattern_counts must name a layer at least, got {self.pattern_counts}")
        require_int("first_full_layer", self.first_full_layer, 0)
        super().__post_init__()

    def pattern(self, layer: int | None) -> str | None:
        """The partition of a layer, "1d", "2d" or "3d"; None: it stays dense. A layer without number counts as 0."""
        place = (layer or 0) - self.first_full_layer
        if place < 0:
            return None
        place %= sum(self.pattern_counts)
        return PATTERNS[(place >= self.pattern_counts[0]) + (place >= sum(self.pattern_counts[:2]))]

    def wanted_density(self) -> float | None:
        """The density that top-k is fitted to, None where another option decides."""
        if self.select == "threshold" or (self.density is None and self.top_k is not None):
            return None
        return DEFAULT_DENSITY if self.density is None else self.density


def attend(call: AttentionCall, config: VMoBAConfig) -> Tensor:
    """VMoBA's attention `[B, Hq, N, Dv]`: one softmax over the chosen blocks and the text; differentiable.

    Raises ValueError for causal layers, without a latent grid, and for blocks that do not divide it.
    """
    grid = _grid(call)
    pattern = config.pattern(call.layer.index)
    if pattern is None:
        call.layer.record(path="dense", reason=f"first_full_layer={config.first_full_layer}")
        return dense_attention(call)
    if call.k_len < config.min_tokens:
        call.layer.record(path="dense", reason=f"fewer than min_tokens={config.min_tokens} tokens")
        return dense_attention(call)
    parts = blocks_of(grid, config, pattern)
    video = grid.lattice
    query = call.query[:, :, video]
    key, value = (parts.permutation.apply(x[:, :, video]) for x in (call.key, call.value))
    routes = _routes(query, key, grid, parts, config, pattern)
    if call.layer.recording:
        call.layer.record(path=f"{pattern}, {parts.num_blocks} blocks", **_pairs(call, routes, parts))
    options: dict[str, Any] = {"block_size": parts.block_tokens, "causal": False, "scale": call.scale}
    if not grid.text:
        return routed_block_attention(query, key, value, routes, **options)
    seen = routed_block_attention(query, key, value, routes, return_lse=True, **options)
    out = _merge(seen, _read_text(call, query), call.value.dtype)
    read = _text_attention(call)
    before, after = read.split([grid.text_before, grid.text_after], 2)
    return torch.cat([before, out, after], 2)


def blocks_of(grid: TokenGrid, config: VMoBAConfig, pattern: str) -> Partition:
    """The partition of the lattice in a layer of this pattern; ValueError when the blocks of the options do not fit."""
    number = PATTERNS.index(pattern)
    block = (config.temporal_block, config.spatial_block, config.st_block)[number]
    return partition(
        _lattice(grid), _suggested(_lattice(grid), config.wanted_density())[number] if block is None else block
    )


def attended(call: AttentionCall, config: VMoBAConfig, rows: Tensor) -> Tensor:
    """Keys that the given query rows read, bool `[B, Hq, R, N]`; padded text is False."""
    grid, pattern = _grid(call), config.pattern(call.layer.index)
    mask = torch.ones(*call.query.shape[:2], call.q_len, call.k_len, dtype=torch.bool, device=call.query.device)
    if pattern is not None:
        parts, video = blocks_of(grid, config, pattern), grid.lattice
        key = parts.permutation.apply(call.key[:, :, video])
        routes = _routes(call.query[:, :, video], key, grid, parts, config, pattern)
        mask[:, :, video, video] = routes[..., parts.block_of().to(routes.device)]
    real = call.tokens.real_keys()
    if real is not None:
        mask &= real[:, None, None]
    return mask[:, :, rows]


def _grid(call: AttentionCall) -> TokenGrid:
    if call.causal:
        raise ValueError("vmoba is for layers that are not causal (video and image models), but this layer is causal")
    grid = call.tokens.grid
    if grid is None:
        raise ValueError("vmoba needs the latent grid of the tokens (call.tokens.grid), got None")
    grid.check_length(call.k_len)
    return grid


def _lattice(grid: TokenGrid) -> TokenGrid:
    return replace(grid, text_before=0, text_after=0)


@cache
def _suggested(lattice: TokenGrid, density: float | None) -> tuple[Block, Block, Block]:
    """Blocks for a lattice; warns once where a partition has to be replaced."""
    fewest = FEWEST_READ / density if density else 1
    targets = [max(target, math.ceil(fewest)) for target in TARGETS]
    size = max(min(BLOCK_TOKENS, lattice.tokens // max(CHOICE, math.ceil(fewest))), 1)
    found = suggest_blocks(lattice, targets=tuple(targets), min_tokens=size)
    while any(count < 0.75 * min(fewest, lattice.tokens) for count in found.counts):
        targets = [t * (1 + (c < 0.75 * fewest)) for t, c in zip(targets, found.counts, strict=True)]
        size = max(min(size, lattice.tokens // max(targets)), 1)
        found = suggest_blocks(lattice, targets=tuple(targets), min_tokens=size)
    for note in found.notes:
        warnings.warn(f"hf_attn: vmoba: {note}", stacklevel=2)
    return found.blocks


def _routes(query: Tensor, key: Tensor, grid: TokenGrid, parts: Partition, config: VMoBAConfig, pattern: str) -> Tensor:
    """Blocks of every video query, bool `[B, Hq, S, n]`; keys in block order."""
    rule = {"tau": config.tau} if config.select == "threshold" else {"top_k": _top_k(grid, parts, config, pattern)}
    own = parts.block_of().to(query.device)
    return select_pooled_routes(query, key, own, block_size=parts.block_tokens, scope=config.scope, **rule)


def _top_k(grid: TokenGrid, parts: Partition, config: VMoBAConfig, pattern: str) -> float:
    """Blocks a query reads on average."""
    density = config.wanted_density()
    wanted: float
    if density is None:
        by_pattern = (config.top_k,) * 3 if isinstance(config.top_k, int) else config.top_k or (1, 1, 1)
        wanted = by_pattern[PATTERNS.index(pattern)]
    else:
        # Text reads everything and is read by all; what the density leaves goes to the blocks.
        pairs = density * grid.length**2 - grid.text * grid.length - grid.tokens * grid.text
        wanted = pairs / (grid.tokens * grid.tokens / parts.num_blocks)
    return min(max(wanted, 1), parts.num_blocks)


def _pairs(call: AttentionCall, routes: Tensor, parts: Partition) -> dict[str, Tensor | float]:
    """(query, key) pairs computed and visible, over batch rows and heads; padded text is neither."""
    grid, (batch, heads) = call.tokens.known_grid(), call.query.shape[:2]
    # Not a sum along dimensions: of bool tensors that is slow.
    reads = torch.count_nonzero(routes).double() * parts.block_tokens
    missing = parts.num_blocks * parts.block_tokens - parts.tokens
    if missing:
        reads -= torch.count_nonzero(routes[..., -1]) * missing
    real = call.tokens.real_keys()
    text = grid.text * batch if real is None else real.sum() - grid.tokens * batch
    squared = grid.text**2 * batch if real is None else (real.sum(1) - grid.tokens).square().sum()
    beside = (2 * text * grid.tokens + squared) * heads
    return {"computed": reads + beside, "visible": batch * heads * grid.tokens**2 + beside}


def _text_rows(grid: TokenGrid, x: Tensor, dim: int) -> Tensor:
    before = x.narrow(dim, 0, grid.text_before)
    return torch.cat([before, x.narrow(dim, grid.lattice.stop, grid.text_after)], dim)


def _read_text(call: AttentionCall, query: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the video queries over the text, and its lse."""
    grid = call.tokens.known_grid()
    key, value = (_text_rows(grid, x, 2) for x in (call.key, call.value))
    index = call.tokens.index
    tokens = TokenLayout.full(query.shape[0], grid.tokens, grid.text)
    if index is not None:
        keys = _text_rows(grid, index[..., call.q_len :], 2)
        tokens = replace(tokens, index=torch.cat([index[..., grid.lattice], keys], 2))
    return _read_all(call, query, key, value, tokens)


def _text_attention(call: AttentionCall) -> Tensor:
    """The text's own attention over everything."""
    grid = call.tokens.known_grid()
    query = _text_rows(grid, call.query, 2)
    tokens, index = TokenLayout.full(query.shape[0], grid.text, call.k_len), call.tokens.index
    if index is not None:
        queries = _text_rows(grid, index[..., : call.q_len], 2)
        tokens = replace(tokens, index=torch.cat([queries, index[..., call.q_len :]], 2))
    return _read_all(call, query, call.key, call.value, tokens)[0]


def _read_all(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, tokens: TokenLayout
) -> tuple[Tensor, Tensor]:
    """Plain attention and its lse; what is not real is not read, whatever it holds."""
    routes = torch.ones(*query.shape[:3], 1, dtype=torch.bool, device=query.device)
    return routed_block_attention(
        query, key, value, routes,
        block_size=key.shape[2], causal=False, scale=call.scale, return_lse=True, tokens=tokens,
    )  # fmt: skip


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """One softmax over the keys of both; the first has a key in every row."""
    (left, left_lse), (right, right_lse) = first, second
    share = torch.sigmoid(right_lse - left_lse)[..., None]
    return torch.lerp(left.to(share.dtype), right.to(share.dtype), share).to(dtype)


def _sizes(name: str, value: Any, count: int, least: int = 1) -> Any:
    """A tuple of `count` integers, or None."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ValueError(f"{name} must be {count} integers, got {value!r}")
    for number, size in enumerate(value):
        require_int(f"{name}[{number}]", size, least)
    return tuple(value)


def describe(config: VMoBAConfig, q_len: int, k_len: int) -> dict[str, Any]:
    """What calls of this length would do."""
    density = config.wanted_density()
    follows = "tau and the input" if config.select == "threshold" else "top_k and the number of blocks"
    return {
        "density": density,
        "density follows": follows if density is None else "the option density (default 0.25)",
        "min_tokens": config.min_tokens,
        "dense": k_len < config.min_tokens,
    }


MECHANISM = Mechanism(
    name="vmoba",
    summary="each query token chooses 1D, 2D or 3D key blocks, in turn over the layers; for training video models too",
    source="VMoBA, arXiv 2506.23858",
    config=VMoBAConfig,
    capabilities=Capabilities(decode=False, packing=False, diffusers=True, latent_grid=True),
    attend=attend,
    attended=attended,
    describe=describe,
)
