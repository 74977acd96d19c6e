"""Landmark attention behind a cache: choose blocks by their landmarks, fetch them, attend (arXiv 2305.16300).

Rotary embeddings are a group, so a key that was turned by its place inside its block can stand anywhere: the query is
turned by its distance to the block's first position. A block at distance `a` means: its first position is `a` blocks
before the open block's. The newest blocks stand at their true distance or, when fetched, one slot behind it; all older
landmarks are scored at the one distance `k + 1`. No distance ever exceeds the chunk and `k + 1` blocks, which is what a
training row holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.call import TokenLayout

# Numbers of fetched keys and values held at a time.
MAX_FETCHED = 1 << 22
NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class Rotary:
    """Half-rotation by position, in fp32.

    Args:
        frequencies: fp32 `[D / 2]`, radians a position.
        scaling: factor that the host puts on its sines and cosines; here it goes into the scores, squared.
    """

    frequencies: Tensor
    scaling: float = 1.0

    @classmethod
    def of(cls, embedding: Any) -> Rotary:
        """Of a rotary embedding of transformers (`inv_freq`, `attention_scaling`)."""
        return cls(embedding.inv_freq.float(), float(embedding.attention_scaling))

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[..., D / 2]` of positions `[...]`."""
        angles = positions[..., None].float() * self.frequencies
        return angles.cos(), angles.sin()

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """`[..., D]` turned by positions that broadcast to `[...]`; same dtype."""
        return turn(states, self.tables(positions))


