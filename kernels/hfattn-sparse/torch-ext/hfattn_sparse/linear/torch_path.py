"""Decayed linear attention in plain torch: strips of blocks that stay in the cache, around a running state.

Inside a block the decay matrix multiplies the scores; between blocks a state `[D, E]` carries everything before
(Lightning Attention-2, arXiv 2401.04658, algorithms 1 and 2). Decays are exponentials of differences: quotients of
powers underflow for the steep heads. A strip's products go into buffers that all strips share, because fresh pages cost
as much as the products. The backward keeps no states: it goes over the strips for the gradient of the queries, and back
over them for the others.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold_

# Tokens (rows times length) whose products are formed at a time: larger strips leave the L2 cache.
STRIP_TOKENS = 1024
# What a thread keeps at most: views of scratch memory, decays of strips, and how many numbers one of those may have.
_KEPT_VIEWS, _KEPT_DECAYS, _LARGEST_KEPT = 256, 64, 1 << 16
_KEPT = threading.local()


class _Strip(NamedTuple):
    rows: slice
    tokens: slice
    blocks: int


class _Decays(NamedTuple):
    """Decays of the n blocks of m tokens of a strip; `[rows, n or 1, ...]`, 1 where all blocks have the same."""

    inside: Tensor  # [.., m, m], from token u to token t >= u; 0 above the diagonal
    before: Tensor  # [.., m, 1], from the state before the block to token t
    after: Tensor  # [.., m, 1], from token t to the state behind the block
    first: Tensor  # [rows, n + 1, 1], from the first border of blocks to border i
    carry: Tensor  # [rows, n + 1, n], from border j + 1 to border i; 0 where i < j + 1
    last: Tensor  # [rows, n + 1, 1], from border i to the last one
    back: Tensor  # [rows, n + 1, n], from border i to border j; 0 where i > j


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    scale: float,
    block: int,
    out: Tensor,
) -> Tensor:
    """See `reference.forward`; writes into `out` and returns the final state."""
    rows = [t.flatten(0, 1) for t in (query, key, value)]
    out = out.flatten(0, 1)
    running = _initial(state, query, value)
    work, decays = _Buffers(running), _DecaysOf(slopes, query)
    for strip in _strips(*rows[0].shape[:2], block):
        d = decays(strip)
        q, k, v = (work.read(name, t, strip) for name, t in zip("qkv", rows, strict=True))
        states = _states(work, strip, d, running, _times(k, d.after, work("decayed", *k.shape)), v)
        running[strip.rows] = states[:, -1]
        scores = work.product("scores", q, k.mT)
        _times(scores, d.inside, scores)
        part = work.target("out", out, strip)
        torch.bmm(scores, v, out=part)
        early = _times(q, d.before, work("decayed", *q.shape))
        torch.baddbmm(part, early, _folded(states[:, :-1]), out=part)
        if scale != 1:
            part.mul_(scale)
        work.write(part, out, strip)
    return running.unflatten(0, query.shape[:2])


def backward(
    grad_out: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    scale: float,
    block: int,
    grads: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Writes the gradients of query, key and value into `grads`; returns that of the initial state."""
    rows = [t.flatten(0, 1) for t in (query, key, value, grad_out)]
    into = [t.flatten(0, 1) for t in grads]
    running = _initial(state, query, value)
    behind = grad_state.flatten(0, 1).to(running.dtype, copy=True)
    work, decays = _Buffers(running), _DecaysOf(slopes, query)
    strips = list(_strips(*rows[0].shape[:2], block))
    for strip in strips:
        _query_gradient(work, strip, decays(strip), running, rows, scale, into[0])
    for strip in reversed(strips):
        _key_value_gradients(work, strip, decays(strip), behind, rows, scale, into[1:])
    return behind.unflatten(0, query.shape[:2])


def _query_gradient(
    work: _Buffers, strip: _Strip, d: _Decays, running: Tensor, rows: list[Tensor], scale: float, into: Tensor
) -> None:
    """((g v^T) * D) k + (decayed g) S^T of one strip, left to right; `running` is the state before it, then behind."""
    k, v, grad = (work.read(name, t, strip) for name, t in zip("kvg", rows[1:], strict=True))
    states = _states(work, strip, d, running, _times(k, d.after, work("decayed", *k.shape)), v)
    running[strip.rows] = states[:, -1]
    inner = work.product("scores", grad, v.mT)
    _times(inner, d.inside, inner)
    part = work.target("grad", into, strip)
    torch.bmm(inner, k, out=part)
    early = _times(grad, d.before, work("decayed", *grad.shape))
    torch.baddbmm(part, early, _folded(states[:, :-1]).mT, out=part)
    if scale != 1:
        part.mul_(scale)
    work.write(part, into, strip)


