"""Decayed linear attention in plain torch: strips of blocks that stay in the cache, around a running state.

Inside a block the decay matrix multiplies the scores; between blocks a state `[D, E]` carries everything before
(Lightning Attention-2, arXiv 2401.04658, algorithms 1 and 2). Decays are exponentials of differences: quotients of
powers underflow for the steep heads. A strip's products go into buffers that all strips share, because fresh pages cost
as much as the products; the backward keeps one state a strip and computes the others again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold_

# Tokens (rows times length) whose products are formed at a time: larger strips leave the L2 cache.
STRIP_TOKENS = 1024
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
    carry: Tensor  # [rows, n + 1, n + 1], from border j of blocks to border i >= j; 0 above the diagonal


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
        states = _states(work, strip, d, running, k, v)
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
    grads = tuple(t.flatten(0, 1) for t in grads)
    running = _initial(state, query, value)
    work, decays = _Buffers(running), _DecaysOf(slopes, query)
    strips = list(_strips(*rows[0].shape[:2], block))
    starts = []
    for strip in strips:
        starts.append(running[strip.rows].clone())
        k, v = work.read("k", rows[1], strip), work.read("v", rows[2], strip)
        running[strip.rows] = _states(work, strip, decays(strip), running, k, v)[:, -1]
    behind = grad_state.flatten(0, 1).to(running.dtype, copy=True)
    for strip, start in zip(reversed(strips), reversed(starts), strict=True):
        running[strip.rows] = start
        parts = [work.read(name, t, strip) for name, t in zip("qkvg", rows, strict=True)]
        _backward_strip(work, strip, decays(strip), running, behind, parts, scale, grads)
    return behind.unflatten(0, query.shape[:2])


def _backward_strip(
    work: _Buffers,
    strip: _Strip,
    d: _Decays,
    running: Tensor,
    behind: Tensor,
    parts: list[Tensor],
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Gradients of one strip; `behind` is the gradient of the state behind it, and then of the one before it."""
    q, k, v, grad = parts
    if scale != 1:
        grad = torch.mul(grad, scale, out=work("scaled", *grad.shape))
    states = _states(work, strip, d, running, k, v)
    early = _times(q, d.before, work("early", *q.shape))
    late = _times(k, d.after, work("late", *k.shape))
    grad_states = _grad_states(work, strip, d, behind, early, grad)
    behind[strip.rows] = grad_states[:, 0]
    inner = work.product("inner", grad, v.mT)
    _times(inner, d.inside, inner)
    weights = work.product("scores", q, k.mT)
    _times(weights, d.inside, weights)
    scaled = _times(grad, d.before, work("decayed", *grad.shape))
    before, after = _folded(states[:, :-1]), _folded(grad_states[:, 1:])
    terms = [(inner, k, scaled, before.mT), (inner.mT, q, None, after.mT), (weights.mT, grad, late, after)]
    for name, into, (weight, other, decayed, carried) in zip("qkv", grads, terms, strict=True):
        part = work.target(f"grad_{name}", into, strip)
        torch.bmm(weight, other, out=part)
        if decayed is None:
            decayed = _times(v, d.after, work("decayed", *v.shape))
        torch.baddbmm(part, decayed, carried, out=part)
        work.write(part, into, strip)


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

    A thread keeps its buffers on the CPU, a few MB: fresh pages take as long as a strip's products.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}
        if like.device.type == "cpu":
            self._flat = _KEPT.__dict__.setdefault(str(like.dtype), {})

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = 1
        for n in shape:
            size *= n
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            # A tensor made under inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                flat = self._flat[name] = torch.empty(size, dtype=self._like.dtype, device=self._like.device)
        return flat[:size].view(shape)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, `[rows * blocks, ..]`, into the buffer `name`."""
        return torch.bmm(left, right, out=self(name, left.shape[0], left.shape[1], right.shape[2]))

    def target(self, name: str, tensor: Tensor, strip: _Strip) -> Tensor:
        """Where a strip of `tensor` `[rows, N, dim]` is computed, `[rows * blocks, m, dim]`: in place if it can be."""
        part = tensor[strip.rows, strip.tokens]
        shape = part.shape[0] * strip.blocks, part.shape[1] // strip.blocks, part.shape[2]
        if part.dtype == self._like.dtype and part.is_contiguous():
            return part.view(shape)
        return self(name, *shape)

    def read(self, name: str, tensor: Tensor, strip: _Strip) -> Tensor:
        """A strip of `tensor` in the dtype of the computation; a view if it can be."""
        part = self.target(name, tensor, strip)
        if not _shares(part, tensor):
            source = tensor[strip.rows, strip.tokens]
            part.view(source.shape).copy_(source)
        return part

    def write(self, part: Tensor, tensor: Tensor, strip: _Strip) -> None:
        """Bring what `target` gave back into `tensor`."""
        if not _shares(part, tensor):
            into = tensor[strip.rows, strip.tokens]
            into.copy_(part.view(into.shape))


class _DecaysOf:
    """Decays of a strip; with one slope a head they are the same for all strips of equal shape."""

    def __init__(self, slopes: Tensor, query: Tensor) -> None:
        slopes = slopes.to(_dtype(query))
        every_token = slopes.dim() == 3
        self.slopes = slopes.flatten(0, 1) if every_token else slopes.repeat(query.shape[0])
        self.every_token = every_token
        self._key: object = None
        self._known: _Decays | None = None

    def __call__(self, strip: _Strip) -> _Decays:
        length = (strip.tokens.stop - strip.tokens.start) // strip.blocks
        if self.every_token:
            steps = self.slopes[strip.rows, strip.tokens].unflatten(1, (strip.blocks, length))
            return _decays(steps.cumsum(-1), strip.blocks)
        if self._key != (strip.rows, strip.blocks, length):
            counts = torch.arange(1, length + 1, device=self.slopes.device, dtype=self.slopes.dtype)
            self._key = strip.rows, strip.blocks, length
            self._known = _decays(self.slopes[strip.rows, None, None] * counts, strip.blocks)
        return self._known


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
    return _Decays(*(threshold_(t, lowest, 0) for t in found))


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


def _states(work: _Buffers, strip: _Strip, d: _Decays, running: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The state at every border of a strip's blocks, `[rows, blocks + 1, D, E]`; the first is `running`'s."""
    added = work.product("added", _times(key, d.after, work("decayed", *key.shape)).mT, value)
    first = running[strip.rows]
    return _carry(work("states", first.shape[0], strip.blocks + 1, *first.shape[1:]), d.carry, first, added)


