"""bilevel_routing_attention: every region reads the tokens of the regions most like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.checks import require_one_of
from hf_attn.ops.backend import choose_path
from hf_attn.ops.block_sparse import block_sparse_attention
from hf_attn.pattern import BlockPattern

METHODS = ("auto", "copy", "mask", "blocks")
# Up to this many positions a CPU computes all pairs and masks them faster than it copies keys.
MASKED = 512


def bilevel_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    region_size: Sequence[int],
    top_k: int,
    scale: float | None = None,
    routes: Tensor | None = None,
    method: str = "auto",
    attend: Callable[..., Tensor] | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the tokens of the `top_k` regions nearest to a query's own (arXiv 2303.08810).

    The map, of any rank, is cut into regions of `region_size`, each of which must divide its side; see
    `select_regions` for the choice. A region need not choose itself.

    Args:
        query, key, value: `[B, *space, H, D]`, `[B, *space, H, D]`, `[B, *space, H, Dv]`.
        region_size: tokens of a region along every axis of `space`.
        top_k: regions read, 1 .. number of regions.
        scale: factor on the scores, default (H D)^-0.5: the width of all heads, as in the published models.
        routes: int `[B, regions, top_k]` from `select_regions`, to use instead of choosing here.
        method: "copy" lays the chosen keys side by side (top_k times the keys in memory); "mask" computes all pairs and
            masks those not chosen; "blocks" reads the keys where they are (`block_sparse_attention`). "auto" is the
            fastest of them on a CPU, by the size of the map, and "blocks" everywhere else.
        attend: computes the attention over the copies in the place of SDPA, `attend(query, key, value, scale=...)` of
            `[B regions, H, N, D]`; always over copies.

    Returns:
        `[B, *space, H, Dv]`. Differentiable in query, key and value; the choice is a constant.

    Raises ValueError for shapes that do not fit, naming the argument.
    """
    sides = _check(query, key, value, region_size, top_k)
    require_one_of("method", method, METHODS)
    heads, width = query.shape[-2:]
    scale = (heads * width) ** -0.5 if scale is None else float(scale)
    if routes is None:
        routes = select_regions(query, key, region_size=region_size, top_k=top_k)
    elif routes.shape != (query.shape[0], prod(sides), top_k):
        raise ValueError(f"routes must be [{query.shape[0]}, {prod(sides)}, {top_k}], got {list(routes.shape)}")
    if attend is not None:
        method = "copy"
    elif method == "auto":
        method = _method(query, value, prod(sides), top_k)
    if method == "mask":
        return _masked(query, key, value, routes, region_size, scale)
    space = query.shape[1:-2]
    query, key, value = (_to_regions(t, region_size) for t in (query, key, value))
    if method == "copy":
        out = _by_copies(query, key, value, routes, scale, attend or scaled_dot_product_attention)
    else:
        out = _in_place(query, key, value, routes, scale)
    return _from_regions(out, region_size, space)


def _method(query: Tensor, value: Tensor, regions: int, top_k: int) -> str:
    """The fastest method for tensors `[B, *space, H, D]`."""
    path = choose_path("block_sparse_attention", query, query.shape[-1], value.shape[-1])
    if path != "torch" or query.device.type != "cpu":
        return "blocks"
    if prod(query.shape[1:-2]) <= MASKED:
        return "mask"
    # Copies beyond this no longer pay for themselves in memory.
    copied = top_k * (query.numel() + value.numel())
    return "copy" if copied <= 1 << 24 else "blocks"


@torch.no_grad()
def select_regions(query: Tensor, key: Tensor, *, region_size: Sequence[int], top_k: int) -> Tensor:
    """Regions whose mean key has the largest product with a region's mean query, over all heads together.

    Args: as `bilevel_routing_attention`.

    Returns:
        int64 `[B, regions, top_k]`, best first, regions counted row-major. Computed in fp32 (fp64 for fp64); not
        differentiable. Ties as in `torch.topk`.
    """
    _check(query, key, key, region_size, top_k)
    inner = tuple(range(2, 2 * len(region_size) + 1, 2))
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    queries, keys = (_split(t, region_size).mean(inner, dtype=exact).flatten(1, -3).flatten(2) for t in (query, key))
    return best_regions(queries, keys, top_k)


def best_regions(query_means: Tensor, key_means: Tensor, top_k: int) -> Tensor:
    """int64 `[B, regions, top_k]` from mean queries and keys `[B, regions, C]`, in their precision under autocast."""
    device = query_means.device.type
    # Devices without autocast, meta among them, do not know the context either.
    exact = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with exact:
        return (query_means @ key_means.mT).topk(top_k, -1).indices