def _key_value_gradients(
    work: _Buffers, strip: _Strip, d: _Decays, behind: Tensor, rows: list[Tensor], scale: float, into: list[Tensor]
) -> None:
    """((v g^T) * D^T) q + (decayed v) dS^T and ((k q^T) * D^T) g + (decayed k) dS of one strip, right to left.

    behind: the gradient dS of the state behind the strip, and then of the one before it.
    """
    q, k, v, grad = (work.read(name, t, strip) for name, t in zip("qkvg", rows, strict=True))
    if scale != 1:
        grad = torch.mul(grad, scale, out=work("scaled", *grad.shape))
    grad_states = _grad_states(work, strip, d, behind, _times(q, d.before, work("decayed", *q.shape)), grad)
    behind[strip.rows] = grad_states[:, 0]
    after = _folded(grad_states[:, 1:])
    for grad_of, left, right, other, own, carried in (
        (into[0], grad, v, q, v, after.mT),
        (into[1], q, k, grad, k, after),
    ):
        pairs = work.product("scores", left, right.mT)
        _times(pairs, d.inside, pairs)
        part = work.target("grad", grad_of, strip)
        torch.bmm(pairs.mT, other, out=part)
        torch.baddbmm(part, _times(own, d.after, work("decayed", *own.shape)), carried, out=part)
        work.write(part, grad_of, strip)


def step(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor | None, scale: float, out: Tensor
) -> Tensor:
    """One token: `query`, `key` and `value` are `[B, H, 1, ...]`; writes `out`, returns the state behind it."""
    dtype = _dtype(query)
    q, k, v = (t.to(dtype) for t in (query, key, value))
    new = k.mT * v
    if state is not None:
        decay = (-slopes.to(dtype)).exp()
        new = torch.addcmul(new, decay[:, None, None] if slopes.dim() == 1 else decay[..., None], state.to(dtype))
    out.copy_((q @ new).mul_(scale))
    return new


