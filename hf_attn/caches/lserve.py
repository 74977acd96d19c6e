"""One layer's storage for LServe: retrieval heads in pages, streaming heads in sinks and a ring, the last selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn.caches.head_kinds import HeadPlan
from hf_attn.caches.paged import PagedKV
from hf_attn.caches.quantization import KVFormat, absmax_scale
from hf_attn.caches.store import LayerStore, outliving
from hf_attn.caches.streaming import StreamingKV
from hf_attn.ops.hfattn_sparse.paged.kept import KeptPages


@dataclass(frozen=True)
class StoreOptions:
    """What one layer keeps.

    Args:
        retrieval: one flag a KV head, True for retrieval heads; None makes every head one.
        page_size, logical_page_size, dec_sink, dec_local, ctx_sink, ctx_local: tokens, as in `LServeConfig`.
        kv_quant, zero_dtype: format of keys and values, see `KVFormat`.
        stats_dtype: name of the statistics' dtype; None takes the keys'.
        kv_scales: scales of keys and values for "int8-per-tensor"; None takes them from the first call.
    """

    retrieval: tuple[bool, ...] | None
    page_size: int
    logical_page_size: int
    dec_sink: int
    dec_local: int
    ctx_sink: int
    ctx_local: int
    kv_quant: str | None = None
    zero_dtype: str = "float16"
    stats_dtype: str | None = None
    kv_scales: tuple[float, float] | None = None


@dataclass
class Selection:
    """Pages a selecting step chose, int64 `[B, heads, M - 1]`; for each row the newest page then, and if it chose."""

    pages: Tensor
    last: list[int]
    valid: list[bool]


class LServeStore(LayerStore):
    """Keys and values of one layer, by kind of head; tokens of a row are numbered from its first real one."""

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        format = KVFormat(options.kv_quant, options.zero_dtype)
        stats_dtype = None if options.stats_dtype is None else getattr(torch, options.stats_dtype)
        self.paged = PagedKV(options.page_size, options.logical_page_size, format, stats_dtype)
        self.streaming = StreamingKV(
            options.page_size, options.dec_sink, options.dec_local, options.ctx_sink, options.ctx_local, format
        )
        self._heads: dict[str, Any] = {}
        self._plan: HeadPlan | None = None
        self.all_retrieve = options.retrieval is None or all(options.retrieval)
        self.reset()

    def reset(self) -> None:
        """Forget everything and free it."""
        self.paged.reset()
        self.streaming.reset()
        self.slots, self.batch = 0, None
        self.lengths: list[int] = []
        # Which slots hold real tokens, bool [B, slots]; None while all do.
        self.real: Tensor | None = None
        self.selection: Selection | None = None
        # Slots and selection before the newest step.
        self._before: tuple[int, Selection | None] = (0, None)
        self.pages_read: int | Tensor = 0
        # The pages of `kept.pages`, which may be those of the selection, side by side.
        self.kept: KeptPages | None = None
        self.scales: tuple[Tensor, Tensor] | None = None
        self._like: tuple[int, int, int, torch.dtype, torch.device] | None = None

    # -- heads ---------------------------------------------------------------------------------------------------------

    def heads(self, count: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """KV heads that retrieve and KV heads that stream, int64; (None, empty) when all retrieve and the reverse."""
        key = (count, device)
        if self._heads.get("for") != key:
            self._heads = {"for": key, "lists": head_lists(self.options.retrieval, count, device)}
        return self._heads["lists"]

    def query_heads(self, count: int, group: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The query heads of `heads`, `group` for each KV head; None for all of them."""
        lists = self.heads(count, device)
        if self._heads.get("group") != group:
            wide = tuple(None if heads is None else query_heads(heads, group) for heads in lists)
            self._heads |= {"group": group, "wide": wide}
        return self._heads["wide"]

    def plan(self, count: int, group: int, device: torch.device) -> HeadPlan:
        """`heads` and `query_heads` for steps with few calls."""
        if self._plan is None or self._plan.of != (count, group, device):
            self._plan = HeadPlan(self.options.retrieval, count, group, device)
        return self._plan

    # -- writing -------------------------------------------------------------------------------------------------------

    def check(self, key: Tensor, value: Tensor) -> None:
        """Raise ValueError when new tokens do not continue what is stored; changes nothing."""
        flags = self.options.retrieval
        if flags is not None and len(flags) != key.shape[1]:
            raise ValueError(
                f"this cache was made for {len(flags)} KV heads, got keys with {key.shape[1]}; make it from the config "
                "of the model that runs"
            )
        if self.options.kv_quant == "int4" and (key.shape[3] % 2 or value.shape[3] % 2):
            raise ValueError(f"kv_quant='int4' needs even head dimensions, got {key.shape[3]} and {value.shape[3]}")
        if self._like is None:
            return
        heads, dim, value_dim, dtype, device = self._like
        if key.shape[0] != self.batch:
            raise ValueError(
                f"this cache holds a batch of {self.batch}, got a batch of {key.shape[0]}; reset it or use another one"
            )
        if (key.shape[1], key.shape[3], value.shape[3]) != (heads, dim, value_dim):
            raise ValueError(
                f"this cache holds {heads} KV heads of size {dim} (values {value_dim}), got {key.shape[1]} of size "
                f"{key.shape[3]} (values {value.shape[3]}); it belongs to another model"
            )
        if (key.dtype, key.device) != (dtype, device):
            raise ValueError(
                f"this cache holds {dtype} on {device}, got {key.dtype} on {key.device}; reset it or use another one"
            )

    def positions(self, real: Tensor | None, batch: int, count: int, device: torch.device) -> tuple[Tensor, list[int]]:
        """Numbers of new tokens in their rows, int64 `[B, n]` (-1: not real), and how many are real in each row."""
        start = torch.tensor(self.lengths or [0] * batch, device=device)[:, None]
        if real is None:
            return start + torch.arange(count, device=device), [count] * batch
        rank = start + real.long().cumsum(-1) - 1
        return torch.where(real, rank, -1), real.sum(-1).tolist()

    @outliving
    def write(self, key: Tensor, value: Tensor, real: Tensor | None) -> list[int]:
        """Write the retrieval heads' new tokens without counting them; gives the real tokens a row."""
        self._scales_for(key, value)
        if not self.lengths:
            self.lengths = [0] * key.shape[0]
        counts = [key.shape[2]] * key.shape[0] if real is None else real.sum(-1).tolist()
        retrieval, _ = self.heads(key.shape[1], key.device)
        if retrieval is None or retrieval.numel():
            keys, values = pick(key, retrieval), pick(value, retrieval)
            if real is not None:
                keys, values = left_aligned(keys, real), left_aligned(values, real)
            self.paged.write(keys, values, counts, self.scales)
        return counts

    @outliving
    def commit(
        self, key: Tensor, value: Tensor, real: Tensor | None, *, single: bool, selection: Selection | None = None
    ) -> None:
        """Count new tokens of all heads, after `write`; `single` for one decoded token a row.

        `selection` is what its step chose or used, and what the next one may use.
        """
        retrieval, streaming = self.heads(key.shape[1], key.device)
        counts = [key.shape[2]] * key.shape[0] if real is None else real.sum(-1).tolist()
        if streaming is None or streaming.numel():
            tokens = pick(key, streaming), pick(value, streaming)
            equal = self.lengths[0] if real is None and len(set(self.lengths)) == 1 else None
            if equal is not None and key.shape[2] == 1:
                position = torch.full((key.shape[0], 1), equal, device=key.device)
            else:
                position, _ = self.positions(real, key.shape[0], key.shape[2], key.device)
            self.streaming.append(self.streaming.encode(*tokens, position, self.scales), single=single, number=equal)
        if retrieval is None or retrieval.numel():
            keys = pick(key, retrieval)
            self.paged.advance(keys if real is None else left_aligned(keys, real), counts)
        if self.kept is not None:
            # It did not get these tokens.
            self.kept.cut(min(self.lengths))
        self._before = (self.slots, self.selection)
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        self._count_slots(key, real)
        self._like = (key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
        self.selection = selection

    def next_number(self) -> int | None:
        """Number of the next token where a step can be short: equal rows, all real, streaming heads in a ring."""
        if self.real is not None or not self.lengths or self.lengths.count(self.lengths[0]) != len(self.lengths):
            return None
        if not self.streaming.ring and not self.all_retrieve:
            return None
        return self.lengths[0]

    def commit_one(
        self, tokens: tuple[Tensor, Tensor] | None, keys: Tensor | None, selection: Selection | None
    ) -> None:
        """`commit` of one token a row where `next_number` is given.

        Args:
            tokens: key and value of the streaming heads, `[B, H, 1, D]`; None when there are none.
            keys: of the retrieval heads, which `write_one` wrote; None when there are none.
        """
        number = self.lengths[0]
        if tokens is not None:
            self.streaming.append_one(*tokens, number, self.scales)
        if keys is not None:
            self.paged.advance_one(keys)
        self._before = (self.slots, self.selection)
        self.lengths = [number + 1] * len(self.lengths)
        self.slots += 1
        self.selection = selection

    def append(self, key: Tensor, value: Tensor, real: Tensor | None, *, single: bool = False) -> None:
        """`write` and `commit`."""
        self.write(key, value, real)
        self.commit(key, value, real, single=single)

    def _scales_for(self, key: Tensor, value: Tensor) -> None:
        if self.options.kv_quant != "int8-per-tensor" or self.scales is not None:
            return
        given = self.options.kv_scales
        if given is not None:
            keys, values = (torch.tensor(x, dtype=torch.float32, device=key.device) for x in given)
        else:
            keys, values = absmax_scale(key), absmax_scale(value)
        self.scales = (keys, values)

    def _count_slots(self, key: Tensor, real: Tensor | None) -> None:
        batch, count = key.shape[0], key.shape[2]
        self.batch = batch
        if self.real is not None or real is not None:
            old = self.real if self.real is not None else torch.ones(batch, self.slots, dtype=torch.bool)
            new = torch.ones(batch, count, dtype=torch.bool) if real is None else real.cpu()
            self.real = torch.cat([old, new], 1)
        self.slots += count

    # -- reading -------------------------------------------------------------------------------------------------------

    def dense(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append, and give everything in the host's slots; padded slots hold 0. ValueError when tokens are gone."""
        if self.streaming.evicted or (self.streaming.ring and not self.streaming.empty):
            raise ValueError(
                "this cache has dropped tokens of its streaming heads, so only the mechanism that made it can go on; "
                "apply 'lserve' again, or run the prompt with another cache"
            )
        retrieval, streaming = self.heads(key.shape[1], key.device)
        self.streaming.keep_everything()
        self.append(key, value, None)
        length = max(self.lengths)
        found = []
        for which, new in enumerate((key, value)):
            out = new.new_zeros(*new.shape[:2], length, new.shape[3])
            if retrieval is None or retrieval.numel():
                put(out, retrieval, self.paged.tokens(length)[which].to(new.dtype))
            if streaming is None or streaming.numel():
                held = self.streaming.held
                tokens = held[:2][which].dense()[:, :, 0].to(new.dtype)
                order = held.position.clamp(min=0)[:, None, :, None].expand_as(tokens)
                ordered = torch.zeros(*tokens.shape[:2], length, tokens.shape[3], dtype=new.dtype, device=new.device)
                put(out, streaming, ordered.scatter_(2, order, tokens))
            found.append(self._in_slots(out))
        return found[0], found[1]

    def _in_slots(self, tokens: Tensor) -> Tensor:
        if self.real is None:
            return tokens
        real = self.real.to(tokens.device)
        rank = (real.long().cumsum(-1) - 1).clamp(min=0)
        spread = tokens.gather(2, rank[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3]))
        return spread.masked_fill(~real[:, None, :, None], 0)

    # -- changing ------------------------------------------------------------------------------------------------------

    @outliving
    def crop(self, count: int) -> None:
        """Forget the last `count` slots; ValueError, and no change, when streaming heads have lost what is needed."""
        if count <= 0 or self.slots == 0:
            return
        if count >= self.slots:
            self.reset()
            return
        if self.real is None:
            counts = [count] * len(self.lengths)
        else:
            counts = self.real[:, -count:].sum(-1).tolist()
        lengths = [n - c for n, c in zip(self.lengths, counts, strict=True)]
        self.streaming.crop(counts, lengths)
        if self.kept is not None:
            self.kept.cut(min(lengths))
        if self.paged.key is not None:
            self.paged.crop(counts)
        self.lengths, self.selection = lengths, None
        self.slots -= count
        self.real = None if self.real is None else self.real[:, :-count]

    def take_back(self, count: int) -> None:
        """Undo the newest step of `count` slots; its selection is forgotten, and the one before it is back."""
        slots, selection = self._before
        self.crop(count)
        if self.slots == slots:
            self.selection = selection

    @outliving
    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        if self.batch is None:
            return
        self.kept = None
        self.paged.select_rows(rows)
        self.streaming.select_rows(rows)
        listed = rows.tolist()
        self.batch = len(listed)
        self.lengths = [self.lengths[row] for row in listed]
        self.real = None if self.real is None else self.real[rows.cpu()]
        if self.selection is not None:
            found = self.selection
            pages = found.pages.index_select(0, rows.to(found.pages.device))
            self.selection = Selection(pages, [found.last[r] for r in listed], [found.valid[r] for r in listed])

    @outliving
    def to(self, device: torch.device | str) -> None:
        """Move everything."""
        self.kept = None
        self.paged.to(device)
        self.streaming.to(device)
        if self.selection is not None:
            self.selection.pages = self.selection.pages.to(device)

    def bytes(self) -> dict[str, int]:
        """Bytes held: pages of retrieval heads by part, copies of chosen ones, streaming heads, and all allocated."""
        found = self.paged.bytes()
        others = {"copies": 0 if self.kept is None else self.kept.bytes(), "streaming": self.streaming.bytes()}
        return {**found, **others, "allocated": found["allocated"] + sum(others.values())}

    @property
    def pages_held(self) -> int:
        """Pages in use, over rows and retrieval heads."""
        heads = 0 if self.paged.key is None else self.paged.key.data.shape[1]
        return heads * sum(-(-n // self.options.page_size) for n in self.paged.lengths)


def head_lists(
    retrieval: tuple[bool, ...] | None, count: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Retrieval and streaming KV heads as int64 lists; None stands for all of them."""
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    if retrieval is None or all(retrieval):
        return None, nothing
    if not any(retrieval):
        return nothing, None
    # Listed on the host: a compiler could not know how many a mask on the device holds.
    lists = [[head for head, kind in enumerate(retrieval) if kind is wanted] for wanted in (True, False)]
    reading, streaming = (torch.tensor(heads, dtype=torch.int64, device=device) for heads in lists)
    return reading, streaming


def query_heads(heads: Tensor, group: int) -> Tensor:
    """The query heads that read the given KV heads."""
    return (heads[:, None] * group + torch.arange(group, device=heads.device)).flatten()


def pick(x: Tensor, heads: Tensor | None) -> Tensor:
    """Heads of `[B, H, ...]`; all of them for None."""
    return x if heads is None else x.index_select(1, heads)


def put(out: Tensor, heads: Tensor | None, part: Tensor) -> None:
    """Write heads of `[B, H, ...]`."""
    if heads is None:
        out.copy_(part)
    else:
        out.index_copy_(1, heads, part)


def left_aligned(x: Tensor, real: Tensor) -> Tensor:
    """Tokens `[B, H, n, D]` with each row's real ones first, in order."""
    order = (~real).to(torch.int8).sort(dim=-1, stable=True).indices
    return x.gather(2, order[:, None, :, None].expand_as(x))
