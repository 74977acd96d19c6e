"""Head-routed attention in plain torch: the rows that chose a head are gathered, and their keys are cut into ranges.

Query heads that share a KV head read the same keys, so their rows are gathered together, ascending. Rows of one span of
positions need a mask for the keys of that span only; all keys before it they see. Those are cut as a tree: the spans
before theirs among `FAN`, the groups of `FAN` spans before theirs among `FAN` groups, and so on, so that far keys are
read by many rows in one call without a mask. Torch's fused attention computes the ranges; their log-sum-exps merge
them. One masked call over all keys would be slower than dense attention, and so is torch's causal one over all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import native
from ..native import pays

# Positions of a span, and how many the tree puts together at each level. Short spans mask few pairs in vain, but leave
# the fused kernel few rows and keys.
SPAN, FAN = 128, 4
# Gathered rows of a span that the fused kernel needs to be fast; spans are longer where heads are chosen rarely.
ROWS = 96
# Rows a call may have to be computed by plain products, without a copy of the keys.
FEW_ROWS = 16
# Dense attention is as fast below these: rows of the batch times keys of a decoding step; in a prefill, rows that an
# average head skips, by the number of heads that share a KV head (one, two, more), whose rows are gathered together,
# and their share of all rows. In half precision dense attention gains more from the CPU's matrix units.
MIN_DECODE, MIN_SKIPPED = 2048, 0.15
MIN_ROWS_SKIPPED, HALF = (900, 450, 100), 20
# With the compiled kernel dense attention is as fast below so many scores of all heads (by bytes of a number), or
# queries of a sequence; from there on the kernel is faster even when every head is chosen.
NATIVE_SCORES, NATIVE_ROWS = {4: 3 << 17, 2: 9 << 17}, 128

_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_fused_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def takes_native(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether the compiled kernel computes the gathered form: where it is built and faster, or asked for."""
    if native.obstacle(query, key, value, scale) is not None:
        return False
    return native.wanted() or (query.shape[2] > FEW_ROWS and pays(query, value))


