"""Neural memory for rows of any length and any place in their chunk: aligned here, computed in `torch_path`.

There is no custom operator: the op is a composition of matrix products that autograd differentiates (twice inside),
and that compilers trace as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..counters import count
from . import reference, torch_path

Weights = list[Tensor]


def run_reference(
    query: Tensor, key: Tensor, value: Tensor, gates: tuple[Tensor, Tensor, Tensor], states: tuple[Weights, ...],
    offset: int | Tensor, chunk: int, mask: Tensor | None, before: bool, **loss: object,
) -> tuple[Tensor, Weights, Weights, Weights]:  # fmt: skip
    """Arguments and results as `run`, one token after the other."""
    count("neural_memory", "reference")
    offset = torch.as_tensor(offset, device=query.device).expand(query.shape[0])
    return reference.forward(query, key, value, *gates, *states, offset, chunk, mask, before, **loss)


def run(
    query: Tensor, key: Tensor, value: Tensor, gates: tuple[Tensor, Tensor, Tensor], states: tuple[Weights, ...],
    offset: int | Tensor, chunk: int, mask: Tensor | None, before: bool, **loss: object,
) -> tuple[Tensor, Weights, Weights, Weights]:  # fmt: skip
    """y `[B, H, T, d]` and the W, S, W_c behind the last token, L tensors `[B, H, in, out]` each.

    Args:
        query, key, value: `[B, H, T, d]` in fp32 or fp64.
        gates: theta, eta, alpha `[B, H, T]`.
        states: W, S and W_c before the first token.
        offset: tokens of the current chunk that lie behind, one number or int64 `[B]`.
        mask: bool `[B, T]`, real tokens; None for all.
    """
    if not torch.compiler.is_compiling():
        count("neural_memory", "torch")
    batch, heads, length = query.shape[:3]
    if length == 0:
        return torch.zeros_like(query), *states
    slots, begun = None, False
    if mask is not None or isinstance(offset, Tensor):
        slots, mask, starts = _grid(mask, offset, batch, length, chunk, query.device)
        states = (*states[:2], [torch.where(starts, w, a) for w, a in zip(states[0], states[2], strict=True)])
        query, key, value, *gates = (_on_grid(t, slots, mask.shape[1]) for t in (query, key, value, *gates))
        mask = mask[:, None].expand(-1, heads, -1).flatten(0, 1)
        offset, begun = 0, True
    flat = [t.flatten(0, 1) for t in (query, key, value, *gates)]
    weights, momentum, anchor = ([t.flatten(0, 1) for t in state] for state in states)
    if length == 1 and slots is None:
        anchor = weights if offset % chunk == 0 else anchor
        out, weights, momentum = torch_path.step(*flat, weights, momentum, anchor, before, **loss)
    else:
        out, weights, momentum, anchor = torch_path.forward(
            *flat, weights, momentum, anchor, offset, chunk, mask, before, begun, **loss
        )
    out = out.unflatten(0, (batch, heads))
    states = ([t.unflatten(0, (batch, heads)) for t in state] for state in (weights, momentum, anchor))
    return (out if slots is None else _from_grid(out, slots)), *states


def _grid(
    mask: Tensor | None, offset: int | Tensor, batch: int, length: int, chunk: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the tokens on one grid of chunks, int64 `[B, T]` (hidden tokens: -1), the places in use, bool `[B, G]`,
    and whether a row begins a chunk with its first token, bool `[B, 1, 1, 1]`."""
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    offset = (torch.as_tensor(offset, device=device) % chunk).expand(batch)
    last = offset + mask.sum(1)
    slots = (offset[:, None] + mask.long().cumsum(1) - 1).masked_fill(~mask, -1)
    places = torch.arange(max(int(last.max()), 1), device=device)
    return slots, (places >= offset[:, None]) & (places < last[:, None]), (offset == 0)[:, None, None, None]


def _on_grid(tensor: Tensor, slots: Tensor, size: int) -> Tensor:
    """`[B, H, T, ...]` -> `[B, H, G, ...]`, zero where no token is."""
    index = slots.masked_fill(slots < 0, size)[:, None].expand(tensor.shape[:3])
    if tensor.dim() == 4:
        index = index[..., None].expand_as(tensor)
    grid = tensor.new_zeros(*tensor.shape[:2], size + 1, *tensor.shape[3:])
    return grid.scatter(2, index, tensor)[:, :, :size]


def _from_grid(out: Tensor, slots: Tensor) -> Tensor:
    """The reverse; hidden tokens get 0."""
    index = slots.clamp(min=0)[:, None, :, None].expand(*out.shape[:2], -1, out.shape[3])
    return out.gather(2, index) * (slots >= 0)[:, None, :, None]
