"""The common decoding step, one new token a row in rows of equal length on a CPU: few calls, and chosen pages kept.

Between two selections every step reads the same pages and the tokens since. They are copied side by side once, and each
step multiplies with the copy as it is. `from_store` gives the same result for every other step.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.caches.lserve import LServeStore, Selection
from hf_attn.caches.store import outliving
from hf_attn.mechanisms._lserve_counts import everything_read
from hf_attn.mechanisms._lserve_decode import choose
from hf_attn.ops import choose_path
from hf_attn.ops.hfattn_sparse.counters import count
from hf_attn.ops.hfattn_sparse.paged.kept import KeptPages


def dense_step(
    query: Tensor, key: Tensor, value: Tensor, scale: float, config: Any, store: LServeStore, record: Any
) -> Tensor | None:
    """A step of a layer whose heads all retrieve, so few tokens in that they read everything: the least there is to do.

    `[B, Hq, 1, Dv]`, counted; None, with nothing changed, for every other step.
    """
    if not store.all_retrieve or query.device.type != "cpu" or store.paged.format.name is not None:
        return None
    number, threshold = store.next_number(), config.dense_up_to
    if number is None or number >= threshold:
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    store.paged.write_one(number, key, value, None)
    keys, values = store.paged.flat
    length = number + 1
    out = _folded(query, keys.narrow(2, 0, length), values.narrow(2, 0, length), scale)
    store.commit_one(None, key, None)
    pages = -(-length // config.page_size) * key.shape[0] * key.shape[1]
    store.pages_read = store.pages_read + pages
    pairs = key.shape[0] * query.shape[1] * length
    counts = {"decode_steps": 1, "selector_runs": 0, "pages_read": pages, "pages_held": pages}
    record(path="dense", reason=everything_read(threshold), computed=pairs, visible=pairs, counts=counts)
    return out


def short_step(
    query: Tensor, key: Tensor, value: Tensor, scale: float, config: Any, store: LServeStore
) -> tuple[Tensor, dict[str, Any]] | None:
    """`from_store` for new tokens that are all real; None, with nothing changed, where only that one will do."""
    number = store.next_number()
    if number is None or not config.keep_selected or query.device.type != "cpu":
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if choose_path("paged_attention", query, query.shape[3], value.shape[3]) != "torch":
        return None
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _short_step(query, key, value, scale, number, config, store)
    return _short_step(query, key, value, scale, number, config, store)


def _short_step(
    query: Tensor, key: Tensor, value: Tensor, scale: float, number: int, config: Any, store: LServeStore
) -> tuple[Tensor, dict[str, Any]] | None:
    plan = store.plan(key.shape[1], query.shape[1] // key.shape[1], key.device)
    done: dict[str, Any] = {"lengths": [number + 1] * key.shape[0], "selector_runs": 0}
    part = tail = keys = window = selection = None
    if plan.reads:
        keys, values = plan.retrieval.of(key), plan.retrieval.of(value)
        store.paged.write_one(number, keys, values, store.scales)
        found = _retrieve(plan.retrieving.of(query), keys, values, number, config, store, scale, done)
        if found is None:
            return None
        part, selection = found
    if plan.streams:
        window = plan.streaming.of(key), plan.streaming.of(value)
    store.pages_read = store.pages_read + done.get("pages_read", 0)
    store.commit_one(window, keys, selection)
    if window is not None:
        tail = _stream(plan.windowed.of(query), *window, number, store, scale)
    return plan.joined(part, tail), done


def _retrieve(
    query: Tensor, key: Tensor, value: Tensor, number: int, config: Any, store: LServeStore, scale: float, done: dict
) -> tuple[Tensor, Selection | None] | None:
    """Retrieval heads `[B, Hq, 1, Dv]`, and the selection they used; None where the copies cannot serve."""
    batch, paged, size = query.shape[0], store.paged, config.page_size
    selection, long, ran = choose(
        query[:, :, 0], done["lengths"], config, store.selection, lambda pages: paged.stats[:, :, :pages]
    )
    done["long"], done["selector_runs"] = long, int(ran)
    if selection is None:
        if paged.format.name is not None:
            return None
        done["pages_read"] = -(-(number + 1) // size) * batch * key.shape[1]
        keys, values = (x.narrow(2, 0, number + 1) for x in paged.flat)
        return _folded(query, keys, values, scale), None
    kept = _kept(selection, query, number, config, store)
    if kept.exact is not None and kept.exact != number:
        kept.put(kept.exact, *paged.token(kept.exact))
    kept.put(number, key, value)
    kept.exact = None if paged.format.name is None else number
    out = kept.attend(query, number, scale)
    if out is None:
        return None
    count("paged_attention", "torch: kept")
    chosen = selection.pages
    done["pages_read"] = batch * chosen.shape[1] * (chosen.shape[2] + number // size - selection.last[0] + 1)
    return out, selection


def _kept(selection: Selection, query: Tensor, number: int, config: Any, store: LServeStore) -> KeptPages:
    """The copy of a selection's pages that has a place for token `number`, and all tokens before it."""
    kept = store.kept
    if kept is not None and kept.pages is selection.pages and kept.next >= number < kept.end:
        return kept
    return _moved(selection, query, number, config, store)


@outliving
def _moved(selection: Selection, query: Tensor, number: int, config: Any, store: LServeStore) -> KeptPages:
    if store.kept is None:
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        store.kept = KeptPages(query.shape[1], dtype)
    first = selection.last[0]
    # Room for the steps that use this selection, the current one included.
    room = (number + config.reuse_interval) // config.page_size - first + 1
    store.kept.choose(store.paged.key, store.paged.value, selection.pages, first, room, number)
    return store.kept


def _folded(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """One query a row `[B, Hq, 1, D]`: the query heads of a KV head as rows, so that keys are not repeated for them."""
    folded = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
    if mask is not None:
        mask = mask.expand(-1, -1, folded.shape[2], -1)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return out.view(*query.shape[:3], value.shape[3])


def _stream(query: Tensor, key: Tensor, value: Tensor, number: int, store: LServeStore, scale: float) -> Tensor:
    """Sinks and the decode window from the ring, which holds the new token: it counts as it was before that."""
    streaming = store.streaming
    if streaming.format.name is None:
        keys, values = streaming.flat
    else:
        slot = streaming.slot(number)
        keys, values = (pages.dense()[:, :, 0].to(query.dtype) for pages in streaming.held[:2])
        keys.select(2, slot).copy_(key[:, :, 0])
        values.select(2, slot).copy_(value[:, :, 0])
    mask = ring_mask(number, store.options.page_size, streaming.sink, streaming.local, query.dtype, query.device)
    return _folded(query, keys, values, scale, mask)


@lru_cache(maxsize=8)
@outliving
def ring_mask(number: int, size: int, sink: int, local: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask `[1, 1, 1, slots]` of a ring whose newest token is `number`, the same for all layers of a step."""
    sinks, ring = sink // size, local // size + 1
    slot = torch.arange((sinks + ring) * size, device=device)
    page, inside = slot // size - sinks, slot % size
    newest = number // size - sinks
    token = (newest - (newest - page) % ring + sinks) * size + inside
    token = torch.where(page < 0, slot, token)
    # What stands behind the newest token in its page is older than any window.
    seen = (token <= number) & (token >= 0) & torch.where(page < 0, True, (token >= sink) & (token > number - local))
    return torch.zeros(len(slot), dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))[None, None, None]
