"""Keys and values of streaming heads: the first tokens and the recent ones, constant in the length of the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn.caches.quantization import KVFormat
from hf_attn.ops.hfattn_sparse.paged.pages import Pages


class Held(NamedTuple):
    """Stored tokens: pages `[B, H, 1, slots, D]`, and the number of the token in every slot (-1 none), `[B, slots]`."""

    key: Pages
    value: Pages
    position: Tensor

    def map(self, pages: Callable[[Pages], Pages], position: Tensor) -> Held:
        """Other slot numbers, and what `pages` makes of the keys and of the values."""
        return Held(pages(self.key), pages(self.value), position)


# Stands for numbers that `StreamingKV._tell` fills in.
_UNTOLD = torch.empty(0, 0, dtype=torch.int64)


class Undo(NamedTuple):
    """How to take back the newest append: the state before it, the tokens it brought, and ring slots it overwrote."""

    held: Held | None
    ring: bool
    evicted: bool
    new: Held
    overwritten: list[tuple]


class StreamingKV:
    """While a prompt comes in, `keep_sink` first and `keep_local` recent tokens in order; from the first single token
    on `sink / P` pages and a ring of `local / P + 1` pages (LServe, arXiv 2502.14866, section 3).

    Args:
        page_size: tokens a page (P).
        sink, local: tokens kept while decoding, multiples of `page_size`.
        keep_sink, keep_local: tokens kept before; at least `sink` and `local`.
        format: how keys and values are stored.
    """

    def __init__(
        self, page_size: int, sink: int, local: int, keep_sink: int, keep_local: int, format: KVFormat
    ) -> None:
        self.page_size, self.sink, self.local, self.format = page_size, sink, local, format
        self.keep_sink, self.keep_local = max(keep_sink, sink), max(keep_local, local)
        self._keep_local = self.keep_local
        self._held: Held | None = None
        # Slots and numbers of newest tokens that `position` does not tell yet.
        self._late: list[tuple[int, int]] = []
        self._flat: tuple[Pages, tuple[Tensor, Tensor]] | None = None
        self.ring = False
        self.evicted = False
        self._undo: Undo | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is stored."""
        return self._held is None

    @property
    def held(self) -> Held:
        """What is stored, once there is something."""
        if self._late:
            self._tell()
        assert self._held is not None
        return self._held

    @held.setter
    def held(self, held: Held) -> None:
        self._held, self._late = held, []

    def _tell(self) -> None:
        """Write the numbers of late tokens, and how to take back the newest of them."""
        late, self._late = self._late, []
        position = self.held.position
        slot, number = late.pop()
        if late:
            slots, numbers = torch.tensor(late, device=position.device).T
            position[:, slots] = numbers
        if self._undo is not None:
            new = self._undo.new._replace(position=position.new_full((position.shape[0], 1), number))
            self._undo.overwritten.append((position, slice(None), slot, position[:, slot].clone()))
            self._undo = self._undo._replace(new=new)
        position[:, slot] = number

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """Keys and values of floating slots, `[B, H, slots, D]`: views."""
        held = self._held
        assert held is not None
        if self._flat is None or self._flat[0] is not held.key:
            self._flat = held.key, (held.key.data[:, :, 0], held.value.data[:, :, 0])
        return self._flat[1]

    def slot_of(self, position: Tensor) -> Tensor:
        """Slot of the ring for token numbers: sink pages stay, later pages go round."""
        page = position // self.page_size
        sink_pages, ring_pages = self.sink // self.page_size, self.local // self.page_size + 1
        inside = torch.where(page < sink_pages, page, sink_pages + (page - sink_pages) % ring_pages)
        return inside * self.page_size + position % self.page_size

    def slot(self, number: int) -> int:
        """`slot_of` a single number."""
        around = self.local + self.page_size
        return number if number < self.sink else self.sink + (number - self.sink) % around

    def keep_everything(self) -> None:
        """Forget nothing from now on: somebody reads all tokens."""
        self.keep_local = 1 << 62

    # -- writing -------------------------------------------------------------------------------------------------------

    def encode(self, key: Tensor, value: Tensor, position: Tensor, scales: tuple[Tensor, Tensor] | None) -> Held:
        """New tokens `[B, H, n, D]` with their numbers `[B, n]` (-1: not real) as they are stored."""
        first, second = (None, None) if scales is None else scales
        return Held(self.format.encode(key, first), self.format.encode(value, second), position)

    def append(self, new: Held, *, single: bool, number: int | None = None) -> None:
        """Store new tokens; `single`: one token a row is being decoded, which closes the prompt.

        `number`: of the first new token, where it is the same in all rows and all tokens are real.
        """
        undo = Undo(None if self.empty else self.held, self.ring, self.evicted, new, [])
        if single and not self.ring:
            self._to_ring(new)
        if self.ring and single and number is not None:
            self._write_slot(new, number, undo.overwritten)
        elif self.ring:
            self._write_ring(new, undo.overwritten)
        else:
            self._extend(new)
        self._undo = undo

    def append_one(self, key: Tensor, value: Tensor, number: int, scales: tuple[Tensor, Tensor] | None) -> None:
        """`append` of the token `number` of every row, `[B, H, 1, D]`, to a ring, with few calls."""
        if self.format.name is not None:
            position = self.held.position.new_full((key.shape[0], 1), number)
            self.append(self.encode(key, value, position, scales), single=True, number=number)
            return
        held, slot = self._held, self.slot(number)
        assert held is not None
        overwritten: list[tuple] = []
        for data, into, token in zip(held[:2], self.flat, (key, value), strict=True):
            at = into.narrow(2, slot, 1)
            overwritten.append((data.data, slice(None), slot, at.clone()[:, :, 0]))
            at.copy_(token)
        # The number follows when it is asked for, at the latest before a slot comes up again.
        if len(self._late) >= self.local:
            self._tell()
        new = Held(Pages(key[:, :, None]), Pages(value[:, :, None]), _UNTOLD)
        self._undo = Undo(held, True, self.evicted, new, overwritten)
        self.evicted |= number >= self.sink + self.local + self.page_size
        self._late.append((slot, number))

    def _extend(self, new: Held) -> None:
        joined = new if self.empty else _join(self.held, new)
        newest = joined.position.amax(-1, keepdim=True)
        keep = (joined.position >= 0) & (
            (joined.position < self.keep_sink) | (joined.position > newest - self.keep_local)
        )
        if bool(keep.all()):
            self.held = joined
            return
        self.evicted |= bool(((joined.position >= 0) & ~keep).any())
        width = max(int(keep.sum(-1).max()), 1)
        order = (~keep).to(torch.int8).sort(dim=-1, stable=True).indices[:, :width]
        kept = _gather(joined, order)
        self.held = kept._replace(position=torch.where(keep.gather(1, order), kept.position, -1))

    def _to_ring(self, like: Held) -> None:
        slots = self.sink + self.local + self.page_size
        if self.empty:
            none = like.position.new_full((like.position.shape[0], slots), -1)
            self.held = like.map(lambda p: p.map(lambda t: t.new_zeros(*t.shape[:3], slots, *t.shape[4:])), none)
            self.ring = True
            return
        held = self.held
        newest = held.position.amax(-1, keepdim=True)
        ring_pages = self.local // self.page_size + 1
        recent = held.position // self.page_size > newest // self.page_size - ring_pages
        keep = (held.position >= 0) & ((held.position < self.sink) | recent)
        self.evicted |= bool(((held.position >= 0) & ~keep).any())
        slot = torch.where(keep, self.slot_of(held.position.clamp(min=0)), slots)
        source = held.position.new_full((held.position.shape[0], slots + 1), -1)
        source.scatter_(1, slot, torch.arange(held.position.shape[1], device=slot.device).expand_as(slot))
        source = source[:, :slots]
        moved = _gather(held, source.clamp(min=0))
        self.held = moved._replace(position=torch.where(source >= 0, moved.position, -1))
        self.ring = True

    def _write_ring(self, new: Held, overwritten: list[tuple]) -> None:
        """Write tokens to their slots, noting what was there; of several tokens for one slot the newest stays."""
        held = self.held
        newest = new.position.amax(-1, keepdim=True)
        ring_pages = self.local // self.page_size + 1
        recent = new.position // self.page_size > newest // self.page_size - ring_pages
        keep = (new.position >= 0) & ((new.position < self.sink) | recent)
        slot = self.slot_of(new.position.clamp(min=0))
        rows, columns = keep.nonzero(as_tuple=True)
        slots = slot[rows, columns]
        self.evicted |= bool((held.position[rows, slots] >= 0).any() | ((new.position >= 0) & ~keep).any())
        for target, source in zip(held[:2], new[:2], strict=True):
            for into, tokens in _tensors(target, source):
                overwritten.append((into, rows, slots, into[rows, :, 0, slots]))
                into[rows, :, 0, slots] = tokens[rows, :, 0, columns]
        overwritten.append((held.position, rows, slots, held.position[rows, slots]))
        held.position[rows, slots] = new.position[rows, columns]

    def _write_slot(self, new: Held, number: int, overwritten: list[tuple]) -> None:
        """`_write_ring` for the token `number` of every row, without looking at the device."""
        held, slot = self.held, self.slot(number)
        self.evicted |= number >= self.sink + self.local + self.page_size
        for target, source in zip(held[:2], new[:2], strict=True):
            for into, tokens in _tensors(target, source):
                overwritten.append((into, slice(None), slot, into[:, :, 0, slot].clone()))
                into[:, :, 0, slot] = tokens[:, :, 0, 0]
        overwritten.append((held.position, slice(None), slot, held.position[:, slot].clone()))
        held.position[:, slot] = number

    # -- changing ------------------------------------------------------------------------------------------------------

    def crop(self, counts: list[int], lengths: list[int]) -> None:
        """Forget the last `counts[b]` tokens of every row, `lengths[b]` then remain.

        Raises ValueError when tokens that the shorter rows would need are gone; changes nothing then.
        """
        if self.empty or not any(counts):
            return
        limit = torch.tensor(lengths, device=self.held.position.device)[:, None]
        if not self.evicted:
            self.held = self.held._replace(position=torch.where(self.held.position < limit, self.held.position, -1))
            self._undo = None
            return
        undo = self._undo
        if undo is None or bool(((undo.new.position >= 0).sum(-1) < torch.tensor(counts, device=limit.device)).any()):
            raise ValueError(
                f"cannot crop {max(counts)} tokens: streaming heads keep {self.sink} first and {self.local} recent "
                "tokens, and only the newest call can be taken back; reset the cache and run the prompt again"
            )
        for tensor, rows, slots, old in undo.overwritten:
            if tensor.dim() == 2:
                tensor[rows, slots] = old
            else:
                tensor[rows, :, 0, slots] = old
        self._held, self._late = undo.held, []
        self.ring, self.evicted, new = undo.ring, undo.evicted, undo.new
        kept = new._replace(position=torch.where(new.position < limit, new.position, -1))
        if bool((kept.position >= 0).any()):
            self.append(kept, single=False)
        self._undo = None

    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        self._undo = None
        if not self.empty:
            held, index = self.held, rows.to(self.held.position.device)
            position = held.position.index_select(0, index)
            self.held = held.map(lambda p: p.map(lambda t: t.index_select(0, index)), position)

    def reset(self) -> None:
        """Forget everything and free it."""
        self._held = self._undo = self._flat = None
        self._late = []
        self.ring = self.evicted = False
        self.keep_local = self._keep_local

    def to(self, device: torch.device | str) -> None:
        """Move everything."""
        self._undo = None
        if not self.empty:
            held = self.held
            self.held = held.map(
                lambda p: Pages(*(x.to(device) if isinstance(x, Tensor) else x for x in p)), held.position.to(device)
            )

    def bytes(self) -> int:
        """Bytes of keys, values and slot numbers."""
        if self.empty:
            return 0
        numbers = self.held.position.numel() * self.held.position.element_size()
        return sum(sum(pages.bytes().values()) for pages in self.held[:2]) + numbers


def _tensors(target: Pages, source: Pages) -> list[tuple[Tensor, Tensor]]:
    pairs = [(target.data, source.data)]
    if target.zero is not None:
        pairs += [(target.scale, source.scale), (target.zero, source.zero)]
    return pairs


def _join(first: Held, second: Held) -> Held:
    def joined(a: Pages, b: Pages) -> Pages:
        parts = iter([torch.cat([x, y], 3) for x, y in _tensors(a, b)])
        return a.map(lambda _: next(parts))

    position = torch.cat([first.position, second.position], 1)
    return Held(joined(first.key, second.key), joined(first.value, second.value), position)


def _gather(held: Held, slots: Tensor) -> Held:
    """Slots `[B, n]` of every row."""
    position = held.position.gather(1, slots)
    if slots.shape[0] == 1 or bool((slots == slots[:1]).all()):
        return held.map(lambda p: p.map(lambda t: t.index_select(3, slots[0])), position)
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    # Advanced indices on both sides of a slice put their dimensions first.
    return held.map(lambda p: p.map(lambda t: t[rows, :, :, slots].movedim(1, 3).contiguous()), position)