def turn(states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """`[..., D]` turned by the angles of `Rotary.tables`, in fp32; same dtype."""
    cos, sin = tables
    first, second = states.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(states.dtype)


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What a query reads of the cache.

    Args:
        block_size: tokens of a block, its landmark included.
        top_k: blocks, >= 1.
        selection: "per_token_and_head", "max_over_heads", "max_over_tokens", "random" or "none".
        kv_group: one set for the query heads of a KV head.
        keep: called with the chosen block ids `[B, Hq, M, k]` of every layer, for analysis; None for nobody.
    """

    block_size: int
    top_k: int
    selection: str = "per_token_and_head"
    kv_group: bool = False
    keep: Any = None

    @classmethod
    def of(cls, config: Any) -> Retrieval:
        """Of a landmark model's config."""
        grouped = config.landmark_retrieval_heads == "kv_group"
        return cls(config.landmark_block_size, config.landmark_top_k, config.landmark_selection, grouped)


class Chunk:
    """New tokens of a call, at the right of `[B, width]`; rows may bring different numbers, or none.

    Args:
        counts: new tokens by row.
        width: the largest count.
    """

    def __init__(self, counts: list[int], width: int, device: torch.device | str) -> None:
        self.counts, self.width, self.device = counts, width, torch.device(device)
        self.even = all(count == width for count in counts)
        self._counts = torch.tensor(counts, device=device)
        self.real = torch.arange(width, device=device) >= width - self._counts[:, None]
        self._made: dict[tuple, Any] = {}

    def once(self, store: Any, name: str, make: Callable[[], Any]) -> Any:
        """What is the same for all layers, whose stores hold equal numbers of tokens: made by the first of them."""
        key = (name, tuple(store.blocks), tuple(store.open_lengths))
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def columns(self, starts: list[int]) -> Tensor:
        """int64 `[B, width]`: a row's first new token has number `starts[row]`; smaller ones are not real."""
        first = torch.tensor(starts, device=self.device) - (self.width - self._counts)
        return first[:, None] + torch.arange(self.width, device=self.device)


def attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: Any,
    chunk: Chunk,
    rotary: Rotary,
    options: Retrieval,
    *,
    scale: float,
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """Attention of a chunk to `top_k` cached blocks, the open block and itself; the chunk waits in `store`.

    Args:
        query, key, value: `[B, Hq, M, D]`, `[B, Hkv, M, D]`, `[B, Hkv, M, Dv]`, without position encoding.
        store: `hf_attn.caches.landmark.LandmarkStore` of this layer.

    Returns `[B, Hq, M, Dv]` (rows that are not real hold anything finite) and what was read: `blocks_read` and
    `blocks_cached`, summed over queries and heads; for single new tokens also as `decode_blocks_*`.
    """
    scale = scale * rotary.scaling**2
    store.hold(key, value, chunk, rotary)
    if _is_step(store, chunk, options):
        out = _step(query, key, value, store, chunk, rotary, options, scale)
        return out, _counts(query.shape[1], chunk, store.blocks, options.top_k)
    place = chunk.once(store, "place", lambda: chunk.columns(store.open_lengths))
    out, lse = _local(query, key, value, store, chunk, place, rotary, options.block_size, scale)
    blocks = store.blocks
    most = max(blocks, default=0)
    if most == 0 or options.selection == "none":
        return out, _counts(query.shape[1], chunk, blocks, 0)
    taken = [min(options.top_k, number) for number in blocks]

    def tables() -> tuple[Tensor, Tensor]:
        distances = 1 + torch.arange(max(taken) + 1, device=query.device)
        return rotary.tables((place[:, :, None] + distances * options.block_size)[:, None])

    turned = turn(query[:, :, :, None], chunk.once(store, "distances", tables))
    ids = select_blocks(turned, store, taken, chunk, options, scale)
    if options.keep is not None:
        options.keep(ids.expand(-1, query.shape[1], query.shape[2], -1))
    out = _retrieved(out, lse, turned, ids, store, chunk, options.block_size, scale)
    return out, _counts(query.shape[1], chunk, blocks, options.top_k)


def _is_step(store: Any, chunk: Chunk, options: Retrieval) -> bool:
    """Whether every row brings one token into an open block of equal length behind equally many blocks."""
    return (
        chunk.width == 1
        and chunk.even
        and store.blocks[0] > 0
        and len(set(store.blocks)) == len(set(store.open_lengths)) == 1
        and store.open_lengths[0] + 1 < options.block_size
        and options.selection == "per_token_and_head"
        and not options.kv_group
    )


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: Any,
    chunk: Chunk,
    rotary: Rotary,
    options: Retrieval,
    scale: float,
) -> Tensor:
    """The general way for the commonest call, in which nothing depends on the row: a third of its operations.

    At one token each operation costs as much as what it computes, so one softmax weighs the open block and landmarks.
    """
    device, size = query.device, options.block_size
    blocks, place = store.blocks[0], store.open_lengths[0]
    taken = min(options.top_k, blocks)
    old = blocks - taken

    def tables() -> tuple[list[Tensor], tuple[Tensor, Tensor], Tensor]:
        # Distance 0 is the open block, then the nearest blocks, then the one place of all older ones.
        queries = rotary.tables(place + size * torch.arange(taken + 2, device=device))
        keys = rotary.tables(torch.arange(place + 1, device=device))
        return [table * scale for table in queries], keys, taken + 1 - torch.arange(taken, device=device)

    for_query, for_keys, slots = chunk.once(store, "step", tables)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    turned = turn(query, for_query).to(dtype)
    keys, values, _ = store.local(key, value, chunk)
    landmarks = store.landmark_keys(blocks).to(dtype)
    far = _grouped(turned[:, :, -1:], landmarks[:, :, :old])
    near = turned[:, :, 1:-1].flip(2).reshape(query.shape[0], store.heads, -1, taken, query.shape[3])
    near = (near * landmarks[:, :, None, old:]).sum(-1).view(*query.shape[:2], 1, taken)
    ids = _highest(torch.cat([far, near], -1), taken).sort(-1).values
    if options.keep is not None:
        options.keep(ids)
    # One slot lies empty between the newest blocks and older ones.
    distance = slots - (ids >= old).long()
    queries = turned.gather(2, distance.view(*query.shape[:2], taken, 1).expand(-1, -1, -1, query.shape[3]))
    fetched_keys, fetched_values = store.fetch(ids)
    inside = (fetched_keys[:, :, 0].to(dtype) @ queries[..., None]).squeeze(-1)
    near = _grouped(turned[:, :, :1], turn(keys, for_keys).to(dtype))
    gates = torch.cat([near, inside[:, :, None, :, -1]], -1).softmax(-1)
    inside[..., -1] = NEG_INF
    weights = (inside.softmax(-1) * gates[:, :, 0, place + 1 :, None]).flatten(2)[:, :, None]
    read = weights @ fetched_values[:, :, 0].to(dtype).flatten(2, 3)
    return (_grouped(gates[..., : place + 1], values.to(dtype).mT) + read).to(query.dtype)


