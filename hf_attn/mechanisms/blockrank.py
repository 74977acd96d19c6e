"""BlockRank (arXiv 2510.05396): documents of a prompt do not see each other, and attention to them ranks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.checks import require_int
from hf_attn.mechanism import Capabilities, Mechanism, MechanismConfig
from hf_attn.ops import dense_attention, document_attention, document_scores
from hf_attn.pattern import BlockPattern

# Share of the layers below the scoring layer: layer 20 of 32 in the paper.
_SCORE_DEPTH = 0.63


@dataclass
class BlockRankConfig(MechanismConfig):
    """Instruction, documents and query in one prompt: linear in the number of documents, scored at one layer.

    Args:
        score_layer: layer whose query-to-document attention ranks (l* of the paper), from 0; `None` takes
            round(0.63 * layers).
        score_heads: query heads whose attention is averaged; `None` takes all.
        query_offset: position of the first query token; `None` takes the smaller of 8192 and
            max_position_embeddings - 2 * max_block_length. A trained model is good at the offset of its training only.
        max_block_length: tokens of a document, its frame included, >= 1; longer ones are cut, and counted.
        permutation_invariant: every document at the positions of the first one (the paper), or positions running on.
    """

    score_layer: int | None = None
    score_heads: list[int] | None = None
    query_offset: int | None = None
    max_block_length: int = 160
    permutation_invariant: bool = True

    def __post_init__(self) -> None:
        if self.score_layer is not None:
            require_int("score_layer", self.score_layer, 0)
        if self.score_heads is not None:
            if not isinstance(self.score_heads, list | tuple) or not self.score_heads:
                raise ValueError(f"score_heads must be a list of query heads or None (all), got {self.score_heads!r}")
            for head in self.score_heads:
                require_int("score_heads", head, 0)
            self.score_heads = sorted(set(self.score_heads))
        if self.query_offset is not None:
            require_int("query_offset", self.query_offset, 1)
        require_int("max_block_length", self.max_block_length, 1)
        if not isinstance(self.permutation_invariant, bool):
            raise ValueError(f"permutation_invariant must be True or False, got {self.permutation_invariant!r}")
        super().__post_init__()

    def check_layer_count(self, count: int) -> None:
        """Also refuse a scoring layer that does not exist, or that is left dense."""
        super().check_layer_count(count)
        if self.score_layer is not None and self.score_layer >= count:
            raise ValueError(f"score_layer must be a layer of the model, 0 to {count - 1}, got {self.score_layer}")
        layer = self.layer_of(count)
        if self.for_layer(layer, count) is None:
            raise ValueError(f"layers leaves the scoring layer {layer} dense; drop it there or choose another one")

    def layer_of(self, count: int) -> int:
        """The scoring layer of a model of `count` layers."""
        return min(round(_SCORE_DEPTH * count), count - 1) if self.score_layer is None else self.score_layer

    def offset_of(self, max_positions: int) -> int:
        """Position of the first query token in a model trained on `max_positions` positions.

        Raises ValueError when nothing is left for documents.
        """
        if self.query_offset is not None:
            return self.query_offset
        offset = min(8192, max_positions - 2 * self.max_block_length)
        if offset < 1:
            raise ValueError(
                f"max_block_length={self.max_block_length} leaves no room in {max_positions} positions; lower it to "
                f"at most {(max_positions - 1) // 2}, or set query_offset"
            )
        return offset


def attend(call: AttentionCall, config: BlockRankConfig) -> Tensor:
    """`[B, Hq, Nq, Dv]` (blockrank.md 2.3). Behind a cache the new tokens belong to the query and see everything.

    Raises ValueError for a call without the documents of its prompt.
    """
    if call.tokens.roles is None:
        raise ValueError(
            "blockrank needs to know the documents of the prompt, but this call has an ordinary mask or none. Rank "
            "with hf_attn.BlockRanker, pass attention_mask=document_mask(TokenLayout.documents(segments)), or "
            "generate with model.set_attn_implementation('sdpa')"
        )
    if call.q_len != call.k_len:
        call.layer.record(path="dense", reason="behind a cache the new tokens see everything")
        return dense_attention(call)
    if call.layer.recording:
        computed, visible = _pairs(call.tokens)
        heads = call.query.shape[1]
        call.layer.record(path="sparse", computed=computed * heads, visible=visible * heads)
    return document_attention(call.query, call.key, call.value, tokens=call.tokens, scale=call.scale)


def head_scores(call: AttentionCall, rows: Tensor, num_documents: int) -> Tensor:
    """What each head of a layer says: share of attention each document gets, mean over the signal tokens.

    Args:
        rows: int64 `[B, S]`, slots of the signal tokens.
        num_documents: documents of the longest prompt.

    Returns fp32 `[B, Hq, num_documents]`, sums to 1 (blockrank.md 2.5 before the mean over heads).
    """
    scores = document_scores(
        call.query, call.key, tokens=call.tokens, rows=rows, num_documents=num_documents, scale=call.scale
    )
    return scores.mean(2)


def positions(layout: TokenLayout, query_offset: int, permutation_invariant: bool = True) -> Tensor:
    """Position ids int64 `[B, N]` of a prompt (blockrank.md 2.4); padding gets 0.

    The prefix counts from 0; every document goes on from there as if it were the only one; the reader starts at
    `query_offset`. Without `permutation_invariant` the real tokens are counted through.

    Raises ValueError when a document reaches `query_offset`.
    """
    index, roles = layout.known_documents()
    segments, roles = index[:, 0, : layout.q_len], roles[:, : layout.q_len]
    real = segments >= 0
    running = real.long().cumsum(1) - 1
    if not permutation_invariant:
        return torch.where(real, running, 0)
    if not segments.shape[1]:
        return running
    # Rank inside the own segment: segments are contiguous but for padding, so the first real token tells.
    count = int(segments.max()) + 1 if segments.numel() else 0
    first = torch.full((segments.shape[0], count + 1), segments.shape[1], device=segments.device)
    slot = torch.where(real, segments, count).long()
    first = first.scatter_reduce(1, slot, running.clamp(min=0), "amin")
    within = running - first.gather(1, slot)
    prefix = (real & (roles == 0)).sum(1, keepdim=True)
    start = torch.where(roles == 0, 0, torch.where(roles == 2, query_offset, prefix))
    found = torch.where(real, start + within, 0)
    highest = int(torch.where(real & (roles != 2), found, -1).max())
    if highest >= query_offset and bool((real & (roles == 2)).any()):
        raise ValueError(
            f"the documents reach position {highest}, beyond query_offset={query_offset}; shorten instruction or "
            "documents (max_block_length), or raise query_offset within the model's positions"
        )
    return found


def select(call: AttentionCall, config: BlockRankConfig, block: int = 64) -> BlockPattern:
    """Blocks of `block` tokens that hold a visible pair, as a picture; unequal documents share blocks."""
    visible = call.tokens.visible(True, call.query.device)
    pad_q, pad_k = -call.q_len % block, -call.k_len % block
    padded = torch.nn.functional.pad(visible, (0, pad_k, 0, pad_q))
    blocks = padded.unflatten(3, (-1, block)).any(4).unflatten(2, (-1, block)).any(3)
    return BlockPattern.from_dense(blocks, block_q=block, block_k=block, q_len=call.q_len, k_len=call.k_len)


def attended(call: AttentionCall, config: BlockRankConfig, rows: Tensor) -> Tensor:
    """Keys that the given query rows read, bool `[B, 1, R, Nk]`."""
    return call.tokens.visible(True, call.query.device)[:, :, rows]


def describe(config: BlockRankConfig, q_len: int, k_len: int) -> dict[str, Any]:
    """Density of a prompt cut into blocks of `max_block_length`, the first an instruction and the last the query."""
    layout = TokenLayout.documents(torch.arange(k_len)[None] // config.max_block_length)
    computed, visible = _pairs(layout)
    return {"density": float(computed) / max(float(visible), 1.0)}


def _pairs(tokens: TokenLayout) -> tuple[Tensor, Tensor]:
    """(query, key) pairs that are read, and pairs of causal attention, over the batch."""
    index, roles = tokens.known_documents()
    segments, roles = index[:, 0, tokens.q_len :].long(), roles[:, tokens.q_len :]
    real = segments >= 0
    prefix, reader = ((real & (roles == role)).sum(1).double() for role in (0, 2))
    total = real.sum(1).double()
    count = int(segments.max()) + 2 if segments.numel() else 1
    lengths = torch.zeros(segments.shape[0], count, dtype=torch.float64, device=segments.device)
    document = torch.where(real & (roles == 1), segments, count - 1)
    lengths = lengths.scatter_add(1, document, torch.ones_like(document, dtype=torch.float64))[:, :-1]
    inside = (lengths * (lengths + 1) / 2).sum(1) + prefix * (prefix + 1) / 2 + reader * (reader + 1) / 2
    across = prefix * lengths.sum(1) + reader * (total - reader)
    return (inside + across).sum(), (total * (total + 1) / 2).sum()


MECHANISM = Mechanism(
    name="blockrank",
    summary="documents of a prompt do not see each other, the query sees all; ranks by attention at one layer",
    source="BlockRank, arXiv 2510.05396",
    config=BlockRankConfig,
    capabilities=Capabilities(packing=False, bidirectional=False, documents=True),
    attend=attend,
    select=select,
    attended=attended,
    describe=describe,
)