def region_mask(routes: Tensor, space: Sequence[int], region_size: Sequence[int]) -> Tensor:
    """The chosen pairs of positions of a map, bool `[B, N, N]`, row-major.

    Args:
        routes: int `[B, regions, top_k]` from `select_regions`.
        space: sides of the map.
    """
    own = torch.zeros((), dtype=torch.long, device=routes.device)
    for n, r in zip(space, region_size, strict=True):
        own = own[..., None] * (n // r) + torch.arange(n, device=routes.device) // r
    own = own.flatten()
    chosen = torch.zeros(*routes.shape[:2], routes.shape[1], dtype=torch.bool, device=routes.device)
    return chosen.scatter(2, routes, True)[:, own][:, :, own]


def _check(query: Tensor, key: Tensor, value: Tensor, region_size: Sequence[int], top_k: int) -> list[int]:
    """Regions along every axis; raises ValueError for what does not fit."""
    space = query.shape[1:-2]
    if query.dim() < 4 or key.shape != query.shape or value.shape[:-1] != query.shape[:-1]:
        raise ValueError(
            "query and key must be [B, *space, H, D] and value [B, *space, H, Dv], got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    if len(region_size) != len(space) or any(r < 1 or n % r for n, r in zip(space, region_size, strict=False)):
        raise ValueError(
            f"region_size={tuple(region_size)} must divide the map {tuple(space)} along every axis; pad the map, or "
            "choose another size"
        )
    sides = [n // r for n, r in zip(space, region_size, strict=True)]
    if not 1 <= top_k <= prod(sides):
        raise ValueError(f"top_k={top_k} must be between 1 and the {prod(sides)} regions of the map")
    return sides


def _split(states: Tensor, region_size: Sequence[int]) -> Tensor:
    """`[B, *space, H, D]` -> `[B, regions, positions of a region, (the same for every axis), H, D]`."""
    sizes = [size for n, r in zip(states.shape[1:-2], region_size, strict=True) for size in (n // r, r)]
    return states.reshape(states.shape[0], *sizes, *states.shape[-2:])


def _to_regions(states: Tensor, region_size: Sequence[int]) -> Tensor:
    """`[B, *space, H, D]` -> `[B, regions, tokens of a region, H, D]`."""
    rank, parts = len(region_size), _split(states, region_size)
    outer, inner = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    regions = prod([parts.shape[axis] for axis in outer])  # a list: graphs break on generators
    parts = parts.permute(0, *outer, *inner, 2 * rank + 1, 2 * rank + 2)
    return parts.reshape(states.shape[0], regions, prod(region_size), *states.shape[-2:])


def _from_regions(parts: Tensor, region_size: Sequence[int], space: Sequence[int]) -> Tensor:
    """The inverse of `_to_regions`."""
    rank, sides = len(region_size), [n // r for n, r in zip(space, region_size, strict=True)]
    batch, heads, width = parts.shape[0], *parts.shape[-2:]
    parts = parts.reshape(batch, *sides, *region_size, heads, width)
    order = [axis for pair in zip(range(1, 1 + rank), range(1 + rank, 1 + 2 * rank), strict=True) for axis in pair]
    return parts.permute(0, *order, 1 + 2 * rank, 2 + 2 * rank).reshape(batch, *space, heads, width)


def _by_copies(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: float, attend: Callable[..., Tensor]
) -> Tensor:
    """Attention of every region over copies of its regions' tokens; all are `[B, regions, tokens, H, D]`."""
    batch, regions = key.shape[:2]
    first = torch.arange(batch, device=routes.device)[:, None, None] * regions
    rows = (routes + first).flatten()

    def chosen(states: Tensor) -> Tensor:
        # Whole rows: a gather of single numbers takes six times as long.
        found = states.flatten(0, 1).flatten(1).index_select(0, rows)
        return found.view(batch * regions, -1, *states.shape[3:])

    query, key, value = (t.transpose(1, 2) for t in (query.flatten(0, 1), chosen(key), chosen(value)))
    return attend(query, key, value, scale=scale).transpose(1, 2).unflatten(0, (batch, regions))


def _masked(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, region_size: Sequence[int], scale: float
) -> Tensor:
    """Attention of all pairs of positions `[B, *space, H, D]`, those of regions not chosen masked."""
    mask = region_mask(routes, query.shape[1:-2], region_size)[:, None]
    shape = value.shape
    query, key, value = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
    return scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2).reshape(shape)


def _in_place(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: float) -> Tensor:
    """The same by `block_sparse_attention`: a region is a block."""
    regions, tokens = query.shape[1:3]
    length = regions * tokens
    # Ascending and without repeats, as the pattern asks; its checked builder would wait for the device.
    blocks = routes.sort(-1).values.to(torch.int32)[:, None]
    pattern = BlockPattern(blocks, block_q=tokens, block_k=tokens, q_len=length, k_len=length)
    query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    out = block_sparse_attention(query, key, value, pattern, scale=scale)
    return out.transpose(1, 2).unflatten(1, (regions, tokens))