def select_blocks(
    turned: Tensor, store: Any, taken: list[int], chunk: Chunk, options: Retrieval, scale: float
) -> Tensor:
    """Block ids int64 `[B, Hq, M, k]`, ascending, `most` (the largest number of blocks) where a row has fewer.

    The head or token axis has size 1 where all share a set. On equal scores the lower id wins.

    Args:
        turned: `[B, Hq, M, k + 1, D]`, queries turned for blocks at distance 1 .. k + 1.
        taken: blocks that the queries of a row read.
    """
    most, device = max(store.blocks), turned.device

    def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        blocks, limits = (torch.tensor(numbers, device=device) for numbers in (store.blocks, taken))
        real = torch.arange(most, device=device) < blocks[:, None]
        return blocks, limits, real[:, None, None], torch.arange(max(taken), device=device) >= limits[:, None]

    blocks, limits, real, spare = chunk.once(store, "rows", rows)
    if options.selection == "random":
        scores = torch.rand(*turned.shape[:3], most, device=device)
    else:
        scores = _landmark_scores(turned, store, limits, blocks) * scale
    scores = scores.masked_fill(~real, NEG_INF)
    shared = options.selection.startswith("max_over")
    if shared or options.kv_group:
        scores = scores.softmax(-1).nan_to_num(0.0).masked_fill(~real, -1)
        if options.kv_group and options.selection != "max_over_heads":
            group = turned.shape[1] // store.heads
            scores = scores.unflatten(1, (-1, group)).amax(2).repeat_interleave(group, 1)
        if options.selection == "max_over_heads":
            scores = scores.amax(1, keepdim=True)
        elif options.selection == "max_over_tokens":
            scores = scores.masked_fill(~chunk.real[:, None, :, None], -1).amax(2, keepdim=True)
    found = _highest(scores, max(taken))
    return found.masked_fill(spare[:, None, None], most).sort(-1).values


