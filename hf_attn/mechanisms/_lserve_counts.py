"""What LServe reports about a call: (query, key) pairs read and visible, pages, runs of the selector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn.caches.lserve import LServeStore
from hf_attn.call import AttentionCall


def retrieving(kinds: tuple[bool, ...] | None, kv_heads: int) -> int:
    return kv_heads if kinds is None else sum(kinds)


def everything_read(threshold: int) -> str:
    """Why a step ran dense."""
    return f"at most {threshold} tokens: everything is read"


def record_decode(
    record: Any, heads: tuple[int, int], config: Any, kinds, done: dict[str, Any], pages_held: int
) -> None:
    """What a step of one token a row read; `heads` are those of keys and of queries."""
    kv_heads, group = heads[0], heads[1] // heads[0]
    reading = retrieving(kinds, kv_heads)
    computed = visible = 0
    long = done.get("long") or [False] * len(done["lengths"])
    for length, selects in zip(done["lengths"], long, strict=True):
        window = min(length, config.dec_sink + config.dec_local)
        computed += (kv_heads - reading) * group * window
        if not selects:
            computed += reading * group * length
        visible += kv_heads * group * length
    pages = done.get("pages_read", 0)
    if any(long):
        lists = reading * group if config.group_select == "per_query_head" else reading
        read = pages * (reading * group) / max(lists, 1) * config.page_size
        for length, selects in zip(done["lengths"], long, strict=True):
            # Pages are full except the newest one, and rows that read everything are counted above.
            unread = -length % config.page_size
            read = read - reading * group * (unread if selects else length + unread)
        computed = computed + read
    reason = None
    if not any(long) and reading == kv_heads:
        reason = everything_read(config.dense_up_to)
    counts = {"decode_steps": 1, "selector_runs": done["selector_runs"], "pages_read": pages, "pages_held": pages_held}
    path = "sparse" if reason is None else "dense"
    record(path=path, reason=reason, computed=computed, visible=visible, counts=counts)


def record_prompt(call: AttentionCall, config: Any, kinds) -> None:
    if not call.layer.recording:
        return
    kv_heads = call.key.shape[1]
    group = call.query.shape[1] // kv_heads
    reading = retrieving(kinds, kv_heads)
    if reading == kv_heads:
        call.layer.record(path="dense", reason="retrieval heads read the whole prompt")
        return
    ranks = call.tokens.query_ranks(call.query.device)
    rows = call.query.shape[0] // ranks.shape[0] * group
    windowed, visible = count_pairs(ranks, config.ctx_sink, config.ctx_local)
    computed = windowed * (kv_heads - reading) + visible * reading
    call.layer.record(path="sparse", computed=computed * rows, visible=visible * kv_heads * rows)


def record_behind(call: AttentionCall, config: Any, store: LServeStore, counts: list[int]) -> None:
    if not call.layer.recording:
        return
    kv_heads = call.key.shape[1]
    group = call.query.shape[1] // kv_heads
    reading = kv_heads if store.options.retrieval is None else sum(store.options.retrieval)
    if reading == kv_heads:
        call.layer.record(path="dense", reason="retrieval heads read the whole prompt")
        return
    ranks = torch.cat([torch.arange(n, n + c) for n, c in zip(store.lengths, counts, strict=True)])
    windowed, visible = count_pairs(ranks, config.ctx_sink, config.ctx_local)
    computed = windowed * (kv_heads - reading) + visible * reading
    call.layer.record(path="sparse", computed=computed * group, visible=visible * kv_heads * group)


def count_pairs(ranks: Tensor, sink: int, local: int) -> tuple[Tensor, Tensor]:
    """(query, key) pairs a streaming head reads, and causally visible ones, for queries of these ranks."""
    ranks = ranks[ranks >= 0]
    recent = (ranks + 1).clamp(max=local)
    sinks = (ranks + 1 - recent).clamp(max=sink)
    return (recent + sinks).sum(dtype=torch.float64), (ranks + 1).sum(dtype=torch.float64)
