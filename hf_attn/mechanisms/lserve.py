"""LServe (arXiv 2502.14866): streaming heads, and retrieval heads that read a budget of KV pages while decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.caches.lserve import LServeStore, head_lists, pick, put, query_heads
from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.mechanism import Capabilities, Mechanism
from hf_attn.mechanisms._lserve_config import LServeConfig, default_min_seq_len
from hf_attn.mechanisms._lserve_counts import count_pairs, record_behind, record_decode, record_prompt, retrieving
from hf_attn.mechanisms._lserve_decode import from_keys, from_store
from hf_attn.mechanisms._lserve_heads import DuoHeads, classify_heads, load_duo_heads
from hf_attn.mechanisms._lserve_step import dense_step, short_step
from hf_attn.ops import dense_attention, sink_window_attention

__all__ = ["DuoHeads", "LServeConfig", "MECHANISM", "classify_heads", "default_min_seq_len", "load_duo_heads"]

# Elements of one mask of streaming heads behind a cache.
MAX_MASK = 1 << 22


def attend(call: AttentionCall, config: LServeConfig) -> Tensor:
    """LServe's attention `[B, Hq, Nq, Dv]`; with a store in `call.layer.cache`, key and value are the new tokens."""
    _refuse(call, config)
    store = call.layer.cache
    if store is not None:
        real = _real_tokens(call, store)
        if call.q_len == 1:
            step_of = (call.query, call.key, call.value, call.scale, config, store)
            found = short_step(*step_of) if real is None else None
            out, done = from_store(call, config, store, real) if found is None else found
            if call.layer.recording:
                heads = call.key.shape[1], call.query.shape[1]
                record_decode(call.layer.record, heads, config, store.options.retrieval, done, store.pages_held)
            return out
        if store.slots > 0:
            return _behind_store(call, config, store, real)
        out = _prompt(call, config, store.options.retrieval)
        store.append(call.key, call.value, real)
        return out
    kinds = _kinds(call, config)
    if call.q_len == 1:
        out, done = from_keys(call, config, *head_lists(kinds, call.key.shape[1], call.key.device))
        if done["lengths"] is not None:
            held = sum(-(-n // config.page_size) for n in done["lengths"]) * retrieving(kinds, call.key.shape[1])
            if call.layer.recording:
                record_decode(call.layer.record, (call.key.shape[1], call.query.shape[1]), config, kinds, done, held)
        return out
    return _prompt(call, config, kinds)


def step(
    query: Tensor, key: Tensor, value: Tensor, scale: float, store: LServeStore, config: LServeConfig, record: Any
) -> Tensor | None:
    """`attend` of one new token a row, all real; None where only that one will do."""
    out = dense_step(query, key, value, scale, config, store, record)
    if out is not None:
        return out
    found = short_step(query, key, value, scale, config, store)
    if found is None:
        return None
    out, done = found
    record_decode(record, (key.shape[1], query.shape[1]), config, store.options.retrieval, done, store.pages_held)
    return out


# -- several tokens ----------------------------------------------------------------------------------------------------


def _prompt(call: AttentionCall, config: LServeConfig, kinds: tuple[bool, ...] | None) -> Tensor:
    """Several new tokens behind all keys there are: retrieval heads dense, streaming heads sinks and window."""
    retrieval, streaming = head_lists(kinds, call.key.shape[1], call.key.device)
    record_prompt(call, config, kinds)
    if retrieval is None:
        return dense_attention(call)
    if streaming is None:
        return _windowed(call, config)
    group = call.query.shape[1] // call.key.shape[1]
    parts, wide = [], []
    for heads, run in ((retrieval, dense_attention), (streaming, lambda part: _windowed(part, config))):
        wide.append(query_heads(heads, group))
        query, key, value = pick(call.query, wide[-1]), pick(call.key, heads), pick(call.value, heads)
        parts.append(run(replace(call, query=query, key=key, value=value)))
    order = torch.cat(wide).argsort()
    return torch.cat(parts, 1).index_select(1, order)


def _windowed(call: AttentionCall, config: LServeConfig) -> Tensor:
    return sink_window_attention(
        call.query,
        call.key,
        call.value,
        sinks=config.ctx_sink,
        window=config.ctx_local,
        scale=call.scale,
        tokens=call.tokens,
    )


def _behind_store(call: AttentionCall, config: LServeConfig, store: LServeStore, real: Tensor | None) -> Tensor:
    """Several new tokens behind a store: retrieval heads dense, streaming heads see what is held of their window."""
    query, key, value = call.query, call.key, call.value
    group = query.shape[1] // key.shape[1]
    retrieval, streaming = store.heads(key.shape[1], key.device)
    position, counts = store.positions(real, key.shape[0], key.shape[2], key.device)
    store.write(key, value, real)
    lengths = [n + c for n, c in zip(store.lengths, counts, strict=True)]
    total = max(lengths)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    record_behind(call, config, store, counts)
    if retrieval is None or retrieval.numel():
        wide = None if retrieval is None else query_heads(retrieval, group)
        tensors = [pick(query, wide), *_all_tokens(store, [pick(x, retrieval) for x in (key, value)], position, total)]
        numbers = torch.arange(total, device=key.device).expand(key.shape[0], -1)
        held = numbers < torch.tensor(lengths, device=key.device)[:, None]
        segments = torch.cat([torch.where(position >= 0, 0, -1), torch.where(held, 0, -1)], 1)
        index = torch.stack([segments, torch.cat([position, numbers], 1)], 1).to(torch.int32)
        equal = real is None and len(set(store.lengths)) == 1
        tokens = TokenLayout(key.shape[0], call.q_len, total, None if equal else index)
        part = replace(call, query=tensors[0], key=tensors[1], value=tensors[2], tokens=tokens)
        put(out, wide, dense_attention(part))
    if streaming is None or streaming.numel():
        wide = None if streaming is None else query_heads(streaming, group)
        queries, keys, values = pick(query, wide), pick(key, streaming), pick(value, streaming)
        put(out, wide, _window_of_held(queries, keys, values, position, config, store, call.scale))
    if real is not None:
        out = out.masked_fill(~real[:, None, :, None], 0.0)
    store.commit(key, value, real, single=False)
    return out


def _all_tokens(store: LServeStore, new: list[Tensor], position: Tensor, total: int) -> list[Tensor]:
    """Keys and values of the retrieval heads by number, the new ones as they are, `[B, H, total, D]`."""
    found = []
    for stored, tokens in zip(store.paged.tokens(total), new, strict=True):
        if store.paged.format.name is not None:
            stored = torch.cat([stored.to(tokens.dtype), tokens.new_zeros(*tokens.shape[:2], 1, tokens.shape[3])], 2)
            at = torch.where(position >= 0, position, total)[:, None, :, None].expand_as(tokens)
            stored = stored.scatter(2, at, tokens)[:, :, :total]
        found.append(stored)
    return found


def _window_of_held(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    config: LServeConfig,
    store: LServeStore,
    scale: float,
) -> Tensor:
    """Streaming heads of several tokens behind what is held: ctx_sink and ctx_local tokens as far as they are there."""
    keys, values, numbers = key, value, position
    if not store.streaming.empty:
        held = store.streaming.held
        keys, values = (
            torch.cat([pages.dense()[:, :, 0].to(new.dtype), new], 2)
            for pages, new in zip(held[:2], (key, value), strict=True)
        )
        numbers = torch.cat([held.position, position], 1)
    gqa = query.shape[1] != key.shape[1]
    rows = max(MAX_MASK // max(numbers.numel(), 1), 16)
    parts = []
    for start in range(0, query.shape[2], rows):
        at = position[:, start : start + rows, None]
        other = numbers[:, None]
        seen = (other >= 0) & (other <= at) & ((other < config.ctx_sink) | (other > at - config.ctx_local))
        parts.append(
            scaled_dot_product_attention(
                query[:, :, start : start + rows], keys, values, attn_mask=seen[:, None], scale=scale, enable_gqa=gqa
            )
        )
    return torch.cat(parts, 2)


# -- what a call is ----------------------------------------------------------------------------------------------------


def _refuse(call: AttentionCall, config: LServeConfig) -> None:
    if not call.causal:
        raise ValueError(
            "lserve needs causal attention, but this module is not causal; leave the layer dense with "
            "layers={index: None} or use another mechanism"
        )
    cached = call.q_len == 1 and call.tokens.k_len > 1 or (call.layer.cache is not None and call.layer.cache.slots > 0)
    if not cached or not call.layer.training or not torch.is_grad_enabled():
        return
    if any(x.requires_grad for x in (call.query, call.key, call.value)):
        raise ValueError(
            "lserve has no gradients behind a cache (page selection and quantised pages are for inference); use "
            "model.eval(), torch.no_grad(), or train without a cache (use_cache=False)"
        )


def _kinds(call: AttentionCall, config: LServeConfig) -> tuple[bool, ...] | None:
    kinds = config.retrieval(call.layer.index)
    kv_heads = call.key.shape[1]
    if kinds == ():
        return (False,) * kv_heads
    if kinds is not None and len(kinds) != kv_heads:
        raise ValueError(f"heads and gates name {len(kinds)} KV heads, but this layer has {kv_heads}")
    return kinds


def _real_tokens(call: AttentionCall, store: LServeStore) -> Tensor | None:
    """Which of the new tokens are real, bool `[B, n]`; None for all. Raises ValueError for rows no cache can hold."""
    if call.tokens.index is None:
        return None
    segments = call.tokens.index[:, 0]
    new, old = segments[:, : call.q_len], segments[:, call.q_len : call.tokens.k_len]
    if bool((segments > 0).any()):
        raise ValueError("lserve's cache takes one sequence a row, got packed rows; pass use_cache=False")
    counts = (old[:, : store.slots] >= 0).sum(-1).tolist()
    if store.lengths and counts != store.lengths:
        raise ValueError(
            f"attention_mask has {counts} real tokens a row before this call, but the cache holds {store.lengths}; the "
            "mask of earlier tokens must not change"
        )
    real = new >= 0
    return None if bool(real.all()) else real


# -- for analysis ------------------------------------------------------------------------------------------------------


def attended(call: AttentionCall, config: LServeConfig, rows: Tensor) -> Tensor:
    """Keys that rows of a prompt read, bool `[B | 1, Hq, R, Nk]`; for rows without padding."""
    own = (rows + call.k_len - call.q_len)[:, None]
    key = torch.arange(call.k_len, device=rows.device)
    causal = key <= own
    near = causal & ((key < config.ctx_sink) | (key > own - config.ctx_local))
    kv_heads = call.key.shape[1]
    kinds = _kinds(call, config) or (True,) * kv_heads
    masks = torch.stack([causal if kind else near for kind in kinds])
    return masks.repeat_interleave(call.query.shape[1] // kv_heads, 0)[None]


def describe(config: LServeConfig, q_len: int, k_len: int) -> dict[str, Any]:
    """Density of a prefill of these lengths (first layer) and of the next token behind it."""
    kinds = config.retrieval(0)
    share = 1.0 if kinds is None else 0.0 if kinds == () else sum(kinds) / len(kinds)
    windowed, visible = count_pairs(torch.arange(k_len - q_len, k_len), config.ctx_sink, config.ctx_local)
    window = min(k_len + 1, config.dec_sink + config.dec_local)
    pages = min(k_len + 1, config.token_budget) if k_len + 1 > config.dense_up_to else k_len + 1
    return {
        "density": share + (1 - share) * float(windowed) / max(float(visible), 1.0),
        "decode density": (share * pages + (1 - share) * window) / (k_len + 1),
        "dense up to": config.dense_up_to,
        "streaming heads": 1 - share,
        "cache": config.kv_quant or "unquantised",
    }


def make_store(config: LServeConfig, layer: int | None, kv_heads: int | None) -> LServeStore:
    """The storage of one layer."""
    return LServeStore(config.store_options(layer, kv_heads))


MECHANISM = Mechanism(
    name="lserve",
    summary="streaming heads, and KV pages chosen per query while decoding; training-free, with a paged cache",
    source="LServe, arXiv 2502.14866; DuoAttention, arXiv 2410.10819; Quest, arXiv 2406.10774",
    config=LServeConfig,
    capabilities=Capabilities(bidirectional=False, triton=True),
    attend=attend,
    attended=attended,
    describe=describe,
    store=make_store,
    step=step,
)