def _highest(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` highest scores; on equal ones the first wins, which topk alone does not promise."""
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    # Integers in the order of the floats, with the place below them.
    bits = (scores.float() + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    return (ordered - torch.arange(scores.shape[-1], device=scores.device)).topk(count, -1).indices


def _landmark_scores(turned: Tensor, store: Any, limits: Tensor, blocks: Tensor) -> Tensor:
    """`[B, Hq, M, most]`: the newest landmarks at their true distance, all others at `k + 1`."""
    batch, heads, width, steps, dim = turned.shape
    landmarks = store.landmark_keys(int(max(store.blocks)))
    dtype = torch.float64 if turned.dtype == torch.float64 else torch.float32
    far = turned.gather(3, limits[:, None, None, None, None].expand(batch, heads, width, 1, dim)).squeeze(3)
    scores = _grouped(far.to(dtype), landmarks.to(dtype))
    # Distance a = 1 .. k is block N - a.
    near = torch.arange(1, steps, device=turned.device)
    ids = blocks[:, None] - near
    picked = landmarks.gather(2, ids.clamp(min=0)[:, None, :, None].expand(-1, landmarks.shape[1], -1, dim)).to(dtype)
    close = turned[:, :, :, : steps - 1].to(dtype).unflatten(1, (landmarks.shape[1], -1))
    close = (close * picked[:, :, None, None]).sum(-1).flatten(1, 2)
    spare = (near > limits[:, None]) | (ids < 0)
    ids = ids.masked_fill(spare, scores.shape[-1])[:, None, None].expand(-1, heads, width, -1)
    padded = torch.cat([scores, scores.new_zeros(*scores.shape[:3], 1)], -1)
    return padded.scatter(3, ids, close)[..., :-1]


def _local(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: Any,
    chunk: Chunk,
    place: Tensor,
    rotary: Rotary,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The open block and the chunk: a grouped softmax; its lse is over everything but cached landmarks."""
    keys, values, lengths = store.local(key, value, chunk)
    slots = torch.arange(keys.shape[2], device=query.device)
    angles = chunk.once(store, "local", lambda: (rotary.tables(place[:, None]), rotary.tables(slots)))
    query, keys = turn(query, angles[0]), turn(keys, angles[1])
    if chunk.even and chunk.width == 1 and 0 < min(lengths) == max(lengths) < block_size:
        # One new token inside an open block sees that block alone.
        return _softmax(query, keys, values, scale)
    tokens = None
    if not (chunk.even and len(set(lengths)) == 1):
        held = slots < torch.tensor(lengths, device=query.device)[:, None]
        segment = torch.cat([chunk.real, held], 1)
        positions = torch.cat([place, slots.expand_as(held)], 1)
        index = torch.stack([torch.where(segment, 0, -1), positions], 1).to(torch.int32)
        tokens = TokenLayout(query.shape[0], query.shape[2], keys.shape[2], index)
    return ops.grouped_softmax_attention(
        query, keys, values, block_size=block_size, scale=scale, return_lse=True, tokens=tokens
    )


def _softmax(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to all keys, and its lse."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = _grouped(query.to(dtype), keys.to(dtype)) * scale
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return _grouped(weights, values.to(dtype).mT).to(query.dtype), lse


def _retrieved(
    out: Tensor,
    lse: Tensor,
    turned: Tensor,
    ids: Tensor,
    store: Any,
    chunk: Chunk,
    block_size: int,
    scale: float,
) -> Tensor:
    """Add fetched blocks to the softmax of `_local`, some queries at a time so that little is fetched at once."""
    blocks, limits = (x[:, None, None, None] for x in chunk.once(store, "rows", tuple)[:2])
    valid = ids < blocks
    slot = torch.arange(ids.shape[-1], device=out.device)
    distance = (limits + 1 - slot - (ids >= blocks - limits).long()).clamp(min=1, max=turned.shape[3])
    heads, width = out.shape[1:3]
    shared = ids.shape[2] == 1 and width > 1
    ids, valid, distance = (x.expand(-1, heads, -1, -1) for x in (ids, valid, distance))
    each = out.shape[0] * heads * ids.shape[-1] * block_size * (turned.shape[-1] + out.shape[-1])
    step = width if shared else max(MAX_FETCHED // max(each, 1), 1)
    fetched = store.fetch(ids, valid) if shared else None
    parts = []
    for start in range(0, width, step):
        rows = slice(start, start + step)
        pick = slice(None) if shared else rows
        keys, values = fetched or store.fetch(ids[:, :, pick], valid[:, :, pick])
        queries = _at(turned[:, :, rows], distance[:, :, pick])
        parts.append(_merge(out[:, :, rows], lse[:, :, rows], queries, keys, values, valid[:, :, pick], scale))
    return torch.cat(parts, 2) if len(parts) != 1 else parts[0]


def _at(turned: Tensor, distance: Tensor) -> Tensor:
    """Queries `[B, H, R, k, D]` turned for the distance of every fetched block."""
    where = (distance - 1)[..., None].expand(-1, -1, turned.shape[2], -1, turned.shape[-1])
    return turned.gather(3, where)


def _merge(
    out: Tensor, lse: Tensor, queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scale: float
) -> Tensor:
    """One softmax over what `lse` stands for and the landmarks; queries `[B, H, R, k, D]`, keys `[B, H, R|1, k, b, D]`.

    A block that is not valid has no weight, whatever it holds.
    """
    dtype = lse.dtype
    scores = (keys.to(dtype) @ queries[..., None].to(dtype)).squeeze(-1) * scale
    inner = scores[..., :-1].softmax(-1)
    read = (inner[..., None, :] @ values[..., :-1, :].to(dtype)).squeeze(-2)
    gates = torch.cat([lse[..., None], scores[..., -1].masked_fill(~valid, NEG_INF)], -1).softmax(-1).nan_to_num(0.0)
    whole = out.to(dtype) * gates[..., :1] + (gates[..., None, 1:] @ read).squeeze(-2)
    return whole.to(out.dtype)


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """`[B, Hq, M, D]`, `[B, Hkv, N, D]` -> scores `[B, Hq, M, N]`."""
    batch, heads, width, dim = query.shape
    rows = query.reshape(batch, key.shape[1], -1, dim) @ key.mT
    return rows.view(batch, heads, width, -1)


def _counts(heads: int, chunk: Chunk, blocks: list[int], top_k: int) -> dict[str, float | Tensor]:
    pairs = list(zip(chunk.counts, blocks, strict=True))
    cached = heads * sum(count * number for count, number in pairs)
    read = heads * sum(count * min(top_k, number) for count, number in pairs)
    found: dict[str, float | Tensor] = {"blocks_read": read, "blocks_cached": cached}
    # One token, or a token and the landmark behind it.
    single = [(min(count, 1), number) for count, number in pairs if count <= 2]
    if len(single) == len(pairs):
        found["decode_blocks_read"] = heads * sum(count * min(top_k, number) for count, number in single)
        found["decode_blocks_cached"] = heads * sum(count * number for count, number in single)
    return found
