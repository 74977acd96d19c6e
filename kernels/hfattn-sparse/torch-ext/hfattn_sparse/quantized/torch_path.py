"""Quantised block-sparse attention in plain PyTorch: integer products where the CPU has instructions for them.

A tile is one query block of one head with the keys of all blocks it reads; its scores stay in a core's own cache from
the integer product to the last one.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .codes import SMALLEST, accumulator, qmax, quantize_channels, quantize_groups

# Scores are exponentiated as they are; rows whose sum left this range are computed again with their maximum subtracted.
_SAFE = math.exp(60.0)
# Shortest product whose sum of codes could leave the integers that fp32 holds exactly.
_EXACT_DIM = 2**24 // 127**2


@cache
def has_int8_products() -> bool:
    """Whether this CPU multiplies int8 matrices with instructions made for it (AVX-512 VNNI or AVX VNNI)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_vnni_supported", "_is_avx512_vnni_supported"))
    supported = any(bool(check()) for check in checks if check is not None)
    return supported and torch.backends.mkldnn.is_available()


@torch.no_grad()
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    key_mask: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    q_group: int,
    k_group: int,
    qk_bits: int | None,
    pv_bits: int | None,
    scale: float,
) -> Tensor:
    """As `reference.forward`. On a CPU with int8 instructions q k^T is an integer product, and with `pv_bits=None` P V
    runs in bf16 (fp16 stays fp16); elsewhere products of codes run in fp32, which holds their sums exactly.
    """
    batch, heads, q_len, _ = query.shape
    out = query.new_zeros(*query.shape[:3], value.shape[3], dtype=accumulator(query.dtype))
    if not (out.numel() and key.shape[2] and indices.numel()):
        return out.to(query.dtype)
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    block_k = min(block_k, key.shape[2])
    tables = _Tables(query, key, value, block_k, q_group, k_group, qk_bits, pv_bits, scale)
    lists = _lists(indices, -(-key.shape[2] // block_k))
    counts = (lists >= 0).sum(-1)
    # Keys that the tiles really have: the last block may be shorter.
    short = (lists == -(-key.shape[2] // block_k) - 1).any(-1) * (-key.shape[2] % block_k)
    counts, sizes = counts.tolist(), (counts * block_k - short).tolist()
    for b in range(batch):
        hidden = None if key_mask is None else ~key_mask[b % key_mask.shape[0]]
        for h in range(heads):
            row, column = b % lists.shape[0], h * lists.shape[1] // heads
            tiles = [
                (slice(i * block_q, min((i + 1) * block_q, q_len)), lists[row, column, i, :count], size)
                for i, (count, size) in enumerate(zip(counts[row][column], sizes[row][column], strict=True))
                if count
            ]
            tables.head(b, h, tiles, hidden, out[b, h])
    return out.to(query.dtype)


def _lists(indices: Tensor, blocks: int) -> Tensor:
    """Lists ascending, each block once, -1 last."""
    if int(indices.max()) >= blocks:
        raise ValueError(f"indices name key block {int(indices.max())}, but there are only {blocks}.")
    lists = torch.where(indices < 0, blocks, indices).long().sort(-1).values
    twice = torch.zeros_like(lists, dtype=torch.bool)
    twice[..., 1:] = lists[..., 1:] == lists[..., :-1]
    lists = lists.masked_fill(twice, blocks).sort(-1).values
    return torch.where(lists == blocks, -1, lists)


# Rows of the query, key blocks ascending int64 [n], and their number of keys.
Tile = tuple[slice, Tensor, int]


class _Tables:
    """Codes and scales of one call, key blocks as rows that can be gathered, and the scratch memory of a tile."""

    def __init__(self, query, key, value, block: int, q_group, k_group, qk_bits, pv_bits, scale: float) -> None:
        self.block, self.length, self.scale = block, key.shape[2], scale
        self.group = query.shape[1] // key.shape[1]
        self.qk_bits, self.pv_bits, self.q_group = qk_bits, pv_bits, q_group
        self.dtype = accumulator(query.dtype)
        fast = query.device.type == "cpu" and self.dtype == torch.float32 and has_int8_products()
        self.integer = fast and qk_bits is not None
        if qk_bits is None:
            self.query, self.key = query.to(self.dtype).contiguous(), self._table(key.to(self.dtype))
        else:
            q_codes, self.q_scale = quantize_groups(query, qk_bits, q_group)
            k_codes, k_scale = quantize_groups(key, qk_bits, k_group)
            # One factor a key, as a block need not be a whole number of groups.
            self.k_scale = self._table(k_scale.repeat_interleave(k_group, 2)[:, :, : self.length, None])
            exact = torch.float32 if query.shape[3] <= _EXACT_DIM else torch.float64
            kind = torch.int8 if self.integer else exact
            self.query, self.key = q_codes.to(kind), self._table(k_codes.to(kind))
        if pv_bits is None:
            half = query.dtype if query.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
            self.product = half if fast and (qk_bits is not None or query.dtype == half) else self.dtype
            self.value = self._table(value.to(self.product))
        else:
            codes, sv = quantize_channels(value, pv_bits)
            self.product = self.dtype
            self.value = self._table(codes.to(self.dtype) * sv[:, :, None])
        self._flat: dict[str, Tensor] = {}

    def _table(self, x: Tensor) -> Tensor:
        """`[B, H, N, D]` -> `[B, H, blocks, block * D]`."""
        padding = -x.shape[2] % self.block
        if padding:
            x = torch.nn.functional.pad(x, (0, 0, 0, padding))
        return x.reshape(*x.shape[:2], x.shape[2] // self.block, self.block * x.shape[3])

    def head(self, b: int, h: int, tiles: list[Tile], hidden: Tensor | None, out: Tensor) -> None:
        """Write the rows of `tiles` of one head: out `[Nq, Dv]`."""
        kv = h // self.group
        self.q, self.k, self.v = self.query[b, h], self.key[b, kv], self.value[b, kv]
        if self.qk_bits is not None:
            self.q_factor = (self.q_scale[b, h] * self.scale).tolist()
            self.k_factor = self.k_scale[b, kv]
        parts = self._scratch("parts", (len(out), out.shape[1]), self.product).zero_()
        totals = self._scratch("totals", (len(out), 1), self.dtype).fill_(1)
        plain = self.pv_bits is None and hidden is None and self.product != torch.float16
        for tile in tiles:
            self._attend(tile, hidden, plain, parts, totals)
        if plain:
            outside = ~((totals > 1 / _SAFE) & (totals < _SAFE))
            if bool(outside.any()):
                for tile in tiles:
                    if bool(outside[tile[0]].any()):
                        self._attend(tile, hidden, False, parts, totals)
        torch.div(parts, totals.masked_fill_(totals == 0, 1), out=out)

    def _attend(self, tile: Tile, hidden: Tensor | None, plain: bool, parts: Tensor, totals: Tensor) -> None:
        """One tile: unnormalised rows of `parts` `[Nq, Dv]` and of `totals` `[Nq, 1]`; maxima are subtracted unless
        `plain`."""
        rows, blocks, real = tile
        scores = self._scores(rows, blocks, real)
        if hidden is not None:
            token = (blocks[:, None] * self.block + torch.arange(self.block, device=blocks.device)).flatten()[:real]
            scores.masked_fill_(hidden[token], float("-inf"))
        if not plain:
            top = scores.amax(1, keepdim=True)
            scores.sub_(top.masked_fill_(top == float("-inf"), 0))
        weights = scores.exp_()
        torch.sum(weights, 1, keepdim=True, out=totals[rows])
        if self.pv_bits is not None:
            self._round(weights, len(blocks))
        if self.product != weights.dtype:
            weights = self._scratch("low", weights.shape, self.product).copy_(weights)
        torch.mm(weights, self._take("value", self.v, blocks, real), out=parts[rows])

    def _scores(self, rows: slice, blocks: Tensor, real: int) -> Tensor:
        """`[rows, keys]`, scaled."""
        query = self.q[rows]
        key = self._take("key", self.k, blocks, real)
        shape = (len(query), real)
        if self.qk_bits is None:
            return torch.mm(query, key.mT, out=self._scratch("scores", shape, self.dtype)).mul_(self.scale)
        scores = self._scratch("scores", shape, self.dtype)
        if self.integer:
            # Each integer becomes a float in its own place: half the memory, so that it stays in the cache.
            scores.copy_(torch._int_mm(query, key.mT, out=scores.view(torch.int32)))
        else:
            scores = torch.mm(query, key.mT).to(self.dtype)
        factor = self._take("factor", self.k_factor, blocks, real).view(-1)
        first = rows.start
        while first < rows.stop:
            # A query block need not be a whole number of groups either.
            stop = min((first // self.q_group + 1) * self.q_group, rows.stop)
            scores[first - rows.start : stop - rows.start].mul_(factor * self.q_factor[first // self.q_group])
            first = stop
        return scores

    def _round(self, weights: Tensor, blocks: int) -> None:
        """Round P `[rows, keys]` in place with one scale a block."""
        whole = blocks if weights.shape[1] == blocks * self.block else blocks - 1
        cut = whole * self.block
        parts = [weights[:, :cut].unflatten(1, (whole, self.block))] if whole else []
        parts += [weights[:, None, cut:]] if cut < weights.shape[1] else []
        for part in parts:
            step = part.amax((0, 2), keepdim=True).clamp_(min=SMALLEST) / qmax(self.pv_bits)
            part.div_(step).round_().mul_(step)

    def _take(self, name: str, table: Tensor, blocks: Tensor, real: int) -> Tensor:
        """Keys of blocks `[real, D]` out of a table `[blocks, block * D]`."""
        picked = self._scratch(name, (len(blocks), table.shape[1]), table.dtype)
        torch.index_select(table, 0, blocks, out=picked)
        return picked.view(len(blocks) * self.block, -1)[:real]

    def _scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory that lives as long as the call; fresh memory would cost a page fault every 4 KiB."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size or flat.dtype != dtype:
            flat = self._flat[name] = torch.empty(size, dtype=dtype, device=self.q.device)
        return flat[:size].view(shape)
