"""Head-routed attention in plain torch: the rows that chose a head are gathered, and cut into runs.

All keys before the first row of a run are seen by every row of it and need no mask; the rest, a narrow band, does. The
two parts are computed by torch's fused attention and merged by their log-sum-exps. One masked call over all keys would
be slower than dense attention.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of a run: fewer make the band narrower, more make the fused kernel faster.
ROWS = 192
# Rows a call may have to be computed by plain products, without a copy of the keys.
FEW_ROWS = 16
# Dense attention is as fast below these: query rows of a prefill, and rows of the batch times keys of a decoding step.
MIN_PREFILL, MIN_DECODE = 4096, 2048
# Pairs that must be skipped to pay for gathering, as a share of all.
MIN_SKIPPED = 0.3

_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def prefers_dense(heads: Tensor, k_len: int) -> bool:
    """Whether computing all heads is at least as fast: short calls, and those that skip little."""
    batch, _, q_len = heads.shape
    if q_len <= FEW_ROWS:
        return batch * k_len < MIN_DECODE
    return q_len < MIN_PREFILL or float(heads.sum(dtype=torch.float64)) > (1 - MIN_SKIPPED) * heads.numel()


def forward(
    query: Tensor, key: Tensor, value: Tensor, heads: Tensor, *, causal: bool, scale: float, dense: bool
) -> tuple[Tensor, Tensor]:
    """out `[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`, as `reference.forward`; `dense` computes all heads."""
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = torch.full(query.shape[:3], float("-inf"), dtype=_wide(query.dtype), device=query.device)
    group = query.shape[1] // key.shape[1]
    for batch, head, rows in _work(heads, dense):
        q, k, v = query[batch, head], key[batch, head // group], value[batch, head // group]
        if rows is None:
            out[batch, head], lse[batch, head] = _all_rows(q, k, v, causal, scale)
        else:
            picked = q.index_select(0, rows)
            runs = zip(picked.split(ROWS), rows.split(ROWS), strict=True)
            parts, sums = zip(*(_run(some, k, v, run, q.shape[0], causal, scale) for some, run in runs), strict=True)
            out[batch, head].index_copy_(0, rows, torch.cat(parts))
            lse[batch, head].index_copy_(0, rows, torch.cat(sums))
    if dense:
        out.masked_fill_(~heads[..., None], 0)
        lse.masked_fill_(~heads, float("-inf"))
    return out, lse


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
    group = query.shape[1] // key.shape[1]
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=_wide(x.dtype), device=x.device) for x in (key, value))
    for batch, head, rows in _work(heads, False):
        at = batch, head // group
        q, k, v, g = query[batch, head], key[at], value[at], grad_out[batch, head]
        rows = torch.arange(q.shape[0], device=q.device) if rows is None else rows
        for run in rows.split(ROWS):
            picked = q[run], g[run], out[batch, head, run], lse[batch, head, run]
            for part, mask in _parts(run, q.shape[0], k.shape[0], causal):
                dq, dk, dv = _gradients(*picked, k[part], v[part], mask, scale)
                grad_query[batch, head].index_add_(0, run, dq.to(query.dtype))
                grad_key[at][part] += dk
                grad_value[at][part] += dv
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _work(heads: Tensor, dense: bool) -> Iterator[tuple[int, int, Tensor | None]]:
    """(batch row, head, query rows that chose it, or None for all); heads that no row chose are left out."""
    batch, count, q_len = heads.shape
    chosen = heads.sum(2).tolist()
    for b in range(batch):
        for h in range(count):
            if chosen[b][h] == q_len or (dense and q_len):
                yield b, h, None
            elif chosen[b][h]:
                yield b, h, heads[b, h].nonzero().view(-1)


def _all_rows(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q_len, k_len = query.shape[0], key.shape[0]
    if q_len == k_len and _can_fuse(query, value):
        tensors = (x[None, None] for x in (query, key, value))
        out, lse = _fused(*tensors, 0.0, causal, scale=scale)
        return out[0, 0], lse[0, 0]
    runs = torch.arange(q_len, device=query.device).split(ROWS)
    parts = [_run(query[run], key, value, run, q_len, causal, scale) for run in runs]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _run(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, q_len: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Gathered query rows `[n, D]` of one head against the keys that they see: out `[n, Dv]`, lse `[n]`."""
    out = lse = None
    for part, mask in _parts(rows, q_len, key.shape[0], causal):
        more, sums = _attend(query, key[part], value[part], mask, scale)
        if out is None:
            out, lse = more, sums
        else:
            # Every row sees the first key of the first part, so its lse is finite.
            out = torch.lerp(out, more, torch.sigmoid(sums - lse).to(out.dtype)[:, None])
            lse = torch.logaddexp(lse, sums)
    if out is None:
        out = query.new_zeros(query.shape[0], value.shape[1])
        lse = torch.full(query.shape[:1], float("-inf"), dtype=_wide(query.dtype), device=query.device)
    return out, lse


def _parts(rows: Tensor, q_len: int, k_len: int, causal: bool) -> Iterator[tuple[slice, Tensor | None]]:
    """Key ranges that ascending query rows read, each with the pairs that are visible (None for all of them)."""
    if not causal:
        if k_len:
            yield slice(0, k_len), None
        return
    first, last = (int(row) + k_len - q_len + 1 for row in (rows[0], rows[-1]))
    if first > 0:
        yield slice(0, first), None
    first = max(first, 0)
    if last > first:
        keys = torch.arange(first, last, device=rows.device)
        yield slice(first, last), keys <= rows[:, None] + (k_len - q_len)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out `[n, Dv]` and lse `[n]`; rows that see nothing give 0 and -inf."""
    if query.shape[0] > FEW_ROWS and _can_fuse(query, value):
        bias = None
        if mask is not None:
            bias = torch.where(mask, 0.0, float("-inf")).to(query.dtype)[None, None]
        out, lse = _fused(*(x[None, None] for x in (query, key, value)), 0.0, False, attn_mask=bias, scale=scale)
        out, lse = out[0, 0], lse[0, 0]
        if mask is not None:  # the kernel says 0 where a row sees nothing; rows see the first key or none
            lse = lse.masked_fill(~mask[:, 0], float("-inf"))
        return out, lse
    wide = _wide(query.dtype)
    scores = (query @ key.mT).to(wide) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.where(lse.isfinite(), 0)[:, None]).exp()
    return (weights.to(value.dtype) @ value), lse


def _gradients(
    query: Tensor, grad: Tensor, out: Tensor, lse: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq `[n, D]`, dk, dv of some rows and keys, given the rows' whole result; in the wide dtype."""
    wide = _wide(query.dtype)
    query, grad, out, key, value = (x.to(wide) for x in (query, grad, out, key, value))
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = (scores - lse.where(lse.isfinite(), 0)[:, None]).exp()
    slope = weights * (grad @ value.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return slope @ key, slope.mT @ query, weights.mT @ grad


def _can_fuse(query: Tensor, value: Tensor) -> bool:
    return _fused is not None and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
