"""One new token a row: which pages the retrieval heads read, and reading them, from a store or from plain keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.caches.lserve import LServeStore, Selection, pick, put, query_heads
from hf_attn.caches.streaming import StreamingKV
from hf_attn.call import AttentionCall
from hf_attn.ops import choose_path, page_scores, page_statistics, paged_attention, select_pages

# -- choosing ----------------------------------------------------------------------------------------------------------


def choose(
    query: Tensor,
    lengths: list[int],
    config: Any,
    previous: Selection | None,
    statistics: Callable[[int], Tensor],
) -> tuple[Selection | None, list[bool], bool]:
    """Run the selector, or keep what an earlier step chose (LServe 2.5 and 2.6).

    Args:
        query: `[B, Hq, D]` of the retrieval heads.
        lengths: tokens of every row, the current one included.
        previous: selection of the step before, if any.
        statistics: `pages -> [B, H, pages, G, 2, D]` over the cached tokens, the current one left out.

    Returns the selection, whether each row selects at all (it is long enough), and whether the selector ran.
    """
    threshold, size = config.dense_up_to, config.page_size
    long = [length > threshold for length in lengths]
    if not any(long):
        return None, long, False
    if lengths.count(lengths[0]) == len(lengths):
        if lengths[0] % config.reuse_interval and previous is not None and all(previous.valid):
            return previous, long, False
        newest = max(lengths[0] - 2, 0) // size
        scores = _scores(query, statistics(newest + 1), config)
        at = torch.full((len(lengths),), newest, device=query.device)
        pages = select_pages(scores, at, count=config.selected_pages)
        return Selection(pages, [newest] * len(lengths), [True] * len(lengths)), long, True
    known = [previous is not None and previous.valid[b] for b in range(len(lengths))]
    run = [long[b] and (length % config.reuse_interval == 0 or not known[b]) for b, length in enumerate(lengths)]
    if not any(run):
        return previous, long, False
    last = [max(length - 2, 0) // size for length in lengths]
    scores = _scores(query, statistics(max(last) + 1), config)
    at = torch.tensor(last, device=query.device)
    pages = select_pages(scores, at, count=config.selected_pages)
    if all(run):
        return Selection(pages, last, [True] * len(run)), long, True
    if previous is not None:
        keep = torch.tensor(run, device=query.device)[:, None, None]
        pages = torch.where(keep, pages, previous.pages)
        last = [new if now else old for now, new, old in zip(run, last, previous.last, strict=True)]
    valid = [now or old for now, old in zip(run, known, strict=True)]
    return Selection(pages, last, valid), long, True


def _scores(query: Tensor, stats: Tensor, config: Any) -> Tensor:
    """Page scores, fp32 `[B, Hq, pages]`, or one row a KV head with group_select="group_max"."""
    scores = page_scores(query, stats)
    if config.group_select == "group_max":
        scores = scores.unflatten(1, (stats.shape[1], -1)).amax(2)
    return scores


def page_lists(selection: Selection, long: list[bool], lengths: list[int], size: int) -> Tensor:
    """Pages every list reads, int64 `[B, heads, W]`, -1 padded: the chosen ones and all since, or simply all."""
    pages = selection.pages
    first = [last if chosen else 0 for last, chosen in zip(selection.last, long, strict=True)]
    newest = [max(length - 1, 0) // size for length in lengths]
    width = max(b - a for a, b in zip(first, newest, strict=True)) + 1
    start = torch.tensor(first, device=pages.device)[:, None]
    tail = start + torch.arange(width, device=pages.device)
    if len(lengths) > 1:
        tail = torch.where(tail <= torch.tensor(newest, device=pages.device)[:, None], tail, -1)
        if not all(long):
            pages = torch.where(torch.tensor(long, device=pages.device)[:, None, None], pages, -1)
    return torch.cat([pages, tail[:, None].expand(-1, pages.shape[1], -1)], -1)


# -- from a store ------------------------------------------------------------------------------------------------------


def from_store(
    call: AttentionCall, config: Any, store: LServeStore, real: Tensor | None
) -> tuple[Tensor, dict[str, Any]]:
    """Attention of one new token a row, which is stored as well: out `[B, Hq, 1, Dv]`, and what was read."""
    query, key, value = call.query, call.key, call.value
    group = query.shape[1] // key.shape[1]
    retrieval, streaming = store.heads(key.shape[1], key.device)
    retrieving, windowed = store.query_heads(key.shape[1], group, key.device)
    counts = store.write(key, value, real)
    lengths = [n + c for n, c in zip(store.lengths, counts, strict=True)]
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    done: dict[str, Any] = {"lengths": lengths, "selector_runs": 0}
    selection = None
    if retrieval is None or retrieval.numel():
        queries, keys, values = pick(query[:, :, 0], retrieving), pick(key, retrieval), pick(value, retrieval)
        part, selection = _pages(queries, keys, values, lengths, config, store, call.scale, done)
        put(out, retrieving, part[:, :, None])
    store.pages_read = store.pages_read + done.get("pages_read", 0)
    store.commit(key, value, real, single=True, selection=selection)
    if streaming is None or streaming.numel():
        queries, keys, values = pick(query, windowed), pick(key, streaming), pick(value, streaming)
        put(out, windowed, _streaming(queries, keys, values, lengths, store, call.scale))
    if real is not None:
        out = out.masked_fill(~real[:, None, :, None], 0.0)
    return out, done


def _pages(query, key, value, lengths, config, store: LServeStore, scale, done) -> tuple[Tensor, Selection | None]:
    paged = store.paged
    selection, long, ran = choose(query, lengths, config, store.selection, lambda pages: paged.stats[:, :, :pages])
    done["selector_runs"] = int(ran)
    done["long"] = long
    if selection is None and paged.format.name is None and len(set(lengths)) == 1:
        keys, values = paged.tokens(lengths[0])
        gqa = query.shape[1] != keys.shape[1]
        out = scaled_dot_product_attention(query[:, :, None], keys, values, scale=scale, enable_gqa=gqa)[:, :, 0]
        done["pages_read"] = sum(-(-n // config.page_size) for n in lengths) * keys.shape[1]
        return out, None
    if selection is None:
        batch, heads = key.shape[:2]
        nothing = Selection(query.new_empty(batch, heads, 0, dtype=torch.int64), [0] * batch, [False] * batch)
        lists = page_lists(nothing, [False] * batch, lengths, config.page_size)
    else:
        lists = page_lists(selection, long, lengths, config.page_size)
    done["pages_read"] = (lists >= 0).sum() if len(lengths) > 1 else lists.shape[1] * lists.shape[2]
    current = None if paged.format.name is None else (key[:, :, 0], value[:, :, 0])
    length = torch.tensor(lengths, device=query.device)
    return paged_attention(query, paged.key, paged.value, lists, length=length, scale=scale, current=current), selection


def _streaming(query, key, value, lengths, store: LServeStore, scale) -> Tensor:
    """Sinks and the decode window `[B, Hq, 1, Dv]`, once the new token is stored; it counts as it was before that."""
    streaming = store.streaming
    if streaming.ring and choose_path("paged_attention", query, query.shape[3], value.shape[3]) == "triton":
        return _ring(query, key, value, lengths, streaming, scale)
    held = streaming.held
    equal = len(set(lengths)) == 1
    newest = lengths[0] - 1 if equal else torch.tensor(lengths, device=key.device)[:, None] - 1
    seen = (held.position >= 0) & ((held.position < streaming.sink) | (held.position > newest - streaming.local))
    keys, values = (pages.dense()[:, :, 0] for pages in held[:2])
    if streaming.format.name is not None:
        own = (held.position == newest)[:, None, :, None]
        keys, values = torch.where(own, key, keys.to(key.dtype)), torch.where(own, value, values.to(value.dtype))
    gqa = query.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(query, keys, values, attn_mask=seen[:, None, None], scale=scale, enable_gqa=gqa)


def _ring(query, key, value, lengths, streaming: StreamingKV, scale) -> Tensor:
    """The same from the pages of a ring as they are stored, without copying or dequantising them."""
    keys, values = (
        pages.map(lambda t: t[:, :, 0].unflatten(2, (-1, streaming.page_size))) for pages in streaming.held[:2]
    )
    slots = streaming.held.position.unflatten(1, (-1, streaming.page_size))
    everything = torch.arange(slots.shape[1], device=key.device).expand(*key.shape[:2], -1)
    out = paged_attention(
        query[:, :, 0], keys, values, everything, length=torch.tensor(lengths, device=key.device), scale=scale,
        current=(key[:, :, 0], value[:, :, 0]), slots=slots, window=(streaming.sink, streaming.local),
    )  # fmt: skip
    return out[:, :, None]


# -- from plain keys ---------------------------------------------------------------------------------------------------


def ranked_slots(call: AttentionCall) -> tuple[Tensor | None, Tensor]:
    """Slots of the keys the single query of each row sees, in order `[B, Nk]` (None: as they are), and their number."""
    if call.tokens.is_plain:
        return None, torch.full((call.query.shape[0],), call.k_len, device=call.query.device)
    visible = call.tokens.visible(call.causal, call.query.device)[:, 0, 0]
    return (~visible).to(torch.int8).sort(dim=-1, stable=True).indices, visible.sum(-1)


def read_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor,
    numbers: Tensor,
    slots: Tensor | None,
    length: Tensor,
    scale: float,
) -> Tensor:
    """Attention of one query a row over listed tokens `[B, Hq, 1, Dv]`; differentiable.

    Args:
        query: `[B, Hq, 1, D]`; key, value: all KV heads.
        heads: KV head of every query head, int64 `[Hq]`.
        numbers: int64 `[B, 1 | Hq, T]`: tokens, by number; those outside 0 .. length - 1 are left out.
        slots: from `ranked_slots`; length: int64 `[B]`.
    """
    seen = (numbers >= 0) & (numbers < length[:, None, None])
    # What is left out may hold anything, so a visible token takes its place.
    safe = torch.where(seen, numbers, (length[:, None, None] - 1).clamp(min=0))
    if slots is not None:
        safe = slots[:, None].expand(-1, safe.shape[1], -1).gather(2, safe)
    rows = torch.arange(query.shape[0], device=query.device)[:, None, None]
    keys, values = (x[rows, heads[:, None], safe] for x in (key, value))
    out = scaled_dot_product_attention(query, keys, values, attn_mask=seen[:, :, None], scale=scale)
    return torch.where((length > 0)[:, None, None, None], out, 0.0)


def window_numbers(length: Tensor, sink: int, local: int, slots: int) -> Tensor:
    """Tokens that a streaming head reads, int64 `[B, 1, min(slots, sink + local)]`; length: int64 `[B]`."""
    listed = torch.arange(min(slots, sink + local), device=length.device)
    recent = (length[:, None] - local).clamp(min=sink)
    return torch.where(listed < sink, listed, listed - sink + recent)[:, None]


def plain_statistics(key: Tensor, slots: Tensor | None, length: Tensor, config: Any, pages: int) -> Tensor:
    """Statistics of the cached tokens of every row, the newest left out, `[B, H, pages, G, 2, D]`."""
    if slots is not None:
        key = key.gather(2, slots[:, None, :, None].expand_as(key))
    key = key[:, :, : pages * config.page_size].detach()
    old = (torch.arange(key.shape[2], device=key.device) < length[:, None] - 1)[:, None, :, None]
    sizes = {"page_size": config.page_size, "logical_page_size": config.logical_page_size}
    high, _ = page_statistics(key.masked_fill(~old, float("-inf")), **sizes)
    low, _ = page_statistics(key.masked_fill(~old, float("inf")), **sizes)
    stats = torch.stack([high[..., 0, :], low[..., 1, :]], -2)
    if config.stats_dtype is not None:
        stats = stats.to(getattr(torch, config.stats_dtype))
    return stats


Name = tuple[int, int]


class Remembered:
    """Selections of plain caches, found again by the keys they belong to.

    A plain cache has no place for them. A sequence is known by its length and a checksum over bits of all its keys, so
    beams, interleaved requests and several caches never take each other's.
    """

    LIMIT = 1024

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Any, OrderedDict[tuple[int, int], tuple[Tensor, int]]] = WeakKeyDictionary()

    def find(self, module: Any, names: list[tuple[int, int]]) -> Selection | None:
        """The selection of every row, by (length, checksum) of its cached tokens."""
        known = self._of.get(module) if module is not None else None
        found = [None if known is None else known.get(name) for name in names]
        some = next((entry for entry in found if entry is not None), None)
        if some is None:
            return None
        pages = torch.stack([torch.full_like(some[0], -1) if entry is None else entry[0] for entry in found])
        return Selection(pages, [0 if e is None else e[1] for e in found], [e is not None for e in found])

    def keep(self, module: Any, names: list[tuple[int, int]], selection: Selection) -> None:
        """Remember a selection under the tokens there are now."""
        if module is None:
            return
        known = self._of.setdefault(module, OrderedDict())
        for row, name in enumerate(names):
            if selection.valid[row]:
                known[name] = (selection.pages[row], selection.last[row])
                known.move_to_end(name)
        while len(known) > self.LIMIT:
            known.popitem(last=False)


REMEMBERED = Remembered()


def checksums(key: Tensor, slots: Tensor | None, lengths: list[int]) -> tuple[list[Name], list[Name]]:
    """(length, checksum) of every row without its newest token, and with it; exact whatever the order of summing."""
    bits = key[:, 0, :, :8].detach()
    bits = bits.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]).long()
    if slots is not None:
        bits = bits.gather(1, slots[:, :, None].expand_as(bits))
    place = torch.arange(bits.shape[1] * bits.shape[2], device=key.device).view(bits.shape[1:])
    mixed = (bits + place) * (place * 2 + 0x9E3779B1)
    # Multiplying and shifting spreads low bits upwards; int64 wraps around.
    sums = ((mixed ^ (mixed >> 29)) * 0x2545F4914F6CDD1D).sum(-1).cumsum(-1)
    ends = torch.tensor(lengths, device=key.device)[:, None]
    with_it = sums.gather(1, (ends - 1).clamp(min=0))[:, 0].tolist()
    before = sums.gather(1, (ends - 2).clamp(min=0))[:, 0].tolist()
    return [(n - 1, s) for n, s in zip(lengths, before, strict=True)], list(zip(lengths, with_it, strict=True))


def from_keys(
    call: AttentionCall, config: Any, retrieval: Tensor | None, streaming: Tensor | None
) -> tuple[Tensor, dict[str, Any]]:
    """Attention of one new token a row over all keys of a plain cache: the same result as `from_store`, no faster.

    `retrieval` and `streaming` list KV heads, as `head_lists` gives them.
    """
    query, key, value = call.query, call.key, call.value
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    slots, length = ranked_slots(call)
    compiling = torch.compiler.is_compiling()
    lengths = None if compiling else length.tolist()
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    done: dict[str, Any] = {"lengths": lengths, "selector_runs": 0, "pages_read": 0}
    if streaming is None or streaming.numel():
        heads = torch.arange(kv_heads, device=key.device) if streaming is None else streaming
        numbers = window_numbers(length, config.dec_sink, config.dec_local, key.shape[2])
        wide = query_heads(heads, group)
        owners = heads.repeat_interleave(group)
        part = read_tokens(query[:, wide], key, value, owners, numbers, slots, length, call.scale)
        out = out.index_copy(1, wide, part)
    if retrieval is None or retrieval.numel():
        heads = torch.arange(kv_heads, device=key.device) if retrieval is None else retrieval
        wide = query_heads(heads, group)
        queries, keys = query[:, wide], pick(key, retrieval)

        def statistics(pages: int) -> Tensor:
            return plain_statistics(keys, slots, length, config, pages)

        if compiling:
            lists = _traced_lists(queries[:, :, 0], length, config, statistics, key.shape[2])
        else:
            lists = _remembered_lists(call, queries[:, :, 0], key, slots, lengths, config, statistics, done)
        size = config.page_size
        numbers = (lists[..., None] * size + torch.arange(size, device=lists.device)).flatten(2)
        numbers = torch.where((lists >= 0).repeat_interleave(size, 2), numbers, -1)
        if numbers.shape[1] not in (1, len(wide)):
            numbers = numbers.repeat_interleave(group, 1)
        part = read_tokens(queries, key, value, heads.repeat_interleave(group), numbers, slots, length, call.scale)
        out = out.index_copy(1, wide, part)
    return out, done


def _remembered_lists(call, query, key, slots, lengths, config, statistics, done) -> Tensor:
    """Page lists `[B, 1 | heads, W]`, with the selection of an earlier step where it may be used again."""
    long = [length > config.dense_up_to for length in lengths]
    if any(long):
        before, now = checksums(key, slots, lengths)
        previous = REMEMBERED.find(call.layer.module, before)
        selection, long, ran = choose(query.detach(), lengths, config, previous, statistics)
        assert selection is not None  # a row is long enough
        REMEMBERED.keep(call.layer.module, now, selection)
        done["selector_runs"] = int(ran)
    else:
        batch = len(lengths)
        nothing = query.new_empty(batch, 1, 0, dtype=torch.int64)
        selection = Selection(nothing, [0] * batch, [False] * batch)
    done["long"] = long
    lists = page_lists(selection, long, lengths, config.page_size)
    done["pages_read"] = (lists >= 0).sum() * (1 if any(long) else key.shape[1])
    return lists


def _traced_lists(query, length, config, statistics, slots: int) -> Tensor:
    """The same inside a compiled graph: lengths are tensors and nothing is remembered, so it selects in every step."""
    size = config.page_size
    newest = ((length - 1).clamp(min=0) // size)[:, None, None]
    everything = -(-min(slots, config.dense_up_to) // size)
    all_pages = torch.arange(everything, device=length.device).expand(len(length), query.shape[1], -1)
    if slots <= config.dense_up_to:
        return all_pages
    scores = _scores(query.detach(), statistics(-(-slots // size)), config)
    all_pages = all_pages[:, : scores.shape[1]]
    last = (length - 2).clamp(min=0) // size
    pages = select_pages(scores, last, count=config.selected_pages)
    tail = (last[:, None, None] + torch.arange(2, device=length.device)).expand(-1, pages.shape[1], -1)
    chosen = torch.cat([pages, torch.where(tail <= newest, tail, -1)], -1)
    width = max(chosen.shape[2], everything)
    chosen, all_pages = (torch.nn.functional.pad(x, (0, width - x.shape[2]), value=-1) for x in (chosen, all_pages))
    return torch.where((length > config.dense_up_to)[:, None, None], chosen, all_pages)
