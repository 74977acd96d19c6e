"""LServe (arXiv 2502.14866): streaming heads, and retrieval heads that read a budget of KV pages while decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.caches.lserve import LServeStore, StoreOptions, head_lists, pick, put
from hf_attn.caches.quantization import FORMATS
from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.checks import require_int, require_one_of
from hf_attn.mechanism import Capabilities, Mechanism, MechanismConfig
from hf_attn.mechanisms._lserve_decode import from_keys, from_store, query_heads
from hf_attn.mechanisms._lserve_heads import DuoHeads, classify_heads, load_duo_heads
from hf_attn.ops import dense_attention, sink_window_attention
from hf_attn.ops.backend import may_go_dense

__all__ = ["DuoHeads", "LServeConfig", "MECHANISM", "classify_heads", "default_min_seq_len", "load_duo_heads"]

# Elements of one mask of streaming heads behind a cache.
MAX_MASK = 1 << 22


@dataclass
class LServeConfig(MechanismConfig):
    """Streaming KV heads see sinks and a window; retrieval heads are dense in the prompt and, for every new token, read
    the pages whose keys can match the query best.

    Args:
        page_size: tokens of a KV page (physical page), a multiple of `logical_page_size`.
        logical_page_size: tokens that share a minimum and a maximum of their keys, >= 1.
        token_budget: tokens a retrieval head reads for a new token, a multiple of `page_size`, at least three pages.
        reuse_interval: steps for which a selection of pages is used, >= 1.
        static_sparsity: share of streaming heads over the whole model, in [0, 1]; decides with `gates` which they are.
            Without gates and heads every head retrieves, except with 1.0 (every head streams).
        ctx_sink, ctx_local: first and recent tokens of streaming heads in prompts, >= 0 and >= 1.
        dec_sink, dec_local: the same for single new tokens, multiples of `page_size`.
        kv_quant: format of the cache: None, "int8", "int4" (a scale and zero point a token and head) or
            "int8-per-tensor" (one scale for the keys and one for the values of a layer).
        kv_scales: `[layers][2]`, scales of keys and values for "int8-per-tensor"; None takes them from the first prompt.
        zero_dtype: "float16" or "float32", of zero points.
        stats_dtype: "float16", "bfloat16" or "float32", of the key statistics; None takes the keys' dtype.
        group_select: "per_query_head", or "group_max": one list of pages for all query heads of a KV head, by their
            best score. It reads fewer pages and is three to four times faster on a CPU, but is not the paper's rule.
        heads: `[layers][KV heads]` of 0 and 1, 1 = retrieval head; one row serves all layers. Wins over `gates`.
        gates: `[layers][KV heads]` of DuoAttention's gate values in [0, 1].
        min_seq_len: tokens up to which retrieval heads read everything, >= 0 (never less than `token_budget`). `None`
            takes the measured default of `default_min_seq_len`; it does not apply when HF_ATTN_BACKEND forces a path.
    """

    page_size: int = 64
    logical_page_size: int = 16
    token_budget: int = 4096
    reuse_interval: int = 4
    static_sparsity: float = 0.5
    ctx_sink: int = 128
    ctx_local: int = 8192
    dec_sink: int = 128
    dec_local: int = 256
    kv_quant: str | None = None
    kv_scales: list[list[float]] | None = None
    zero_dtype: str = "float16"
    stats_dtype: str | None = None
    group_select: str = "per_query_head"
    heads: list[list[int]] | None = None
    gates: list[list[float]] | None = None
    min_seq_len: int | None = None

    aliases = {"min_tokens": "min_seq_len", "physical_page": "page_size", "logical_page": "logical_page_size"}

    def __post_init__(self) -> None:
        for name, minimum in (("page_size", 1), ("logical_page_size", 1), ("reuse_interval", 1), ("ctx_sink", 0)):
            require_int(name, getattr(self, name), minimum)
        require_int("ctx_local", self.ctx_local, 1)
        require_int("token_budget", self.token_budget, 1)
        require_int("dec_sink", self.dec_sink, 0)
        require_int("dec_local", self.dec_local, 1)
        if self.page_size % self.logical_page_size:
            raise ValueError(
                f"page_size must be a multiple of logical_page_size, got {self.page_size} and {self.logical_page_size}"
            )
        for name in ("token_budget", "dec_sink", "dec_local"):
            if getattr(self, name) % self.page_size:
                raise ValueError(f"{name} must be a multiple of page_size={self.page_size}, got {getattr(self, name)}")
        if self.token_budget < 3 * self.page_size:
            raise ValueError(
                f"token_budget must be at least three pages ({3 * self.page_size} tokens), got {self.token_budget}"
            )
        number = isinstance(self.static_sparsity, int | float) and not isinstance(self.static_sparsity, bool)
        if not number or not 0 <= self.static_sparsity <= 1:
            raise ValueError(f"static_sparsity must lie in [0, 1], got {self.static_sparsity!r}")
        require_one_of("kv_quant", self.kv_quant, (None, *FORMATS))
        require_one_of("zero_dtype", self.zero_dtype, ("float16", "float32"))
        require_one_of("stats_dtype", self.stats_dtype, (None, "float16", "bfloat16", "float32"))
        require_one_of("group_select", self.group_select, ("per_query_head", "group_max"))
        if self.min_seq_len is not None:
            require_int("min_seq_len", self.min_seq_len, 0)
        self.heads = _table("heads", self.heads, lambda x: x in (0, 1), "0 or 1", int)
        self.gates = _table("gates", self.gates, lambda x: 0 <= x <= 1, "a number in [0, 1]", float)
        self.kv_scales = _table("kv_scales", self.kv_scales, lambda x: x > 0, "a number > 0", float)
        if self.kv_scales is not None and len(self.kv_scales[0]) != 2:
            raise ValueError(f"kv_scales must hold two scales a layer (keys, values), got {len(self.kv_scales[0])}")
        self._classes: list[tuple[bool, ...]] | None = None
        super().__post_init__()

    @property
    def selected_pages(self) -> int:
        """Pages chosen by score; the page of the newest cached token comes on top."""
        return self.token_budget // self.page_size - 1

    @property
    def dense_up_to(self) -> int:
        """Tokens up to which retrieval heads read everything."""
        if self.min_seq_len is not None:
            return max(self.token_budget, self.min_seq_len)
        return default_min_seq_len(self) if may_go_dense() else self.token_budget

    def retrieval(self, layer: int | None) -> tuple[bool, ...] | None:
        """The kinds of a layer's KV heads, True = retrieval; `None` when all of them retrieve, `()` when all stream."""
        if self.heads is None and (self.gates is None or self.static_sparsity in (0, 1)):
            return () if self.static_sparsity == 1 else None
        if self._classes is None:
            table = self.heads
            if table is None:
                table = classify_heads(torch.tensor(self.gates, dtype=torch.float64), self.static_sparsity).tolist()
            self._classes = [tuple(bool(kind) for kind in row) for row in table]
        if len(self._classes) == 1:
            return self._classes[0]
        if layer is None or layer >= len(self._classes):
            raise ValueError(
                f"heads and gates name {len(self._classes)} layers, but this attention layer has the number {layer}; "
                "give one row a layer of the model, or one row for all"
            )
        return self._classes[layer]

    def check_layer_count(self, count: int) -> None:
        """Refuse tables of another number of layers, and single indices in `layers` that no layer has."""
        for name in ("heads", "gates", "kv_scales"):
            rows = getattr(self, name)
            if rows is not None and len(rows) != count and (name == "gates" or len(rows) != 1):
                raise ValueError(f"{name} has {len(rows)} rows, but the model has {count} layers")
        super().check_layer_count(count)

    def check_head_count(self, count: int) -> None:
        """Refuse tables of another number of KV heads."""
        for name in ("heads", "gates"):
            rows = getattr(self, name)
            if rows is not None and len(rows[0]) != count:
                raise ValueError(f"{name} has {len(rows[0])} KV heads a layer, but the model has {count}")

    def store_options(self, layer: int | None, kv_heads: int | None = None) -> StoreOptions:
        """What the cache of one layer keeps."""
        retrieval = self.retrieval(layer)
        if retrieval == ():
            retrieval = (False,) * (kv_heads or 1)
        scales = self.kv_scales
        if scales is not None:
            scales = tuple(scales[0 if len(scales) == 1 else layer])
        return StoreOptions(
            retrieval=retrieval,
            page_size=self.page_size,
            logical_page_size=self.logical_page_size,
            dec_sink=self.dec_sink,
            dec_local=self.dec_local,
            ctx_sink=self.ctx_sink,
            ctx_local=self.ctx_local,
            kv_quant=self.kv_quant,
            zero_dtype=self.zero_dtype,
            stats_dtype=self.stats_dtype,
            kv_scales=scales,
        )


