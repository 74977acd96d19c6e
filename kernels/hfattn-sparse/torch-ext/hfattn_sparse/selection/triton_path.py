"""Block selection as three kernels: block means, and scores and rule of whole rows on chip or of rows in pieces."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..device_sequences import DeviceSequences, device_sequences
from ..launch import config, launch
from .rule import RULES, Rule
from .triton_kernels import block_means, choose_blocks, choose_blocks_in_pieces

# Programs that share the device when rows are taken in pieces; each keeps the scores of one row.
_PROGRAMS = 1024


def select_blocks(
    query: Tensor, key: Tensor, index: Tensor | None, rule: Rule, *, scale: float, sequences: int, shape: tuple
) -> Tensor:
    """Key blocks of every query block, int32 of the given shape; arguments as in `op.select_blocks`.

    The scores of up to `row` key blocks (see the configuration "select_blocks") stay on chip; longer rows pass through
    a scratch of one row a program. Memory beyond the result: the block means, in fp32.
    """
    batch, q_heads, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1:3]
    if index is None:
        lists = torch.empty(shape, dtype=torch.int32, device=query.device)
        queries = keys = None
        q_tiles, k_columns = shape[2], -(-k_len // rule.block_k)
    else:
        lists = torch.full(shape, -1, dtype=torch.int32, device=query.device)
        found = device_sequences(index, q_len, k_len, rule.causal)
        # Every sequence ends in at most one partial block.
        q_tiles = min(q_len, q_len // rule.block_q + sequences)
        k_columns = k_len // rule.block_k + sequences
        queries, keys = _query_tiles(found, rule, sequences, q_tiles), _key_tiles(found, rule, sequences, k_len)
    if not k_len:
        return lists.fill_(-1)
    q_means = torch.empty(batch, q_heads, q_tiles, query.shape[3], dtype=torch.float32, device=query.device)
    # Keys are read a dimension at a time, for many blocks at once.
    k_means = torch.empty(batch, kv_heads, query.shape[3], k_columns, dtype=torch.float32, device=query.device)
    _means(query, q_means, None if index is None else (found.q_rows, *queries[:3]), rule.block_q)
    _means(key, k_means.transpose(2, 3), None if index is None else (found.k_rows, *keys), rule.block_k)
    _choose(q_means, k_means, lists, None if index is None else queries[3], rule, scale, sequences, (q_len, k_len))
    return lists


def _query_tiles(found: DeviceSequences, rule: Rule, sequences: int, count: int) -> tuple[Tensor, ...]:
    """first, length and column of the query tiles, int32 `[B, count]`, and what `choose_blocks` reads of them."""
    tiles = found.query_tiles(rule.block_q)
    number = torch.arange(tiles.first.shape[1], device=tiles.first.device, dtype=torch.int32)
    alive = (number < tiles.count[:, None]) & (tiles.number < sequences)
    column = torch.where(alive, number, -1)
    # k_length 0: nothing to choose from.
    told = (tiles.block_id, tiles.number, tiles.q_length, torch.where(alive, tiles.k_length, 0), _column(tiles, rule))
    table = torch.stack([t[:, :count] for t in told], 1)
    return *(t[:, :count].contiguous() for t in (tiles.first, tiles.length, column)), table


def _key_tiles(found: DeviceSequences, rule: Rule, sequences: int, k_len: int) -> tuple[Tensor, ...]:
    """first, length and column (-1: void) of the key tiles, int32 `[B, T]`."""
    tiles = found.key_tiles(rule.block_k)
    count = min(k_len, k_len // rule.block_k + sequences)
    number = torch.arange(tiles.first.shape[1], device=tiles.first.device)
    alive = (number < tiles.count[:, None]) & (tiles.number < sequences)
    column = torch.where(alive, _column(tiles, rule) + tiles.block_id, -1)
    return tuple(t[:, :count].contiguous() for t in (tiles.first, tiles.length, column))


def _column(tiles, rule: Rule) -> Tensor:
    """Where the means of a sequence's keys begin: room for the partial block of every sequence before it."""
    return tiles.k_first // rule.block_k + tiles.number


def _means(tokens: Tensor, means: Tensor, tiles: tuple[Tensor, ...] | None, block: int) -> None:
    """Fill means `[B, H, T, D]` (any strides) from tokens `[B, H, N, D]`."""
    batch, heads, length, dim = tokens.shape
    rows, first, count, column = tiles or (None,) * 4
    launch(
        block_means,
        (means.shape[2] if first is None else first.shape[1], heads, batch),
        *(tokens, means, rows, first, count, column),
        *tokens.stride(),
        *means.stride(),
        *(length, means.shape[2] if first is None else first.shape[1], block),
        DIM=dim,
        WIDE=triton.next_power_of_2(dim),
        **config("block_means", dtype=tokens.dtype, head_dim=dim, device=tokens.device),
    )


def _choose(
    q_means: Tensor,
    k_means: Tensor,
    lists: Tensor,
    table: Tensor | None,
    rule: Rule,
    scale: float,
    sequences: int,
    lengths: tuple[int, int],
) -> None:
    batch, q_heads, tiles, dim = q_means.shape
    options = config("select_blocks", dtype=q_means.dtype, head_dim=dim, device=q_means.device)
    scores, row, piece = options.pop("scores"), options.pop("row"), options.pop("piece")
    blocks = -(-lengths[1] // rule.block_k)
    amount = {"top_k": int(rule.amount), "density": rule.density_units}.get(rule.name, 0)
    arguments = (q_means, k_means, lists, table, float(rule.amount), amount, scale, *lengths, tiles, k_means.shape[3])
    arguments += (*lists.shape[2:], blocks, rule.block_q, rule.block_k, rule.sinks, rule.local)
    meta = dict(RULE=RULES.index(rule.name), CAUSAL=rule.causal, PACKED=sequences > 1, DIM=dim, **options)
    group = q_heads // k_means.shape[1]
    if blocks <= row:
        columns = triton.next_power_of_2(blocks)
        # Rows of one program share the key means, so they have to be of one sequence.
        rows = 1 if sequences > 1 else max(1, min(scores // columns, 16, triton.next_power_of_2(tiles)))
        grid = (triton.cdiv(tiles, rows), q_heads, batch)
        launch(choose_blocks, grid, *arguments, group, ROWS=rows, COLUMNS=columns, **meta)
    else:
        rows = tiles * q_heads * batch
        programs = min(_PROGRAMS, rows)
        scratch = torch.empty(programs, blocks, dtype=torch.float32, device=q_means.device)
        launch(
            choose_blocks_in_pieces, (programs,), *arguments, group, q_heads, rows, programs, scratch,
            COLUMNS=piece, **meta,
        )  # fmt: skip
