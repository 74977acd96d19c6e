"""What one attention layer is given, free of host quirks: AttentionCall, TokenLayout, LayerContext."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_attn.grid import TokenGrid


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Which tokens are real, which sequence they belong to and where they sit. Never an [Nq, Nk] mask by default.

    Args:
        batch: rows of the call.
        q_len, k_len: query and key slots of every row (padding included).
        index: `None` when every row is one full sequence, queries aligned with the last keys (bottom-right).
            Otherwise int32 `[batch, 2, q_len + k_len]`; queries first, then keys. Row 0 is the sequence id of a token
            (-1: not real, attends to nothing and is attended by nobody), row 1 its position. Tokens of a sequence have
            increasing positions; a query sees keys of its own sequence only, and under causal attention only those at
            positions up to its own. Mechanisms count blocks from the first *real* key of a sequence.
        window: `None`, or int32 `[batch, 2, q_len]`: lowest and highest key position a query may see (a layer with a
            sliding window of its own).
        dense: `None`, or the host's arbitrary mask `[batch | 1, heads | 1, q_len, k_len]`, bool (True = visible) or
            additive float. It already contains causality and padding; nothing else of this object is then meaningful.
        grid: `None`, or the lattice the tokens lie on (diffusion models; `grid.length == q_len == k_len`). Tokens that
            `index` calls not real lie beside the lattice.
        roles: `None`, or int32 `[batch, q_len + k_len]`: the sequences of `index` are segments of one prompt, and each
            token is of the shared prefix (0), of a document (1) or of the reader (2). All see their own segment and the
            prefix; readers see every segment. Positions count over the whole row.
    """

    batch: int
    q_len: int
    k_len: int
    index: Tensor | None = None
    window: Tensor | None = None
    dense: Tensor | None = None
    grid: TokenGrid | None = None
    roles: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """True when there is nothing to say: full rows, bottom-right alignment, no window, no arbitrary mask."""
        return self.index is None and self.window is None and self.dense is None

    def known_grid(self) -> TokenGrid:
        """The lattice; ValueError where the host told none."""
        if self.grid is None:
            raise ValueError("this mechanism needs the latent grid of the tokens, which this call does not have")
        return self.grid

    def known_documents(self) -> tuple[Tensor, Tensor]:
        """`index` and `roles` of a layout made by `documents`; ValueError for another one."""
        if self.index is None or self.roles is None:
            raise ValueError("this needs a layout of TokenLayout.documents, got one without segments and roles")
        return self.index, self.roles

    def real_keys(self) -> Tensor | None:
        """Which key slots are real, bool `[batch, k_len]`; `None` when all are."""
        return None if self.index is None else self.index[:, 0, self.q_len :] >= 0

    @classmethod
    def full(cls, batch: int, q_len: int, k_len: int | None = None) -> TokenLayout:
        """Every row one full sequence; with `k_len > q_len` the queries are the last tokens."""
        return cls(batch, q_len, q_len if k_len is None else k_len)

    @classmethod
    def packed(cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q_len: int, k_len: int) -> TokenLayout:
        """One row that holds several sequences end to end.

        Args:
            cu_seqlens_q, cu_seqlens_k: int `[sequences + 1]`, 0 first; sequence s owns rows `cu[s]:cu[s + 1]`. Rows
                beyond the last entry are not real. Queries align with the last keys of their sequence.

        Raises ValueError for borders that are not integer `[sequences + 1]`, or not as many for queries and keys.
        """
        for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if cu.dim() != 1 or cu.numel() < 2 or cu.is_floating_point():
                raise ValueError(
                    f"{name} must be a 1-D integer tensor [sequences + 1], got {tuple(cu.shape)} {cu.dtype}"
                )
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_q and cu_seqlens_k must have the same length, got {cu_seqlens_q.numel()} and "
                f"{cu_seqlens_k.numel()}"
            )
        seg_q, pos_q = _packed_rows(cu_seqlens_q, q_len)
        seg_k, pos_k = _packed_rows(cu_seqlens_k, k_len)
        extra_keys = (cu_seqlens_k.diff() - cu_seqlens_q.diff()).to(pos_q)
        pos_q = torch.where(seg_q >= 0, pos_q + extra_keys[seg_q.clamp(min=0)], pos_q)
        index = torch.stack([torch.cat([seg_q, seg_k]), torch.cat([pos_q, pos_k])])
        return cls(1, q_len, k_len, index[None].to(torch.int32))

    @classmethod
    def padded(cls, key_start: Tensor | int, key_length: Tensor, q_len: int, k_len: int) -> TokenLayout:
        """Rows of unequal length: row b's real keys are slots `key_start[b] : key_start[b] + key_length[b]`.

        With `q_len == k_len` query slot i is key slot i. Otherwise the queries are the last real tokens of the row.

        Args:
            key_start: first real slot of every row, int `[batch]` or one number.
            key_length: int `[batch]`.

        Raises ValueError for lengths of another kind.
        """
        if key_length.dim() != 1 or key_length.is_floating_point():
            raise ValueError(f"key_length must be an integer tensor [batch], got {tuple(key_length.shape)}")
        length = key_length.to(torch.int64)[:, None]
        start = torch.as_tensor(key_start, device=length.device).to(torch.int64).expand(length.shape[0])[:, None]
        slots = torch.arange(k_len, device=length.device)[None]
        seg_k = torch.where((slots >= start) & (slots < start + length), 0, -1)
        if q_len == k_len:
            seg_q, pos_q = seg_k, slots.expand_as(seg_k)
        else:
            pos_q = start + length - q_len + torch.arange(q_len, device=length.device)[None]
            seg_q = torch.where(pos_q >= start, 0, -1)
        segments = torch.cat([seg_q, seg_k], 1)
        positions = torch.cat([pos_q, slots.expand_as(seg_k)], 1)
        return cls(length.shape[0], q_len, k_len, torch.stack([segments, positions], 1).to(torch.int32))

    @classmethod
    def documents(cls, segments: Tensor, num_segments: Tensor | int | None = None) -> TokenLayout:
        """Prompts of a prefix, documents that do not see each other, and a reader that sees all (BlockRank).

        Args:
            segments: integer `[batch, tokens]`, number of each token's segment in order (0 prefix, then the documents,
                the last one reads), -1 for padding, which may stand anywhere.
            num_segments: of every row, integer `[batch]` or one for all; default the highest number plus one. A row
                with one segment is plain causal.

        Raises ValueError for segments of another kind.
        """
        if segments.dim() != 2 or segments.is_floating_point() or segments.dtype == torch.bool:
            raise ValueError(
                f"segments must be an integer tensor [batch, tokens], got {segments.dtype} {tuple(segments.shape)}"
            )
        batch, length = segments.shape
        if num_segments is None:
            num_segments = segments.amax(1) + 1 if length else segments.new_zeros(batch)
        last = torch.as_tensor(num_segments, device=segments.device).expand(batch)[:, None] - 1
        roles = torch.where(segments == 0, 0, torch.where(segments == last, 2, 1)).to(torch.int32)
        index = torch.stack([segments, torch.arange(length, device=segments.device).expand_as(segments)], 1)
        index = index.to(torch.int32)
        return cls(batch, length, length, torch.cat([index, index], -1), roles=torch.cat([roles, roles], -1))

    def query_rows(self, start: int, stop: int, causal: bool) -> TokenLayout:
        """The layout of query slots `start:stop` alone; its `k_len` may be smaller, as the first keys are then enough.

        Full rows need at least as many keys as queries.
        """
        count = stop - start
        if self.is_plain:
            return TokenLayout.full(self.batch, count, self.k_len - (self.q_len - stop) * causal)
        index, window, dense = self.index, self.window, self.dense
        if index is not None:
            index = torch.cat([index[..., start:stop], index[..., self.q_len :]], -1)
        if window is not None:
            window = window[..., start:stop]
        if dense is not None and dense.shape[2] > 1:
            dense = dense[:, :, start:stop]
        roles = self.roles
        if roles is not None:
            roles = torch.cat([roles[:, start:stop], roles[:, self.q_len :]], -1)
        return TokenLayout(self.batch, count, self.k_len, index, window, dense, roles=roles)

    def query_ranks(self, device: torch.device | str | None = None) -> Tensor:
        """Rank of every query among the real keys of its sequence (its "position" in block arithmetic).

        Returns int64 `[batch | 1, q_len]`; -1 for queries that are not real or stand before every key.
        """
        if self.index is None:
            return torch.arange(self.k_len - self.q_len, self.k_len, device=device)[None].clamp(min=-1)
        segments, positions = self.index[:, 0].long(), self.index[:, 1].long()
        span = 1 << 32  # positions are int32
        codes = torch.where(segments >= 0, segments * span + positions, torch.iinfo(torch.int64).max)
        keys = codes[:, self.q_len :].sort(-1).values
        queries = codes[:, : self.q_len].contiguous()
        before = torch.searchsorted(keys, (segments[:, : self.q_len] * span).contiguous())
        ranks = torch.searchsorted(keys, queries, right=True) - before - 1
        return torch.where(segments[:, : self.q_len] >= 0, ranks, -1)

    def visible(self, causal: bool, device: torch.device | str | None = None) -> Tensor:
        """The dense mask, bool `[batch, heads | 1, q_len, k_len]`: a fallback, quadratic in memory."""
        if self.dense is not None:
            return self.dense if self.dense.dtype == torch.bool else self.dense > torch.finfo(self.dense.dtype).min / 2
        if self.index is None:
            pos_q = torch.arange(self.k_len - self.q_len, self.k_len, device=device)[None]
            pos_k = torch.arange(self.k_len, device=device)[None]
            allowed = torch.ones(1, self.q_len, self.k_len, dtype=torch.bool, device=device)
        else:
            segments, positions = self.index[:, 0], self.index[:, 1]
            seg_q, seg_k = segments[:, : self.q_len, None], segments[:, None, self.q_len :]
            pos_q, pos_k = positions[:, : self.q_len], positions[:, self.q_len :]
            allowed = seg_q == seg_k
            if self.roles is not None:
                reads_all, read_by_all = self.roles[:, : self.q_len] == 2, self.roles[:, self.q_len :] == 0
                allowed = allowed | reads_all[:, :, None] | read_by_all[:, None]
            allowed = allowed & (seg_q >= 0) & (seg_k >= 0)
        if causal:
            allowed = allowed & (pos_k[:, None, :] <= pos_q[:, :, None])
        if self.window is not None:
            low, high = self.window[:, 0, :, None], self.window[:, 1, :, None]
            allowed = allowed & (pos_k[:, None, :] >= low) & (pos_k[:, None, :] <= high)
        return allowed[:, None].expand(self.batch, 1, self.q_len, self.k_len)