def may_take_native(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """What `takes_native` will say for a usual scale, asked ahead."""
    return query.shape[2] > FEW_ROWS and native.possible(query, key, value, 1.0) and pays(query, value)


def prefers_dense(heads: Tensor, key: Tensor, with_native: bool = False) -> bool:
    """Whether computing all heads is at least as fast: short calls, and those that skip little.

    with_native: the compiled kernel would compute the chosen ones.
    """
    batch, count, q_len = heads.shape
    if q_len <= FEW_ROWS:
        return batch * key.shape[2] < MIN_DECODE
    if with_native:
        return q_len < NATIVE_ROWS or heads.numel() * key.shape[2] < NATIVE_SCORES[key.element_size()]
    needed = MIN_ROWS_SKIPPED[min(count // key.shape[1], 3) - 1] * (HALF if key.element_size() == 2 else 1)
    if q_len < needed:
        return True
    skipped = 1 - int(heads.count_nonzero()) / max(1, heads.numel())
    return skipped * q_len < needed or skipped < MIN_SKIPPED


def forward(
    query: Tensor, key: Tensor, value: Tensor, heads: Tensor, *, causal: bool, scale: float, dense: bool
) -> tuple[Tensor, Tensor]:
    """What `reference.forward` returns: out `[B, Hq, Nq, Dv]` (in the memory of `[B, Nq, Hq, Dv]`), lse `[B, Hq, Nq]`.

    `dense` computes all heads.
    """
    q_len, k_len = query.shape[2], key.shape[2]
    if dense and _can_fuse(query, value) and min(q_len, k_len) > 0 and (q_len == k_len or not causal):
        return _dense(query, key, value, heads, causal, scale)
    chosen = _Chosen(heads, key.shape[1], key.shape[2], causal)
    # One row more, for what nobody chose.
    count = len(chosen.numbers)
    out = torch.empty(count + 1, value.shape[3], dtype=_wide(query.dtype), device=query.device)
    lse = torch.empty(count + 1, dtype=out.dtype, device=query.device)
    out[-1], lse[-1] = 0, float("-inf")
    gather = chosen.gatherer(query)
    for batch, kv_head, part, cuts in chosen.groups():
        rows, k, v = _lift(gather(part), key[batch, kv_head], value[batch, kv_head])
        part_out, part_lse = out[part], lse[part]
        for run, keys, bias, first in chosen.pieces(part, cuts, query.dtype):
            more, sums = _attend(rows[:, :, run], k[:, :, keys], v[:, :, keys], bias, scale)
            into, old = part_out[run], part_lse[run]
            if first:
                into.copy_(more)
                old.copy_(sums)
            else:
                into.lerp_(more.to(out.dtype), torch.sigmoid(sums - old)[:, None])
                torch.logaddexp(old, sums, out=old)
    return chosen.scatter(out.to(query.dtype)).transpose(1, 2), chosen.scatter(lse).transpose(1, 2).contiguous()


def _dense(
    query: Tensor, key: Tensor, value: Tensor, heads: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out, lse = _fused(query, key, value, 0.0, causal, scale=scale)
    return out.masked_fill_(~heads[..., None], 0), lse.masked_fill(~heads, float("-inf")).contiguous()


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
    wide = _wide(query.dtype)
    chosen = _Chosen(heads, key.shape[1], key.shape[2], causal)
    gathers = [chosen.gatherer(x) for x in (query, grad_out, out, lse[..., None])]
    grads = torch.zeros(len(chosen.numbers) + 1, query.shape[3], dtype=wide, device=query.device)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (key, value))
    for batch, kv_head, part, cuts in chosen.groups():
        k, v = key[batch, kv_head], value[batch, kv_head]
        rows = [gather(part) for gather in gathers]
        for run, keys, bias, _ in chosen.pieces(part, cuts, query.dtype):
            picked, sums = [x[run] for x in rows[:3]], rows[3][run, 0]
            dq, dk, dv = _gradients(*picked, sums, k[keys], v[keys], bias, scale)
            grads[part][run] += dq
            grad_key[batch, kv_head, keys] += dk
            grad_value[batch, kv_head, keys] += dv
    grad_query = chosen.scatter(grads.to(query.dtype)).transpose(1, 2).contiguous()
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


class _Chosen:
    """The chosen pairs that see a key, as rows: by batch row and KV head, in these by position, then by head."""

    def __init__(self, heads: Tensor, kv_heads: int, k_len: int, causal: bool) -> None:
        self.batch, count, self.q_len = heads.shape
        self.kv_heads, self.group, self.k_len, self.causal = kv_heads, count // kv_heads, k_len, causal
        # Rows that see no key; the keys that every other row sees.
        self.blind = self.q_len if k_len == 0 else max(0, self.q_len - k_len) if causal else 0
        self.base = max(0, k_len - self.q_len)
        if self.blind:
            heads = heads.clone()
            heads[:, :, : self.blind] = False
        self.mask = self._by_row(heads).flatten()
        self.numbers = self.mask.nonzero()[:, 0]
        share = len(self.numbers) / max(1, self.batch * kv_heads * (self.q_len - self.blind))
        self.span = SPAN
        while self.span < self.q_len and share * self.span < ROWS:
            self.span *= 2
        edges = torch.arange(self.blind, self.q_len + self.span, self.span, device=heads.device).clamp_(max=self.q_len)
        starts = torch.arange(self.batch * kv_heads, device=heads.device)[:, None] * self.q_len
        self.cuts = torch.searchsorted(self.numbers, (starts + edges) * self.group).tolist()

    def _by_row(self, x: Tensor) -> Tensor:
        """`[B, Hq, N]` -> `[B, Hkv, N, group]`, the order of the rows."""
        return x.unflatten(1, (self.kv_heads, self.group)).transpose(2, 3)

    def gatherer(self, x: Tensor) -> Callable[[slice], Tensor]:
        """The function that gives chosen rows `[n, D]` of x `[B, Hq, N, D]`.

        Few at a time: a large copy is new memory at each call, and to map that takes longer than to copy.
        """
        batch, heads, length, _ = x.shape
        at = torch.arange(batch * heads * length, device=x.device)
        if x.transpose(1, 2).is_contiguous():
            table, at = x.transpose(1, 2).flatten(0, 2), at.view(batch, length, heads).transpose(1, 2)
        else:
            table, at = x.flatten(0, 2), at.view(batch, heads, length)
        at = self._by_row(at).flatten().index_select(0, self.numbers)
        return lambda part: table.index_select(0, at[part])

    def scatter(self, rows: Tensor) -> Tensor:
        """`[B, N, Hq, ...]` with the rows at their places, and the last one at all others."""
        at = torch.where(self.mask, self.mask.cumsum(0) - 1, len(rows) - 1)
        at = at.view(self.batch, self.kv_heads, self.q_len, self.group).transpose(1, 2)
        return rows.index_select(0, at.flatten()).unflatten(0, (self.batch, self.q_len, -1))

    def groups(self) -> Iterator[tuple[int, int, slice, list[int]]]:
        """(batch row, KV head, its rows, bounds of its spans in these) where a row is chosen."""
        for number, cuts in enumerate(self.cuts):
            if cuts[-1] > cuts[0]:
                part, cuts = slice(cuts[0], cuts[-1]), [cut - cuts[0] for cut in cuts]
                yield number // self.kv_heads, number % self.kv_heads, part, cuts

    def pieces(
        self, part: slice, cuts: list[int], dtype: torch.dtype
    ) -> Iterator[tuple[slice, slice, Tensor | None, bool]]:
        """Slices of a group's rows, each with one range of keys.

        Yields (rows, keys, bias `[n, keys]` or None for 0, whether this is the rows' first range). Every row sees a key
        of each of its ranges.
        """
        everything = slice(0, cuts[-1])
        if not self.causal or self.q_len == 1:
            yield everything, slice(0, self.k_len), None, True
            return
        span, count = self.span, len(cuts) - 1
        steps, place = self._steps(dtype), self._place(part)
        for number in range(count):
            run, first = slice(cuts[number], cuts[number + 1]), self.base + number * span
            if run.start < run.stop:
                keys = slice(first, min(first + span, self.k_len))
                bias = steps[:, : keys.stop - first].index_select(0, place[run])
                yield run, keys, bias, True
        size = 1
        while size < count:
            for number in range(0, count, size):
                run, back = slice(cuts[number], cuts[min(number + size, count)]), number // size % FAN * size
                if back and run.start < run.stop:
                    keys = slice(self.base + (number - back) * span, self.base + number * span)
                    yield run, keys, None, False
            size *= FAN
        if self.base:
            yield everything, slice(0, self.base), None, False

    def _steps(self, dtype: torch.dtype) -> Tensor:
        """`[span + 1, span]`: row i has `span - i` zeros and then -inf. The rows overlap in memory."""
        steps = torch.zeros(2 * self.span, dtype=dtype, device=self.numbers.device)
        steps[self.span :] = float("-inf")
        return steps.unfold(0, self.span, 1)

    def _place(self, run: slice) -> Tensor:
        """Row of `_steps` for each row: how many keys of its span it does not see."""
        place = self.numbers[run] // self.group % self.q_len - self.blind
        return self.span - 1 - place % self.span


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out `[n, Dv]` and lse `[n]` of `[1, 1, n, D]` rows that all see a key of the `[1, 1, keys, D]`."""
    if query.shape[2] > FEW_ROWS and _can_fuse(query, value):
        bias = None if bias is None else bias[None, None]
        out, lse = _fused(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
        return out[0, 0], lse[0, 0]
    query, key, value = (x[0, 0] for x in (query, key, value))
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
