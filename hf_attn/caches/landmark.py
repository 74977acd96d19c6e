"""Cached blocks that are entered through their landmark: landmark keys apart, whole blocks on the device or the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn.caches.store import LayerStore, outliving
from hf_attn.checks import require_int


class LandmarkStore(LayerStore):
    """One layer: complete blocks, the keys of their landmarks, and the open block.

    Keys of complete blocks are turned by their place inside the block, those of the open block not at all; where a
    block stands is up to whoever reads it. A step is held until `commit`, so that one that fails leaves no trace.

    Args:
        block_size: tokens of a block, its landmark included, >= 2.
        offload: keep complete blocks on the CPU (pinned beside CUDA); landmark keys and the open block stay.
        max_blocks: newest blocks kept, by row; None for all.
    """

    def __init__(self, block_size: int, offload: bool = False, max_blocks: int | None = None) -> None:
        require_int("block_size", block_size, 2)
        self.block_size, self.offload, self.max_blocks = block_size, offload, max_blocks
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.batch = None
        self.slots = 0
        self.blocks: list[int] = []
        self.open_lengths: list[int] = []
        self.dropped: list[int] = []
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._landmarks: Tensor | None = None
        self._open_key: Tensor | None = None
        self._open_value: Tensor | None = None
        self._held: tuple[Tensor, Tensor, Any, Any] | None = None
        self.fetched_bytes = 0
        self._firsts: tuple[tuple, Tensor] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row so far, landmarks and dropped blocks included."""
        rows = zip(self.blocks, self.dropped, self.open_lengths, strict=True)
        return [(blocks + dropped) * self.block_size + tokens for blocks, dropped, tokens in rows]

    @property
    def _opened(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the open block, which is there from the first step on."""
        assert self._open_key is not None and self._open_value is not None
        return self._open_key, self._open_value

    @property
    def _complete(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and landmark keys, once a block is complete."""
        assert self._keys is not None and self._values is not None and self._landmarks is not None
        return self._keys, self._values, self._landmarks

    @property
    def heads(self) -> int:
        """KV heads."""
        return self._opened[0].shape[1]

    def check(self, key: Tensor, value: Tensor) -> None:
        """Raise ValueError when `[B, H, n, D]` and `[B, H, n, Dv]` do not continue what is stored."""
        if self._open_key is None or self._open_value is None:
            return
        for name, new, old in (("key", key, self._open_key), ("value", value, self._open_value)):
            if (new.shape[:2], new.shape[3]) != (old.shape[:2], old.shape[3]):
                raise ValueError(
                    f"{name} {tuple(new.shape)} does not continue a cache of {tuple(old.shape)} [B, H, block, D]"
                )

    def dense(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Not possible: keys have no fixed position here.

        Raises ValueError for every `[B, H, n, D]` and `[B, H, n, Dv]`.
        """
        raise ValueError("a landmark cache is read by landmark layers alone; use a DynamicCache for other attention")

    def hold(self, key: Tensor, value: Tensor, chunk: Any, rotary: Any) -> None:
        """Take note of a chunk's keys and values `[B, H, M, D]` (new tokens at the right) until `commit`."""
        self.check(key, value)
        if self._open_key is None:
            self._open(key, value)
        self._held = (key.detach(), value.detach(), chunk, rotary)

    @outliving
    def _open(self, key: Tensor, value: Tensor) -> None:
        """Make the first open block."""
        rows, heads, _, dim = key.shape
        self.batch = rows
        self._open_key = key.new_zeros(rows, heads, self.block_size, dim)
        self._open_value = value.new_zeros(rows, heads, self.block_size, value.shape[3])
        self.blocks, self.open_lengths, self.dropped = [0] * rows, [0] * rows, [0] * rows

    def local(self, key: Tensor, value: Tensor, chunk: Any) -> tuple[Tensor, Tensor, list[int]]:
        """Open block and chunk `[B, H, W, D]`, rows at the left, and their lengths."""
        opened = self.open_lengths
        lengths = [old + new for old, new in zip(opened, chunk.counts, strict=True)]
        if chunk.even and len(set(opened)) == 1:
            before = opened[0]
            if before:
                open_key, open_value = self._opened
                key = torch.cat([open_key[:, :, :before], key], 2)
                value = torch.cat([open_value[:, :, :before], value], 2)
            return key, value, lengths
        width = max(lengths)
        parts = []
        for old, new in zip(self._opened, (key, value), strict=True):
            part = new.new_zeros(*new.shape[:2], width, new.shape[3])
            for row, (before, count) in enumerate(zip(opened, chunk.counts, strict=True)):
                part[row, :, :before] = old[row, :, :before]
                part[row, :, before : before + count] = new[row, :, chunk.width - count :]
            parts.append(part)
        return parts[0], parts[1], lengths

    @outliving
    def commit(self) -> None:
        """Store what is held: complete blocks leave the open one."""
        if self._held is None:
            return
        key, value, chunk, rotary = self._held
        self._held = None
        size = self.block_size
        keys, values, lengths = self.local(key, value, chunk)
        complete = [length // size for length in lengths]
        if max(complete, default=0):
            self._append(keys, values, complete, rotary)
        for row, (length, count) in enumerate(zip(lengths, complete, strict=True)):
            rest = length - count * size
            for into, tokens in zip(self._opened, (keys, values), strict=True):
                into[row, :, :rest] = tokens[row, :, count * size : length]
            self.open_lengths[row] = rest

    def landmark_keys(self, count: int) -> Tensor:
        """`[B, H, count, D]`, turned by their place in the block; rows with fewer blocks hold anything finite."""
        return self._complete[2][:, :, :count]

    def fetch(self, ids: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Blocks `[B, Hq, R, k, b, D]`, on the device, for ids int64 `[B, Hq, R, k]`; zeros where not valid."""
        held_keys, held_values, _ = self._complete
        device, place = ids.device, held_keys.device
        # Whole blocks by one number each, as rows of a matrix: several times faster than by row, head and block.
        wanted = ids if valid is None else torch.where(valid, ids, 0)
        flat = (wanted.to(place) + self._first_blocks(*ids.shape[:2])).flatten()
        keys, values = (
            tensor.view(-1, tensor.shape[3] * tensor.shape[4])
            .index_select(0, flat)
            .view(*ids.shape, *tensor.shape[3:])
            .to(device, non_blocking=True)
            for tensor in (held_keys, held_values)
        )
        self.fetched_bytes = max(self.fetched_bytes, sum(x.numel() * x.element_size() for x in (keys, values)))
        if valid is not None and not bool(valid.all()):
            for tensor in (keys, values):
                tensor.masked_fill_(~valid[..., None, None], 0)
        return keys, values

    def _first_blocks(self, rows: int, heads: int) -> Tensor:
        """int64 `[B, Hq, 1, 1]`: number of the first block of each row and query head among all blocks."""
        held = self._complete[0]
        room, place = held.shape[2], held.device
        key = rows, heads, room, place
        if self._firsts is None or self._firsts[0] != key:
            row = torch.arange(rows, device=place)[:, None, None, None] * self.heads
            head = torch.arange(heads, device=place)[:, None, None] // (heads // self.heads)
            self._firsts = key, (row + head) * room
        return self._firsts[1]

    def crop(self, count: int) -> None:
        """Not possible beyond the open block, whose tokens have landmarks that hosts do not count.

        Raises ValueError for more tokens than that.
        """
        raise ValueError(
            "a landmark cache cannot forget single tokens (assisted and prompt-lookup decoding ask for it); use greedy "
            "search, sampling or beams"
        )

    @outliving
    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order; a row may repeat.

        rows: int64 `[rows]`.
        """
        if self.batch is None:
            return
        order = rows.tolist()
        for name in ("_keys", "_values", "_landmarks", "_open_key", "_open_value"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))
        for name in ("blocks", "open_lengths", "dropped"):
            setattr(self, name, [getattr(self, name)[row] for row in order])
        self.batch = len(order)

    def to(self, device: torch.device | str) -> None:
        """Move everything but offloaded blocks."""
        for name in ("_keys", "_values", "_landmarks", "_open_key", "_open_value"):
            tensor = getattr(self, name)
            if tensor is not None and not (self.offload and name in ("_keys", "_values")):
                setattr(self, name, tensor.to(device))

    def bytes(self) -> dict[str, int]:
        """Bytes in use: landmarks, open, blocks; the largest fetch so far; and what is allocated."""
        if self._open_key is None or self._open_value is None:
            return {"landmarks": 0, "open": 0, "blocks": 0, "fetched": 0, "allocated": 0}
        rows, heads, size, dim = self._open_key.shape
        wide, width = dim + self._open_value.shape[3], self._open_key.element_size()
        held = sum(self.blocks) * heads * width
        tensors = [self._keys, self._values, self._landmarks, self._open_key, self._open_value]
        return {
            "landmarks": held * dim,
            "open": rows * heads * size * wide * width,
            "blocks": held * size * wide,
            "fetched": self.fetched_bytes,
            "allocated": sum(x.numel() * x.element_size() for x in tensors if x is not None),
        }

    def device_bytes(self) -> int:
        """Bytes on the device of the open block, by what the tensors say; fetched blocks come on top."""
        device = self._open_key.device if self._open_key is not None else None
        # On a machine without a GPU everything lies on the CPU, so offloaded tensors are told apart by name.
        names = ("_landmarks", "_open_key", "_open_value") + (() if self.offload else ("_keys", "_values"))
        tensors = [getattr(self, name) for name in names]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None and x.device == device)

    def _append(self, keys: Tensor, values: Tensor, complete: list[int], rotary: Any) -> None:
        size, most = self.block_size, max(complete)
        self._grow(max(old + new for old, new in zip(self.blocks, complete, strict=True)), keys, values)
        keys, values = (x[:, :, : most * size].unflatten(2, (most, size)) for x in (keys, values))
        turned = rotary.rotate(keys, torch.arange(size, device=keys.device))
        held_keys, held_values, landmarks = self._complete
        for row, count in enumerate(complete):
            at = slice(self.blocks[row], self.blocks[row] + count)
            held_keys[row, :, at] = turned[row, :, :count].to(held_keys.device)
            held_values[row, :, at] = values[row, :, :count].to(held_values.device)
            landmarks[row, :, at] = turned[row, :, :count, -1]
            self.blocks[row] += count
            if self.max_blocks is not None and self.blocks[row] > self.max_blocks:
                self._drop(row, self.blocks[row] - self.max_blocks)

    def _drop(self, row: int, count: int) -> None:
        """Forget a row's oldest blocks."""
        kept = self.blocks[row] - count
        for tensor in self._complete:
            tensor[row, :, :kept] = tensor[row, :, count : count + kept].clone()
        self.blocks[row] = kept
        self.dropped[row] += count

    def _grow(self, blocks: int, keys: Tensor, values: Tensor) -> None:
        """Room for `blocks` blocks: half as much again, rounded up to 16."""
        have = 0 if self._keys is None else self._keys.shape[2]
        if blocks <= have:
            return
        room = -(-max(blocks, have + have // 2) // 16) * 16
        rows, heads, _, dim = keys.shape
        place = "cpu" if self.offload else keys.device
        pin = self.offload and keys.device.type == "cuda"
        for name, shape, device in (
            ("_keys", (rows, heads, room, self.block_size, dim), place),
            ("_values", (rows, heads, room, self.block_size, values.shape[3]), place),
            ("_landmarks", (rows, heads, room, dim), keys.device),
        ):
            pinned = pin and name != "_landmarks"
            new = torch.zeros(shape, dtype=keys.dtype, device=device, pin_memory=pinned)
            if have:
                new[:, :, :have] = getattr(self, name)
            setattr(self, name, new)
