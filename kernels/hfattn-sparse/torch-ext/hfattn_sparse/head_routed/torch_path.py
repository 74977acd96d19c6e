"""Head-routed attention in plain torch: the rows that chose a head are gathered, and cut where their keys end.

Query heads that share a KV head read the same keys, so their rows are gathered together, ascending. Rows of one span of
positions need a mask for the keys of that span only; of the keys before it they see all. So the keys of a row fall into
three ranges: its span, the spans before it in a larger one, and all before that, which many rows read in one call. The
ranges are computed by torch's fused attention and merged by their log-sum-exps. One masked call over all keys would be
slower than dense attention. Heads that every row chose take no gathering.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Positions of a span, spans of a larger one. Short spans mask few pairs in vain, but leave the fused kernel few rows.
SPAN, SPANS = 128, 8
# Gathered rows of a span that the fused kernel needs to be fast; spans are longer where heads are chosen rarely.
ROWS = 192
# Rows a call may have to be computed by plain products, without a copy of the keys.
FEW_ROWS = 16
# Dense attention is as fast below these: rows of the batch times keys of a decoding step; in a prefill, rows that an
# average head skips, and their share of all rows.
MIN_DECODE, MIN_ROWS_SKIPPED, MIN_SKIPPED = 2048, 850, 0.15

_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_fused_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def prefers_dense(heads: Tensor, k_len: int) -> bool:
    """Whether computing all heads is at least as fast: short calls, and those that skip little."""
    batch, _, q_len = heads.shape
    if q_len <= FEW_ROWS:
        return batch * k_len < MIN_DECODE
    skipped = 1 - float(heads.sum(dtype=torch.float64)) / max(1, heads.numel())
    return skipped * q_len < MIN_ROWS_SKIPPED or skipped < MIN_SKIPPED


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    dense: bool,
) -> None:
    """Write what `reference.forward` returns for the chosen pairs into out `[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`.

    The caller has filled those with 0 and -inf. `dense` computes all heads.
    """
    group, q_len = query.shape[1] // key.shape[1], query.shape[2]
    chosen = torch.ones_like(heads) if dense else heads
    whole = _whole_heads(chosen, query, key, value, causal)
    for batch, head in whole:
        at = batch, head // group
        part, sums = _fused(*_lift(query[batch, head], key[at], value[at]), 0.0, causal, scale=scale)
        out[batch, head], lse[batch, head] = part[0, 0], sums[0, 0]
    for batch, kv_head, members, rows in _gathered(_without(chosen, whole), group, key.shape[2], causal):
        at = slice(kv_head * group, (kv_head + 1) * group)
        tensors = query[batch, at][members, rows], key[batch, kv_head], value[batch, kv_head]
        out[batch, at][members, rows], lse[batch, at][members, rows] = _merged(*tensors, rows, q_len, causal, scale)
    if dense:
        out.masked_fill_(~heads[..., None], 0)
        lse.masked_fill_(~heads, float("-inf"))


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; weights are computed again from the log-sum-exps."""
    group, q_len, wide = query.shape[1] // key.shape[1], query.shape[2], _wide(query.dtype)
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (key, value))
    whole = _whole_heads(heads, query, key, value, causal)
    for batch, head in whole:
        at = batch, head // group
        tensors = grad_out[batch, head], query[batch, head], key[at], value[at], out[batch, head]
        sums = lse[batch, head][None, None]
        dq, dk, dv = _fused_backward(*_lift(*tensors), sums, 0.0, causal, scale=scale)
        grad_query[batch, head] = dq[0, 0]
        grad_key[at] += dk[0, 0]
        grad_value[at] += dv[0, 0]
    for batch, kv_head, members, rows in _gathered(_without(heads, whole), group, key.shape[2], causal):
        at = slice(kv_head * group, (kv_head + 1) * group)
        picked = [x[batch, at][members, rows] for x in (query, grad_out, out, lse)]
        k, v = key[batch, kv_head], value[batch, kv_head]
        grads = torch.zeros(picked[0].shape, dtype=wide, device=query.device)
        for run, part, bias, _ in _pieces(rows, q_len, k.shape[0], causal, query.dtype):
            dq, dk, dv = _gradients(*(x[run] for x in picked), k[part], v[part], bias, scale)
            grads[run] += dq
            grad_key[batch, kv_head, part] += dk
            grad_value[batch, kv_head, part] += dv
        grad_query[batch, at][members, rows] = grads.to(query.dtype)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _whole_heads(heads: Tensor, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> list[tuple[int, int]]:
    """(batch row, head) that all rows chose, where one fused call computes the head."""
    q_len, k_len = query.shape[2], key.shape[2]
    if q_len <= FEW_ROWS or k_len == 0 or (causal and q_len != k_len) or not _can_fuse(query, value):
        return []
    return [(batch, head) for batch, head in heads.all(2).nonzero().tolist()]


def _without(heads: Tensor, whole: list[tuple[int, int]]) -> Tensor:
    if not whole:
        return heads
    heads = heads.clone()
    heads[tuple(torch.tensor(whole).T)] = False
    return heads


def _gathered(heads: Tensor, group: int, k_len: int, causal: bool) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(batch row, KV head, members of its group, query rows) of the chosen pairs that see a key, by ascending row."""
    batch, count, q_len = heads.shape
    blind = q_len if k_len == 0 else max(0, q_len - k_len) if causal else 0
    for b in range(batch):
        for h in range(count // group):
            rows, members = heads[b, h * group : (h + 1) * group, blind:].T.nonzero().unbind(1)
            if rows.numel():
                yield b, h, members, rows + blind


def _pieces(
    rows: Tensor, q_len: int, k_len: int, causal: bool, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor | None, bool]]:
    """Slices of the ascending query rows, each with one range of keys.

    Yields (rows, keys, bias `[n, keys]` or None for 0, whether this is the rows' first range). Every row sees a key of
    each of its ranges.
    """
    at = rows + (k_len - q_len)  # the last key a row sees
    start, end = int(at[0]), int(at[-1]) + 1
    if not causal or end - start == 1:
        yield slice(None), slice(0, end if causal else k_len), None, True
        return
    span = SPAN
    while span < end - start and rows.numel() * span < ROWS * (end - start):
        span *= 2
    at = at - start
    cuts = torch.searchsorted(at, torch.arange(0, end - start + span, span, device=rows.device)).tolist()
    # Row i of `steps` has `span - i` zeros and then -inf; its rows overlap in memory.
    steps = torch.zeros(2 * span, dtype=dtype, device=rows.device)
    steps[span:] = float("-inf")
    steps, at = steps.unfold(0, span, 1), span - 1 - at % span
    for outer in range(0, len(cuts) - 1, SPANS):
        inner = range(outer, min(outer + SPANS, len(cuts) - 1))
        before = start + outer * span
        for number in inner:
            run, first = slice(cuts[number], cuts[number + 1]), start + number * span
            if run.start == run.stop:
                continue
            width = min(span, k_len - first)
            yield run, slice(first, first + width), steps[:, :width].index_select(0, at[run]), True
            if number > outer:
                yield run, slice(before, first), None, False
        run = slice(cuts[outer], cuts[inner.stop])
        if before and run.start < run.stop:
            yield run, slice(0, before), None, False


def _merged(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, q_len: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Gathered query rows `[n, D]` against the keys that they see: out `[n, Dv]`, lse `[n]`."""
    out = query.new_empty(query.shape[0], value.shape[1])
    lse = torch.empty(query.shape[:1], dtype=_wide(query.dtype), device=query.device)
    for run, part, bias, first in _pieces(rows, q_len, key.shape[0], causal, query.dtype):
        more, sums = _attend(query[run], key[part], value[part], bias, scale)
        into, old = out[run], lse[run]
        if first:
            into.copy_(more)
            old.copy_(sums)
        else:
            into.lerp_(more, torch.sigmoid(sums - old).to(out.dtype)[:, None])
            torch.logaddexp(old, sums, out=old)
    return out, lse


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out `[n, Dv]` and lse `[n]` of rows that all see a key."""
    if query.shape[0] > FEW_ROWS and _can_fuse(query, value):
        bias = None if bias is None else bias[None, None]
        out, lse = _fused(*_lift(query, key, value), 0.0, False, attn_mask=bias, scale=scale)
        return out[0, 0], lse[0, 0]
    scores = (query @ key.mT).to(_wide(query.dtype)) * scale
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return (scores - lse[:, None]).exp().to(value.dtype) @ value, lse


def _gradients(
    query: Tensor, grad: Tensor, out: Tensor, lse: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq `[n, D]`, dk, dv of some rows and keys, given the rows' whole result."""
    if query.shape[0] > FEW_ROWS and _can_fuse(query, value):
        bias = None if bias is None else bias[None, None]
        tensors = (*_lift(grad, query, key, value, out), lse[None, None])
        grads = _fused_backward(*tensors, 0.0, False, attn_mask=bias, scale=scale)
        return tuple(x[0, 0] for x in grads)
    wide = _wide(query.dtype)
    query, grad, out, key, value = (x.to(wide) for x in (query, grad, out, key, value))
    scores = query @ key.mT * scale
    if bias is not None:
        scores = scores + bias
    weights = (scores - lse[:, None]).exp()
    slope = weights * (grad @ value.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return slope @ key, slope.mT @ query, weights.mT @ grad


def _lift(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x[None, None] for x in tensors)


def _can_fuse(query: Tensor, value: Tensor) -> bool:
    return None not in (_fused, _fused_backward) and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
