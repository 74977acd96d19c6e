"""A calibrated plan of PAROAttention as tensors: one axis order a head, block masks by group of denoising steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn.grid import TokenGrid, axis_permutation
from hf_attn.mechanisms._paro_maps import unpack_bits
from hf_attn.pattern import BlockPattern


class LayerShape(NamedTuple):
    """What a layer attends over: lattice, tokens before and after it (-1 after: any number), heads."""

    frames: int
    height: int
    width: int
    before: int
    after: int
    heads: int

    def grid(self, length: int) -> TokenGrid:
        """The grid; a free number of tokens after the lattice is what `length` leaves."""
        rest = length - self.frames * self.height * self.width - self.before
        return TokenGrid(self.frames, self.height, self.width, self.before, rest if self.after < 0 else self.after)


class Reordering:
    """A permutation of the tokens of every head and the way back, in one gather each.

    Args:
        orders: axis order of each head; text stays where it is.
    """

    def __init__(self, grid: TokenGrid, orders: Sequence[int]) -> None:
        self.identity = not any(orders)
        with torch.inference_mode(False):
            places = [axis_permutation(grid, order) for order in orders]
            forward = torch.stack([place.forward for place in places])  # [H, S]
            inverse = torch.stack([place.inverse for place in places])
            heads, length = forward.shape
            head = torch.arange(heads)[:, None]
            # Rows of [S, H] and [H, S] storage.
            self._by_token = (forward * heads + head).flatten()
            self._by_head = (forward + head * length).flatten()
            self._back = (inverse + head * length).mT.flatten()

    def to(self, device: torch.device) -> Reordering:
        """Indices on a device."""
        moved = object.__new__(Reordering)
        moved.identity = self.identity
        for name in ("_by_token", "_by_head", "_back"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def apply(self, x: Tensor) -> Tensor:
        """`[B, H, S, D]` in the new order, contiguous; reads whichever of the two layouts the host has."""
        if self.identity:
            return x
        batch, heads, length, dim = x.shape
        if not x.transpose(1, 2).is_contiguous():
            return x.reshape(batch, heads * length, dim).index_select(1, self._by_head).view(x.shape)
        rows = x.transpose(1, 2).view(batch, length * heads, dim)
        return rows.index_select(1, self._by_token).view(batch, heads, length, dim)

    def undo(self, x: Tensor) -> Tensor:
        """The inverse; `[B, H, S, D]` as a view of `[B, S, H, D]`."""
        if self.identity:
            return x
        batch, heads, length, dim = x.shape
        rows = x.reshape(batch, heads * length, dim).index_select(1, self._back)
        return rows.view(batch, length, heads, dim).transpose(1, 2)


@dataclass(frozen=True)
class Entry:
    """What one call needs: the reordering, the pattern in that order, and (query, key) pairs computed and visible."""

    order: Reordering
    pattern: BlockPattern
    computed: float
    visible: float


def make_entry(grid: TokenGrid, orders: Sequence[int], mask: Tensor, block_size: int, device: torch.device) -> Entry:
    """From axis orders `[H]` and a block mask bool `[H, nb, nb]`."""
    sizes = {"block_q": block_size, "block_k": block_size, "q_len": grid.length, "k_len": grid.length}
    with torch.inference_mode(False):
        pattern = BlockPattern.from_dense(mask[None].cpu(), **sizes)
        computed, visible = (float(x) for x in pattern.pairs())
        pattern = BlockPattern(pattern.indices.to(device), block_size, block_size, grid.length, grid.length)
        return Entry(Reordering(grid, orders).to(device), pattern, computed, visible)


@dataclass(frozen=True, eq=False)
class PlanTables:
    """A plan.

    Args:
        order: uint8 `[L, H]`, ids of axis orders.
        block_mask: uint8 `[G, L, H, nb, ceil(nb / 8)]`, bits with the little end first, in kernel order.
        block_size: tokens per block.
        layers: shape of each layer; layers with fewer heads or blocks fill only the first of `order` and `block_mask`.
        timesteps: the scheduler's value at each calibrated step; empty when none were known.
        step_groups: which of the G masks each calibrated step uses.
        density: that was asked for.
    """

    order: Tensor
    block_mask: Tensor
    block_size: int
    layers: tuple[LayerShape, ...]
    timesteps: tuple[float, ...]
    step_groups: tuple[int, ...]
    density: float
    _entries: dict[tuple, Entry] = field(default_factory=dict, repr=False)

    def group(self, step: int | None, num_steps: int | None, timestep: float | None) -> int:
        """The mask set of a step: that of the nearest calibrated timestep, else of the step at the same share of the
        run, else the last one."""
        if timestep is not None and self.timesteps:
            nearest = min(range(len(self.timesteps)), key=lambda s: abs(self.timesteps[s] - timestep))
            return self.step_groups[nearest]
        if step is None:
            return self.step_groups[-1]
        count = len(self.step_groups)
        where = step if num_steps is None else step * count // num_steps
        return self.step_groups[min(where, count - 1)]

    def problem(self, layer: int | None, grid: TokenGrid, heads: int, head_offset: int) -> str | None:
        """Why the plan does not fit a call, naming both values, or None."""
        if layer is None or not 0 <= layer < len(self.layers):
            return f"the plan has {len(self.layers)} layers, but the call comes from layer {layer}"
        shape = self.layers[layer]
        if grid.shape != shape[:3]:
            ours, theirs = ("x".join(map(str, size)) for size in (shape[:3], grid.shape))
            return f"the plan was made for a grid of {ours} tokens, but layer {layer} has {theirs}; calibrate this size"
        text = (grid.text_before, grid.text_after if shape.after >= 0 else -1)
        if text != (shape.before, shape.after):
            return (
                f"the plan was made for {shape.before} text tokens before and {shape.after} after the grid, but layer "
                f"{layer} has {grid.text_before} and {grid.text_after}; calibrate with this text length"
            )
        if head_offset + heads > shape.heads:
            return f"the plan has {shape.heads} heads in layer {layer}, but the call needs {head_offset + heads}"
        return None

    def entry(self, layer: int, group: int, grid: TokenGrid, heads: int, offset: int, device: torch.device) -> Entry:
        """Reordering and pattern of some heads of a layer that fits, kept for the next call."""
        key = layer, group, grid, heads, offset, device
        if key not in self._entries:
            with torch.inference_mode(False):
                mine = slice(offset, offset + heads)
                blocks = -(-grid.length // self.block_size)
                mask = torch.ones(heads, blocks, blocks, dtype=torch.bool)
                # With a free text length only blocks of the lattice alone are the same; all others are kept anyway.
                known = blocks if self.layers[layer].after >= 0 else grid.lattice.stop // self.block_size
                stored = unpack_bits(self.block_mask[group, layer, mine].cpu(), known)[:, :known]
                mask[:, :known, :known] = stored
                orders = self.order[layer, mine].tolist()
                self._entries[key] = make_entry(grid, orders, mask, self.block_size, device)
        return self._entries[key]
