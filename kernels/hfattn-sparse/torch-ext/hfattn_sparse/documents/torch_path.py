"""Attention of a prompt of documents in plain torch: the documents of a row are a batch of small problems."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import native
from ..native import pays

# The compiled kernel takes calls of at least so many slots; shorter ones take less than a millisecond either way.
NATIVE_SLOTS = 64
# Elements of the keys `[documents, H, prefix + longest, D]`, and of the backward's scores, at a time.
MAX_GATHERED = 1 << 17


class Problem(NamedTuple):
    """Small attention problems of one size: problem i reads the queries at slots `rows[i]` and keys at `keys[i]`.

    rows int64 `[n, R]`; keys int64 `[n, K]`; allowed bool `[R, K]`; real bool `[n, R]`, False where a shorter
    document's rows repeat its first token; start: where the rows are consecutive slots and all real, the first one.
    """

    rows: Tensor
    keys: Tensor
    allowed: Tensor
    real: Tensor
    start: int | None


def takes_native(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether the compiled kernel takes the call: where it is built and faster, or asked for."""
    if native.obstacle(query, key, value, scale) is not None:
        return False
    return native.wanted() or (query.shape[2] >= NATIVE_SLOTS and pays(query, value))


def forward(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    """Prefix causal, each document against prefix and itself, the reader against everything real before it.

    Arguments and result as in the reference. Reads the table on the host.
    """
    padded = bool((table[:, 0] < 0).any())
    out = (query.new_zeros if padded else query.new_empty)(*query.shape[:3], value.shape[3])
    group = query.shape[1] // key.shape[1]
    for row, problem in _problems(table, key, value):
        picked = _queries(query[row], problem, group), _keys(key[row], problem), _keys(value[row], problem)
        part = scaled_dot_product_attention(*picked, scale=scale, attn_mask=problem.allowed.repeat(group, 1))
        part = _heads_first(part, group)
        _write(out[row], problem, part)
    return out


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for `forward` with the same arguments; weights are computed again."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    for row, problem in _problems(table, key, value, scores=query.shape[1]):
        # Rows that only fill up a shorter document get no gradient.
        grads = _queries(grad_out[row], problem, group).to(dtype)
        grads = grads * problem.real.repeat(1, group)[:, None, :, None]
        rows, keys, values = (
            x.to(dtype)
            for x in (_queries(query[row], problem, group), _keys(key[row], problem), _keys(value[row], problem))
        )
        scores = (rows @ keys.mT * scale).masked_fill(~problem.allowed.repeat(group, 1), float("-inf"))
        weights = scores.softmax(-1)
        grad_weights = grads @ values.mT
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
        _write(grad_query[row], problem, _heads_first(grad_scores @ keys, group).to(query.dtype))
        slots = problem.keys.flatten()
        for into, part in ((grad_key, grad_scores.mT @ rows), (grad_value, weights.mT @ grads)):
            into[row].index_add_(1, slots, part.transpose(0, 1).flatten(1, 2))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _problems(table: Tensor, key: Tensor, value: Tensor, scores: int = 0) -> Iterator[tuple[int, Problem]]:
    """Every batch row's problems; with `scores` query heads, few enough at a time to hold their scores."""
    heads, width = key.shape[1], max(key.shape[3], value.shape[3])
    for row, (segments, _, roles) in enumerate(table.cpu().unbind()):
        for problem in _row_problems(segments, roles):
            most = max(problem.keys.shape[1] * max(heads * width, scores * problem.rows.shape[1]), 1)
            step = max(MAX_GATHERED // most, 1)
            for start in range(0, problem.rows.shape[0], step):
                some = slice(start, start + step)
                part = problem.rows[some], problem.keys[some], problem.allowed, problem.real[some]
                begin = None if problem.start is None else problem.start + start * problem.rows.shape[1]
                yield row, Problem(*(x.to(key.device) for x in part), begin)


def _row_problems(segments: Tensor, roles: Tensor) -> Iterator[Problem]:
    """The problems of a row from its segments and roles `[N]`, on the host: prefix, all documents, reader."""
    real = segments >= 0
    prefix, documents, reader = ((real & (roles == role)).nonzero()[:, 0] for role in (0, 1, 2))
    for rows, keys in ((prefix, prefix), (reader, real.nonzero()[:, 0])):
        if rows.numel():
            all_real = torch.ones(1, rows.numel(), dtype=torch.bool)
            yield Problem(rows[None], keys[None], keys <= rows[:, None], all_real, _start(rows))
    if not documents.numel():
        return
    documents = documents[segments[documents].argsort(stable=True)]
    lengths = segments[documents].unique_consecutive(return_counts=True)[1]
    first, longest = (lengths.cumsum(0) - lengths)[:, None], int(lengths.max())
    within = torch.arange(longest)[None]
    inside = within < lengths[:, None]
    rows = documents[first + torch.where(inside, within, 0)]
    # Slots that fill up stand behind the real ones, so causality hides them.
    own = torch.ones(longest, longest, dtype=torch.bool).tril()
    allowed = torch.cat([own.new_ones(longest, prefix.numel()), own], 1)
    yield Problem(
        rows,
        torch.cat([prefix.expand(len(rows), -1), rows], 1),
        allowed,
        inside,
        _start(rows) if bool(inside.all()) else None,
    )


def _queries(tensor: Tensor, problem: Problem, group: int) -> Tensor:
    """`[Hq, N, D]` -> `[n, H, group * R, D]`: the query heads of a KV head are rows of one problem."""
    if problem.start is None:
        picked = _pick(tensor, problem.rows)
    else:  # a view: the reshape below is then the only copy
        picked = _run(tensor, problem).transpose(0, 1)
    return picked.unflatten(1, (-1, group)).flatten(2, 3)


def _heads_first(tensor: Tensor, group: int) -> Tensor:
    """The way back: `[n, H, group * R, D]` -> `[Hq, n, R, D]`."""
    return tensor.unflatten(2, (group, -1)).permute(1, 2, 0, 3, 4).flatten(0, 1)


def _keys(tensor: Tensor, problem: Problem) -> Tensor:
    """`[H, N, D]` -> `[n, H, K, D]`."""
    return _pick(tensor, problem.keys)


def _pick(tensor: Tensor, slots: Tensor) -> Tensor:
    """`[H, N, D]` -> `[n, H, K, D]` for slots `[n, K]`."""
    if slots.numel() == tensor.shape[1] and slots.shape[0] == 1:  # rising slots, so all of them
        return tensor[None]
    # Hosts keep the heads of a token together; index_select would copy all of such a tensor to pick along dim 1.
    if tensor.transpose(0, 1).is_contiguous():
        return tensor.transpose(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)
    return tensor.index_select(1, slots.flatten()).unflatten(1, slots.shape).transpose(0, 1)


def _write(into: Tensor, problem: Problem, part: Tensor) -> None:
    """Put the real rows of `[Hq, n, R, D]` at their slots of `[Hq, N, D]`."""
    if problem.start is None:
        into.index_copy_(1, problem.rows[problem.real], part[:, problem.real])
    else:
        _run(into, problem).copy_(part)


def _run(tensor: Tensor, problem: Problem) -> Tensor:
    """Consecutive rows as a view, `[H, N, D]` -> `[H, n, R, D]`."""
    return tensor.narrow(1, problem.start, problem.rows.numel()).unflatten(1, problem.rows.shape)


def _start(rows: Tensor) -> int | None:
    """The first slot, when the slots are consecutive."""
    rows = rows.flatten()
    return int(rows[0]) if bool((rows.diff() == 1).all()) else None
