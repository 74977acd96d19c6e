"""The selective scan in plain torch, in two levels: spans of time side by side, a carry from span to span.

Rows (batch times groups) are cut into strips and a row's time into spans, so that one step of all rows and spans of a
strip fills the vector units and stays in the L2 cache. A first pass finds what every span adds to the state, a short
loop carries states from span to span, a second pass gives the outputs. One span, and no first pass, is enough where a
step is wide already. States are never stored for all tokens: the forward keeps one every segment of a span, and the
backward forms those of a segment again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Floats of the state that a step handles: on the CPU about what leaves room for three operands in the L2 cache.
STEP_FLOATS = 1 << 15
# On the CPU a step this full is not worth the second pass that more spans cost.
FULL_ENOUGH = 0.25
# Elsewhere a step is a few launches whatever its size: spans are short, and the step as large as memory likes.
DEVICE_STEP_FLOATS = 1 << 21
DEVICE_SPAN = 64
# Tokens of a segment: the backward holds this many states and decays of a strip.
SEGMENT = 16


class Plan(NamedTuple):
    """How `length` tokens of `rows` rows are cut: spans * segments * tokens >= length."""

    rows: int
    spans: int
    segments: int
    tokens: int
    strip: int

    @property
    def span(self) -> int:
        """Tokens of a span."""
        return self.segments * self.tokens


def plan(rows: int, length: int, width: int, device: str) -> Plan:
    """The cut for rows of `width` state floats (channels times state size) each."""
    width = max(width, 1)
    if device == "cpu":
        strip = max(1, min(rows, STEP_FLOATS // width))
        filled = strip * width
        spans = 1 if filled >= FULL_ENOUGH * STEP_FLOATS else min(STEP_FLOATS // filled, max(1, length // SEGMENT))
    else:
        spans = max(1, length // DEVICE_SPAN)
        strip = max(1, min(rows, DEVICE_STEP_FLOATS // (width * spans)))
    span = -(-length // spans)
    segments = max(1, -(-span // SEGMENT))
    tokens = max(1, -(-span // segments))
    return Plan(rows, max(1, -(-length // (segments * tokens))), segments, tokens, strip)


class _Strip(NamedTuple):
    """Operands of some rows, time first: x and delta `[T, R, K, 1, E]`, B and C `[T, R, K, n, 1]`, A `[R, 1, n, E]`."""

    rows: slice
    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def steps(self, part: slice = slice(None)) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """x, delta, B and C of every step; views made at once, for a view costs as much as a small product."""
        return list(zip(*(t[part].unbind(0) for t in (self.x, self.delta, self.B, self.C)), strict=True))

    def decay(self, delta: Tensor, out: Tensor) -> Tensor:
        """exp(delta A) of a step"""
        return torch.mul(delta, self.A, out=out).exp_()

    @property
    def span_decay(self) -> Tensor:
        """exp(A sum of delta) of whole spans, `[R, K, n, E]`."""
        return (self.delta.sum(0) * self.A).exp_()


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.forward`; writes y into `out`.

    Returns the final state and the state before every segment, `[segments, B * G, spans, n, E]`, for `backward`.
    """
    cut, dtype = _plan_of(u, A), _dtype(u)
    size = A.shape[2], u.shape[3]
    initial = _rows_of(state, u, A, dtype)
    final = torch.empty_like(initial)
    starts = initial.new_empty(cut.segments, cut.rows, cut.spans, *size)
    for strip in _strips(cut, u, delta, A, B, C, dtype):
        running = _span_starts(strip, initial[strip.rows])
        decay = torch.empty_like(running)
        y = torch.empty_like(strip.x)
        for t, ((x, step, b, c), into) in enumerate(zip(strip.steps(), y.unbind(0), strict=True)):
            if t % cut.tokens == 0:
                starts[t // cut.tokens, strip.rows] = running
            running.mul_(strip.decay(step, decay)).addcmul_(b, x)
            _contract(c, running, into)
        final[strip.rows] = running[:, -1]
        _time_last(y, out.flatten(0, 1)[strip.rows])
    return final.mT.unflatten(0, u.shape[:2]).contiguous(), starts


def backward(
    grad_out: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Writes the gradients of u, delta, B and C into `grads`; returns those of A and of the initial state."""
    cut, dtype = _plan_of(u, A), _dtype(u)
    behind = grad_state.flatten(0, 1).mT.to(dtype)
    grad_initial = torch.empty_like(behind, memory_format=torch.contiguous_format)
    grad_A = grad_initial.new_zeros(cut.rows, *behind.shape[1:])
    targets = [t.flatten(0, 1) for t in grads]
    for strip in _strips(cut, u, delta, A, B, C, dtype):
        rows = strip.rows
        grad_y = _time_first(grad_out.flatten(0, 1)[rows], cut, dtype)[:, :, :, None]
        running = _span_ends(strip, grad_y, behind[rows])
        grad_x, grad_delta = torch.empty_like(strip.x), torch.empty_like(strip.x)
        grad_B, grad_C = torch.empty_like(strip.B), torch.empty_like(strip.C)
        for number in reversed(range(cut.segments)):
            part = slice(number * cut.tokens, (number + 1) * cut.tokens)
            into = grad_x[part], grad_delta[part], grad_B[part], grad_C[part]
            grad_A[rows] += _segment(strip, part, starts[number, rows], grad_y, running, into)
        grad_initial[rows] = running[:, 0]
        # x is delta u
        source = _time_first(u.flatten(0, 1)[rows], cut, dtype)[:, :, :, None]
        grad_delta.addcmul_(grad_x, source)
        for grad, target in zip((grad_x.mul_(strip.delta), grad_delta, grad_B, grad_C), targets, strict=True):
            _time_last(grad, target[rows])
    groups = A.shape[0]
    return grad_A.unflatten(0, (-1, groups)).sum(0).mT.contiguous(), grad_initial.mT.unflatten(0, u.shape[:2])


def _segment(
    strip: _Strip, part: slice, start: Tensor, grad_y: Tensor, running: Tensor, into: tuple[Tensor, ...]
) -> Tensor:
    """Gradients of one segment of all spans; `running` is the gradient of the state behind it, then before it."""
    grad_x, grad_delta, grad_B, grad_C = into
    steps = strip.steps(part)
    states, decays = start.new_empty(len(steps) + 1, *start.shape), start.new_empty(len(steps), *start.shape)
    states[0] = start
    at, through = states.unbind(0), decays.unbind(0)
    for i, (x, step, b, _) in enumerate(steps):
        torch.mul(at[i], strip.decay(step, through[i]), out=at[i + 1]).addcmul_(b, x)
    _over_channels(states[1:], grad_y[part], grad_C)
    grads = grad_y[part].unbind(0)
    for i in reversed(range(len(steps))):
        # From here on at[i + 1] is the gradient of that state, and through[i] that of delta A.
        torch.addcmul(running, steps[i][3], grads[i], out=at[i + 1])
        torch.mul(at[i + 1], through[i], out=running)
        torch.mul(running, at[i], out=through[i])
    grad_states = states[1:]
    _over_channels(grad_states, strip.x[part], grad_B)
    _contract(strip.B[part], grad_states, grad_x)
    grad_A = torch.mul(decays, strip.delta[part], out=grad_states).sum((0, 2))
    torch.sum(decays.mul_(strip.A), -2, keepdim=True, out=grad_delta)
    return grad_A


def _span_starts(strip: _Strip, initial: Tensor) -> Tensor:
    """The state before every span, `[R, K, n, E]`."""
    spans = strip.x.shape[2]
    running = initial.new_zeros(initial.shape[0], spans, *initial.shape[1:])
    if spans > 1:
        decay = torch.empty_like(running)
        for x, step, b, _ in strip.steps():
            running.mul_(strip.decay(step, decay)).addcmul_(b, x)
        added, through = running.clone(), strip.span_decay
        for k in range(spans - 1):
            before = initial if k == 0 else running[:, k]
            running[:, k + 1] = torch.addcmul(added[:, k], through[:, k], before)
    running[:, 0] = initial
    return running


def _span_ends(strip: _Strip, grad_y: Tensor, behind: Tensor) -> Tensor:
    """The gradient of the state behind every span, without that span's own outputs, `[R, K, n, E]`."""
    spans = strip.x.shape[2]
    running = behind.new_zeros(behind.shape[0], spans, *behind.shape[1:])
    if spans > 1:
        decay = torch.empty_like(running)
        for (_, step, _, c), grad in zip(reversed(strip.steps()), reversed(grad_y.unbind(0)), strict=True):
            running.addcmul_(c, grad).mul_(strip.decay(step, decay))
        added, through = running.clone(), strip.span_decay
        for k in reversed(range(1, spans)):
            after = behind if k == spans - 1 else running[:, k]
            running[:, k - 1] = torch.addcmul(added[:, k], through[:, k], after)
    running[:, -1] = behind
    return running


def _contract(weights: Tensor, states: Tensor, out: Tensor) -> None:
    """Sum over the state: `[.., n, 1]` and `[.., n, E]` into `[.., 1, E]`."""
    if states.shape[-2] == 1:
        torch.mul(states, weights, out=out)
    else:
        lead = states.shape[:-2].numel()
        torch.bmm(weights.reshape(lead, 1, -1), states.view(lead, *states.shape[-2:]), out=out.view(lead, 1, -1))


def _over_channels(states: Tensor, other: Tensor, out: Tensor) -> None:
    """Sum over the channels: `[.., n, E]` and `[.., 1, E]` into `[.., n, 1]`."""
    lead, (state, width) = states.shape[:-2].numel(), states.shape[-2:]
    torch.bmm(states.view(lead, state, width), other.reshape(lead, width, 1), out=out.view(lead, state, 1))


def _strips(
    cut: Plan, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, dtype: torch.dtype
) -> Iterator[_Strip]:
    u, delta, B, C = (t.flatten(0, 1) for t in (u, delta, B, C))
    decays = A.mT.to(dtype).repeat(cut.rows // max(A.shape[0], 1), 1, 1)
    for start in range(0, cut.rows, cut.strip):
        rows = slice(start, min(start + cut.strip, cut.rows))
        x, steps, b, c = (_time_first(t[rows], cut, dtype) for t in (u, delta, B, C))
        steps = steps[:, :, :, None]
        x = x[:, :, :, None].mul_(steps)
        yield _Strip(rows, x, steps, decays[rows, None], b[..., None], c[..., None])


def _time_first(tensor: Tensor, cut: Plan, dtype: torch.dtype) -> Tensor:
    """`[R, L, X]` as a copy `[tokens of a span, R, spans, X]`; tokens beyond the end are 0, which leaves the state."""
    rows, length, width = tensor.shape
    out = tensor.new_empty(cut.span, rows, cut.spans, width, dtype=dtype)
    by_row = out.permute(1, 2, 0, 3)
    whole = length // cut.span
    by_row[:, :whole] = tensor[:, : whole * cut.span].unflatten(1, (whole, cut.span))
    if whole < cut.spans:
        rest = length - whole * cut.span
        by_row[:, whole, :rest] = tensor[:, whole * cut.span :]
        by_row[:, whole, rest:] = 0
    return out


def _time_last(tensor: Tensor, into: Tensor) -> None:
    """The inverse of `_time_first`; `tensor` has one more dimension of size 1, the last but one or the last."""
    rows, length, width = into.shape
    by_row = tensor.view(*tensor.shape[:3], width).permute(1, 2, 0, 3)
    span = by_row.shape[2]
    whole = length // span
    into[:, : whole * span].unflatten(1, (whole, span)).copy_(by_row[:, :whole])
    if whole < by_row.shape[1]:
        into[:, whole * span :] = by_row[:, whole, : length - whole * span]


def _rows_of(state: Tensor | None, u: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """The state before the first token as `[B * G, n, E]`, a tensor of our own."""
    if state is None:
        return u.new_zeros(u.shape[0] * u.shape[1], A.shape[2], u.shape[3], dtype=dtype)
    return state.flatten(0, 1).mT.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _plan_of(u: Tensor, A: Tensor) -> Plan:
    return plan(u.shape[0] * u.shape[1], u.shape[2], u.shape[3] * A.shape[2], u.device.type)


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