def _table(name: str, rows: Any, allowed, what: str, kind: type) -> list[list] | None:
    """A checked copy of a table of numbers, rows of one length."""
    if rows is None:
        return None
    if isinstance(rows, Tensor):
        rows = rows.tolist()
    shaped = isinstance(rows, list | tuple) and rows and all(isinstance(r, list | tuple) and len(r) > 0 for r in rows)
    if not shaped or len({len(row) for row in rows}) != 1:
        raise ValueError(f"{name} must be a list of rows of equal length, one a layer, got {str(rows)[:80]}")
    for row in rows:
        for cell in row:
            if not isinstance(cell, int | float) or not allowed(cell):
                raise ValueError(f"{name} must hold {what} in every place, got {cell!r}")
    return [[kind(cell) for cell in row] for row in rows]


def default_min_seq_len(config: LServeConfig) -> int:
    """Tokens up to which reading everything is measured to be as fast as selecting pages (docs/lserve.md).

    Copying a list of pages for every query head costs about twice what dense attention pays for the same tokens; one
    list for all query heads of a KV head costs less.
    """
    return config.token_budget * (2 if config.group_select == "per_query_head" else 1)


def attend(call: AttentionCall, config: LServeConfig) -> Tensor:
    """LServe's attention `[B, Hq, Nq, Dv]`; with a store in `call.layer.cache`, key and value are the new tokens."""
    _refuse(call, config)
    store = call.layer.cache
    if store is not None:
        real = _real_tokens(call, store)
        if call.q_len == 1:
            out, done = from_store(call, config, store, real)
            _record_decode(call, config, store.options.retrieval, done, store.pages_held)
            return out
        out = _prompt(call, config, store.options.retrieval) if store.slots == 0 else None
        if out is None:
            out = _behind_store(call, config, store, real)
        else:
            store.append(call.key, call.value, real)
        return out
    kinds = _kinds(call, config)
    if call.q_len == 1:
        out, done = from_keys(call, config, *head_lists(kinds, call.key.shape[1], call.key.device))
        if done["lengths"] is not None:
            held = sum(-(-n // config.page_size) for n in done["lengths"])
            _record_decode(call, config, kinds, done, held * _retrieving(kinds, call.key.shape[1]))
        return out
    return _prompt(call, config, kinds)


# -- several tokens ----------------------------------------------------------------------------------------------------


def _prompt(call: AttentionCall, config: LServeConfig, kinds: tuple[bool, ...] | None) -> Tensor:
    """Several new tokens behind all keys there are: retrieval heads dense, streaming heads sinks and window."""
    retrieval, streaming = head_lists(kinds, call.key.shape[1], call.key.device)
    _record_prompt(call, config, kinds)
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
    sizes = {"sinks": config.ctx_sink, "window": config.ctx_local, "scale": call.scale}
    return sink_window_attention(call.query, call.key, call.value, tokens=call.tokens, **sizes)


def _behind_store(call: AttentionCall, config: LServeConfig, store: LServeStore, real: Tensor | None) -> Tensor:
    """Several new tokens behind a store: retrieval heads dense, streaming heads see what is held of their window."""
    query, key, value = call.query, call.key, call.value
    group = query.shape[1] // key.shape[1]
    retrieval, streaming = store.heads(key.shape[1], key.device)
    position, counts = store.positions(real, key.shape[0], key.shape[2], key.device)
    store.write(key, value, real)
    total = max(n + c for n, c in zip(store.lengths, counts, strict=True))
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    _record_behind(call, config, store, counts)
    if retrieval is None or retrieval.numel():
        wide = None if retrieval is None else query_heads(retrieval, group)
        tensors = [pick(query, wide), *_all_tokens(store, [pick(x, retrieval) for x in (key, value)], position, total)]
        numbers = torch.arange(total, device=key.device).expand(key.shape[0], -1)
        held = numbers < torch.tensor([n + c for n, c in zip(store.lengths, counts, strict=True)], device=key.device)[:, None]
        segments = torch.cat([torch.where(position >= 0, 0, -1), torch.where(held, 0, -1)], 1)
        index = torch.stack([segments, torch.cat([position, numbers], 1)], 1).to(torch.int32)
        equal = real is None and len(set(store.lengths)) == 1
        tokens = TokenLayout.full(key.shape[0], call.q_len, total) if equal else TokenLayout(
            key.shape[0], call.q_len, total, index
        )
        part = replace(call, query=tensors[0], key=tensors[1], value=tensors[2], tokens=tokens)
        put(out, wide, dense_attention(part))
    if streaming is None or streaming.numel():
        wide = None if streaming is None else query_heads(streaming, group)
        tensors = [pick(query, wide), *(pick(x, streaming) for x in (key, value))]
        put(out, wide, _window_of_held(*tensors, position, config, store, call.scale))
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


def _window_of_held(query, key, value, position: Tensor, config: LServeConfig, store: LServeStore, scale: float) -> Tensor:
    """Streaming heads of several tokens behind what is held: ctx_sink and ctx_local tokens as far as they are there."""
    keys, values, numbers = key, value, position
    held = store.streaming.held
    if held is not None:
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


# -- counters ----------------------------------------------------------------------------------------------------------


def _retrieving(kinds: tuple[bool, ...] | None, kv_heads: int) -> int:
    return kv_heads if kinds is None else sum(kinds)


def _record_decode(call: AttentionCall, config: LServeConfig, kinds, done: dict[str, Any], pages_held: int) -> None:
    if not call.layer.recording:
        return
    kv_heads = call.key.shape[1]
    group = call.query.shape[1] // kv_heads
    retrieving = _retrieving(kinds, kv_heads)
    computed = visible = 0
    long = done.get("long") or [False] * len(done["lengths"])
    for length, selects in zip(done["lengths"], long, strict=True):
        window = min(length, config.dec_sink + config.dec_local)
        computed += (kv_heads - retrieving) * group * window
        if not selects:
            computed += retrieving * group * length
        visible += kv_heads * group * length
    pages = done.get("pages_read", 0)
    if any(long):
        lists = retrieving * group if config.group_select == "per_query_head" else retrieving
        read = pages * (retrieving * group) / max(lists, 1) * config.page_size
        for length, selects in zip(done["lengths"], long, strict=True):
            # Pages are full except the newest one, and rows that read everything are counted above.
            read = read - retrieving * group * (-length % config.page_size if selects else -(-length // config.page_size) * config.page_size)
        computed = computed + read
    reason = None
    if not any(long) and retrieving == kv_heads:
        reason = f"at most {config.dense_up_to} tokens: everything is read"
    counts = {"decode_steps": 1, "selector_runs": done["selector_runs"], "pages_read": pages, "pages_held": pages_held}
    path = "sparse" if reason is None else "dense"
    call.layer.record(path=path, reason=reason, computed=computed, visible=visible, counts=counts)


def _record_prompt(call: AttentionCall, config: LServeConfig, kinds) -> None:
    if not call.layer.recording:
        return
    kv_heads = call.key.shape[1]
    group = call.query.shape[1] // kv_heads
    retrieving = _retrieving(kinds, kv_heads)
    if retrieving == kv_heads:
        call.layer.record(path="dense", reason="retrieval heads read the whole prompt")
        return
    ranks = call.tokens.query_ranks(call.query.device)
    rows = call.query.shape[0] // ranks.shape[0] * group
    windowed, visible = _count(ranks, config.ctx_sink, config.ctx_local)
    computed = windowed * (kv_heads - retrieving) + visible * retrieving
    call.layer.record(path="sparse", computed=computed * rows, visible=visible * kv_heads * rows)


def _record_behind(call: AttentionCall, config: LServeConfig, store: LServeStore, counts: list[int]) -> None:
    if not call.layer.recording:
        return
    kv_heads = call.key.shape[1]
    group = call.query.shape[1] // kv_heads
    retrieving = kv_heads if store.options.retrieval is None else sum(store.options.retrieval)
    if retrieving == kv_heads:
        call.layer.record(path="dense", reason="retrieval heads read the whole prompt")
        return
    ranks = torch.cat([torch.arange(n, n + c) for n, c in zip(store.lengths, counts, strict=True)])
    windowed, visible = _count(ranks, config.ctx_sink, config.ctx_local)
    computed = windowed * (kv_heads - retrieving) + visible * retrieving
    call.layer.record(path="sparse", computed=computed * group, visible=visible * kv_heads * group)


def _count(ranks: Tensor, sink: int, local: int) -> tuple[Tensor, Tensor]:
    """(query, key) pairs a streaming head reads, and causally visible ones, for queries of these ranks."""
    ranks = ranks[ranks >= 0]
    recent = (ranks + 1).clamp(max=local)
    sinks = (ranks + 1 - recent).clamp(max=sink)
    return (recent + sinks).sum(dtype=torch.float64), (ranks + 1).sum(dtype=torch.float64)


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
    windowed, visible = _count(torch.arange(k_len - q_len, k_len), config.ctx_sink, config.ctx_local)
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
    capabilities=Capabilities(train=True, bidirectional=False),
    attend=attend,
    attended=attended,
    describe=describe,
    store=make_store,
)