def _grad_states(work: _Buffers, strip: _Strip, d: _Decays, behind: Tensor, early: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the state at every border; the last is `behind`'s."""
    added = work.product("added", early.mT, grad)
    last = behind[strip.rows]
    into = work("grad_states", last.shape[0], strip.blocks + 1, *last.shape[1:])
    # Seen from the right: borders in reverse order, `added` belongs to the border on the left of its block.
    backwards = torch.cat([d.carry[:, -1:], d.carry[:, :-1]], 1).mT
    return _carry(into, backwards, last, added)


def _carry(into: Tensor, carry: Tensor, first: Tensor, added: Tensor) -> Tensor:
    """into_i = carry_i0 first + sum_j carry_ij added_j, over flat states."""
    flat = into.flatten(2)
    torch.mul(carry[:, :, :1], first.flatten(1)[:, None], out=flat)
    torch.baddbmm(flat, carry[:, :, 1:], added.view(flat.shape[0], -1, flat.shape[2]), out=flat)
    return into


def _times(tensor: Tensor, decay: Tensor, into: Tensor) -> Tensor:
    """`tensor` `[rows * blocks, m, ..]` times a decay `[rows, blocks or 1, m, ..]`, into `into`."""
    shape = decay.shape[0], -1
    torch.mul(tensor.unflatten(0, shape), decay, out=into.unflatten(0, shape))
    return into


def _folded(states: Tensor) -> Tensor:
    """`[rows * blocks, D, E]`; a copy when there are several rows."""
    return states.flatten(0, 1)


def _shares(part: Tensor, tensor: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def _initial(state: Tensor | None, query: Tensor, value: Tensor) -> Tensor:
    """The running state `[B * H, D, E]`, a copy."""
    if state is None:
        return query.new_zeros(query.shape[0] * query.shape[1], query.shape[3], value.shape[3], dtype=_dtype(query))
    return state.flatten(0, 1).to(_dtype(query), copy=True)


def _dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
