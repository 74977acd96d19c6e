"""LServe's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_attn.caches.lserve import StoreOptions
from hf_attn.caches.quantization import FORMATS
from hf_attn.checks import require_int, require_one_of
from hf_attn.mechanism import MechanismConfig
from hf_attn.mechanisms._lserve_heads import classify_heads
from hf_attn.ops.backend import may_go_dense

Row = TypeVar("Row")


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
        kv_scales: `[layers][2]`, scales of keys and values for "int8-per-tensor"; None takes them from the first
            prompt.
        zero_dtype: "float16" or "float32", of zero points.
        stats_dtype: "float16", "bfloat16" or "float32", of the key statistics; None takes the keys' dtype.
        group_select: "per_query_head", or "group_max": one list of pages for all query heads of a KV head, by their
            best score. It reads fewer pages and is faster on a CPU (docs/lserve.md), but is not the paper's rule.
        heads: `[layers][KV heads]` of 0 and 1, 1 = retrieval head; one row serves all layers. Wins over `gates`.
        gates: `[layers][KV heads]` of DuoAttention's gate values in [0, 1].
        min_seq_len: tokens up to which retrieval heads read everything, >= 0 (never less than `token_budget`). `None`
            takes the measured default of `default_min_seq_len`; it does not apply when HF_ATTN_BACKEND forces a path.
        keep_selected: on a CPU, keep a copy of the chosen pages, dequantised, from one selection to the next: steps
            between them then copy nothing. Costs memory for up to `token_budget` tokens a query head and layer, however
            long the context is. Elsewhere pages are read where they are.
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
    keep_selected: bool = True

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
        require_one_of("keep_selected", self.keep_selected, (True, False))
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
        return _row("heads and gates name", self._classes, layer)

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
        scales = None
        if self.kv_scales is not None:
            keys, values = _row("kv_scales names", self.kv_scales, layer)
            scales = (keys, values)
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


def _row(what: str, rows: list[Row], layer: int | None) -> Row:
    """A layer's row, or the one for all. Raises ValueError for a layer that the rows do not reach."""
    if len(rows) == 1:
        return rows[0]
    if layer is None or layer >= len(rows):
        raise ValueError(
            f"{what} {len(rows)} layers, but this attention layer has the number {layer}; give one row a layer of the "
            "model, or one row for all"
        )
    return rows[layer]


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
