"""Block selection as a custom op: sequences are cut out here, the cores see one each."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC, split_sequences, take
from . import reference, torch_path
from .rule import Rule


def select_blocks_reference(
    query: Tensor,
    key: Tensor,
    index: Tensor | None,
    block_q: int,
    block_k: int,
    rule: str,
    amount: float,
    sinks: int,
    local: int,
    causal: bool,
    scale: float,
    sequences: int,
) -> Tensor:
    """The reference form of `select_blocks`."""
    count("select_blocks", "reference")
    chosen_by = Rule(rule, amount, sinks, local, causal, block_q, block_k)
    with torch.no_grad():
        return _over_sequences(reference.select_blocks, query, key, index, chosen_by, scale, sequences)


@torch.library.custom_op(add_op_namespace_prefix("select_blocks"), mutates_args=(), tags=HOST_SYNC)
def select_blocks(
    query: Tensor,
    key: Tensor,
    index: Tensor | None,
    block_q: int,
    block_k: int,
    rule: str,
    amount: float,
    sinks: int,
    local: int,
    causal: bool,
    scale: float,
    sequences: int,
) -> Tensor:
    """Key blocks of every query block, int32 `[B | sequences, Hq, ceil(Nq / block_q), rule.width(Nk)]`.

    Args:
        query, key: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`.
        index: token index int32 `[B, 2, Nq + Nk]` (see `sequences.split_sequences`) or None.
        rule, amount, sinks, local: see `rule.Rule`.
        sequences: 1: every batch row holds one sequence, and has one row of the result; more: the one batch row holds
            up to so many sequences, and result row i belongs to the i-th of them.
    """
    count("select_blocks", "torch")
    chosen_by = Rule(rule, amount, sinks, local, causal, block_q, block_k)
    return _over_sequences(torch_path.select_blocks, query, key, index, chosen_by, scale, sequences)


@select_blocks.register_fake
def _(query, key, index, block_q, block_k, rule, amount, sinks, local, causal, scale, sequences):
    return query.new_empty(
        result_shape(query, key, Rule(rule, amount, sinks, local, causal, block_q, block_k), sequences),
        dtype=torch.int32,
    )


def result_shape(query: Tensor, key: Tensor, rule: Rule, sequences: int) -> tuple[int, ...]:
    """Shape of the lists; it depends on the sizes of a call only, never on the data."""
    rows = query.shape[0] if sequences == 1 else sequences
    return rows, query.shape[1], (query.shape[2] + rule.block_q - 1) // rule.block_q, rule.width(key.shape[2])


def _over_sequences(core, query, key, index, rule: Rule, scale: float, sequences: int) -> Tensor:
    shape = result_shape(query, key, rule, sequences)
    lists = torch.full(shape, -1, dtype=torch.int32, device=query.device)
    filled: set[int] = set()
    for s in split_sequences(index, query.shape[2], key.shape[2], rule.causal):
        row = s.batch if sequences == 1 else slice(s.number, s.number + 1)
        if (sequences == 1 and s.row in filled) or (sequences > 1 and s.number >= sequences):
            raise ValueError(
                f"a batch row holds more sequences than sequences={sequences}: pass max_sequences, and one batch row "
                "a call when it is more than 1"
            )
        filled.add(s.row)
        q, k = take(query, s.batch, s.q), take(key, s.batch, s.k)
        if q.shape[2] and k.shape[2]:
            found = core(q, k, rule, scale=scale, width=shape[3])
            lists[row, :, : found.shape[2], : found.shape[3]] = found
    return lists