class _Buffers:
    """Scratch memory by name, as large as the largest use, and the tensors of the call cut into strips.

    A thread keeps its buffers on the CPU, a few MB: fresh pages take as long as a strip's products. So it does with
    their views, because at one head a fifth of the time is that of calls.
    """

    def __init__(self, like: Tensor) -> None:
        self._like, self._dtype = like, like.dtype
        kept = _KEPT.__dict__ if like.device.type == "cpu" else {}
        self._flat: dict[str, Tensor]
        self._views: dict[tuple, Tensor]
        self._flat, self._views = kept.setdefault(str(like.dtype), ({}, {}))

    def __call__(self, name: str, *shape: int) -> Tensor:
        found = self._views.get((name, shape))
        if found is not None:
            return found
        size = math.prod(shape)
        flat = self._flat.get(name)
        # A tensor made under inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            if flat is None or flat.numel() < size:
                flat = self._flat[name] = torch.empty(size, dtype=self._like.dtype, device=self._like.device)
                self._views.clear()
            if len(self._views) >= _KEPT_VIEWS:
                self._views.clear()
            found = self._views[name, shape] = flat[:size].view(shape)
        return found

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, `[rows * blocks, ..]`, into the buffer `name`."""
        return torch.bmm(left, right, out=self(name, left.shape[0], left.shape[1], right.shape[2]))

    def target(self, name: str, tensor: Tensor, strip: _Strip) -> Tensor:
        """Where a strip of `tensor` `[rows, N, dim]` is computed, `[rows * blocks, m, dim]`: in place if it can be."""
        return self._target(name, tensor[strip.rows, strip.tokens], strip)

    def _target(self, name: str, part: Tensor, strip: _Strip) -> Tensor:
        rows, length, dim = part.shape
        shape = rows * strip.blocks, length // strip.blocks, dim
        if part.dtype == self._dtype and part.is_contiguous():
            return part.view(shape)
        return self(name, *shape)

    def read(self, name: str, tensor: Tensor, strip: _Strip) -> Tensor:
        """A strip of `tensor` in the dtype of the computation; a view if it can be."""
        source = tensor[strip.rows, strip.tokens]
        part = self._target(name, source, strip)
        if part.data_ptr() != source.data_ptr():
            part.view(source.shape).copy_(source)
        return part

    def write(self, part: Tensor, tensor: Tensor, strip: _Strip) -> None:
        """Bring what `target` gave back into `tensor`."""
        into = tensor[strip.rows, strip.tokens]
        if part.data_ptr() != into.data_ptr():
            into.copy_(part.view(into.shape))


class _DecaysOf:
    """Decays of a strip; those of one slope a head are kept on the CPU, for strips and calls of the same sizes."""

    def __init__(self, slopes: Tensor, query: Tensor) -> None:
        self.slopes = slopes.to(_dtype(query))
        self.every_token = slopes.dim() == 3
        if self.every_token:
            self.slopes = self.slopes.flatten(0, 1)
            return
        kept = _KEPT.__dict__ if slopes.device.type == "cpu" else {}
        self._last: tuple[object, _Decays | None] = None, None
        self._known: dict[tuple, _Decays] = kept.setdefault(f"decays of {self.slopes.dtype}", {})
        self._heads = self.slopes.tolist() if kept else range(len(slopes))

    def __call__(self, strip: _Strip) -> _Decays:
        length = (strip.tokens.stop - strip.tokens.start) // strip.blocks
        if self.every_token:
            steps = self.slopes[strip.rows, strip.tokens].unflatten(1, (strip.blocks, length))
            return _decays(steps.cumsum(-1), strip.blocks)
        heads = [row % len(self._heads) for row in range(strip.rows.start, strip.rows.stop)]
        key = tuple(self._heads[head] for head in heads), strip.blocks, length
        found = self._last[1] if self._last[0] == key else self._known.get(key)
        if found is None:
            with torch.inference_mode(False):
                counts = torch.arange(1, length + 1, device=self.slopes.device, dtype=self.slopes.dtype)
                found = _decays(self.slopes[heads][:, None, None] * counts, strip.blocks)
            if found.inside.numel() <= _LARGEST_KEPT:
                if len(self._known) >= _KEPT_DECAYS:
                    self._known.clear()
                self._known[key] = found
        self._last = key, found
        return found


def _decays(passed: Tensor, blocks: int) -> _Decays:
    """From the log-decay that each token has behind it in its block, itself included: `[rows, blocks or 1, m]`.

    Decays below the root of the smallest normal number count as 0: they change nothing beside the weight 1 of the last
    token, and products with subnormal numbers take many times longer.
    """
    lowest = torch.finfo(passed.dtype).tiny ** 0.5
    total = passed[..., -1:]
    borders = torch.nn.functional.pad(total[..., 0].expand(-1, blocks), (1, 0)).cumsum(-1)
    inside, carry = ((t[..., None, :] - t[..., :, None]).exp_().tril_() for t in (passed, borders))
    found = inside, (-passed).exp_()[..., None], (passed - total).exp_()[..., None], carry
    inside, before, after, carry = (threshold_(t, lowest, 0) for t in found)
    first, forth, last, back = carry[:, :, :1], carry[:, :, 1:], carry[:, -1:].mT, carry[:, :-1].mT
    return _Decays(inside, before, after, *(t.contiguous() for t in (first, forth, last, back)))


def _strips(rows: int, length: int, block: int) -> Iterator[_Strip]:
    """Strips of whole blocks, then the rest of a row as one short block; several rows when they are short."""
    whole = length // block
    blocks = min(max(STRIP_TOKENS // block, 1), max(whole, 1))
    height = max(STRIP_TOKENS // (blocks * block), 1)
    for first in range(0, rows, height):
        taken = slice(first, min(first + height, rows))
        for start in range(0, whole, blocks):
            stop = min(start + blocks, whole)
            yield _Strip(taken, slice(start * block, stop * block), stop - start)
        if whole * block < length:
            yield _Strip(taken, slice(whole * block, length), 1)


def _states(work: _Buffers, strip: _Strip, d: _Decays, running: Tensor, late: Tensor, value: Tensor) -> Tensor:
    """The state at every border of a strip's blocks, `[rows, blocks + 1, D, E]`; the first is `running`'s.

    late: keys as they arrive at the end of their block, `after` included.
    """
    added = work.product("added", late.mT, value)
    first = running[strip.rows]
    into = work("states", first.shape[0], strip.blocks + 1, *first.shape[1:])
    return _carry(into, d.first, d.carry, first, added)


def _grad_states(work: _Buffers, strip: _Strip, d: _Decays, behind: Tensor, early: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the state at every border; the last is `behind`'s."""
    added = work.product("added", early.mT, grad)
    last = behind[strip.rows]
    into = work("grad_states", last.shape[0], strip.blocks + 1, *last.shape[1:])
    # `added` belongs to the border on the left of its block.
    return _carry(into, d.last, d.back, last, added)


def _carry(into: Tensor, outer: Tensor, carry: Tensor, start: Tensor, added: Tensor) -> Tensor:
    """into_i = outer_i start + sum_j carry_ij added_j, over flat states."""
    rows, borders = into.shape[:2]
    flat = into.view(rows, borders, -1)
    torch.mul(outer, start.view(rows, 1, -1), out=flat)
    torch.baddbmm(flat, carry, added.view(rows, borders - 1, -1), out=flat)
    return into


def _times(tensor: Tensor, decay: Tensor, into: Tensor) -> Tensor:
    """`tensor` `[rows * blocks, m, ..]` times a decay `[rows, blocks or 1, m, ..]`, into `into`."""
    if decay.shape[0] == 1:
        return torch.mul(tensor, decay[0], out=into)
    shape = decay.shape[0], -1, *tensor.shape[1:]
    torch.mul(tensor.view(shape), decay, out=into.view(shape))
    return into


def _folded(states: Tensor) -> Tensor:
    """`[rows * blocks, D, E]`; a copy when there are several rows."""
    return states.flatten(0, 1)


def _initial(state: Tensor | None, query: Tensor, value: Tensor) -> Tensor:
    """The running state `[B * H, D, E]`, a copy."""
    if state is None:
        return query.new_zeros(query.shape[0] * query.shape[1], query.shape[3], value.shape[3], dtype=_dtype(query))
    return state.flatten(0, 1).to(_dtype(query), copy=True)


def _dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