def _packed_rows(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Sequence id (-1 beyond the last sequence) and position inside the sequence of `total` packed rows."""
    cu = cu_seqlens.to(torch.int64)
    rows = torch.arange(total, device=cu.device)
    segment = torch.searchsorted(cu, rows, right=True) - 1
    outside = segment >= cu.numel() - 1
    position = rows - cu[segment.clamp(max=cu.numel() - 1)]
    return torch.where(outside, -1, segment), position


def _drop(**_: Any) -> None:
    """Nobody listens."""


@dataclass(frozen=True, slots=True)
class LayerContext:
    """Where a call comes from.

    Args:
        index, count: number of the attention layer, and of all of them; `None` when the host does not say.
        module: the host's attention module.
        cache: the layer's `hf_attn.caches.store.LayerStore` when the mechanism has one of its own. `key` and `value` of
            the call are then the new tokens alone, which the mechanism appends itself; `tokens` describes all of them.
        step, num_steps: denoising step of a diffusion model (from 0), and of how many; `None` when nobody tells.
        timestep: the scheduler's value at this step.
        head_offset: number of the call's first query head in the layer, where heads are spread over processes.
        training: the module's training flag.
        number: number of the layer among those of all models of a pipeline; `None` when the host does not say.
        record: takes what happened, as keywords (`path`, `density`, `reason`, ...), for `hf_attn.stats`.
    """

    index: int | None = None
    count: int | None = None
    module: Any = None
    cache: Any = None
    step: int | None = None
    num_steps: int | None = None
    timestep: float | None = None
    head_offset: int = 0
    training: bool = False
    number: int | None = None
    record: Callable[..., None] = field(default=_drop)

    def known_index(self) -> int:
        """The number of the attention layer; ValueError where the host told none."""
        if self.index is None:
            raise ValueError("layers are told apart by their numbers here, but this attention module has no layer_idx")
        return self.index

    @property
    def recording(self) -> bool:
        """Whether anybody listens; False inside compiled graphs. Skip work that only `record` needs."""
        return self.record is not _drop


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention layer's work.

    Args:
        query: `[B, Hq, Nq, D]`, position encoding already applied.
        key: `[B, Hkv, Nk, D]`; `Hq % Hkv == 0`, query head h reads KV head `h // (Hq // Hkv)`.
        value: `[B, Hkv, Nk, Dv]`.
        scale: factor on the scores.
        causal: whether a query sees only keys at its own position or before.
        tokens: which rows are real and where they sit.
        layer: where the call comes from.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool
    tokens: TokenLayout
    layer: LayerContext = LayerContext()

    @property
    def q_len(self) -> int:
        return self.query.shape[2]

    @property
    def k_len(self) -> int:
        return self.key.shape[2]
