"""MoH: every token computes the shared heads and the `top_k` of the others whose queries are longest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn.call import AttentionCall
from hf_attn.mechanism import Capabilities, Mechanism, MechanismConfig
from hf_attn.ops import dense_attention, head_routed_attention
from hf_attn.ops.backend import choose_path
from hf_attn.ops.head_routed import check_heads, choose_top_k, routes_dense, zero_unchosen


@dataclass
class MoHConfig(MechanismConfig):
    """Options of the mechanism; models of `hf_attn.models.moh` bring their own router and need none.

    Args:
        shared_heads: indices of the heads that every token computes; None is the first half, as published for Llama.
        top_k: heads a token computes of the others, >= 1; None is half of them.
    """

    shared_heads: list[int] | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared_heads is not None:
            bad = [
                head for head in self.shared_heads if isinstance(head, bool) or not isinstance(head, int) or head < 0
            ]
            if bad:
                raise ValueError(f"shared_heads must hold head indices >= 0, got {bad[0]!r}")
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise ValueError(f"top_k must be an integer >= 1, got {self.top_k!r}")


def attend(call: AttentionCall, config: MoHConfig) -> Tensor:
    """`[B, Hq, Nq, Dv]`; zeros where a token did not choose a head."""
    heads = getattr(call.layer.module, "routed_heads", None)
    if heads is None:
        heads = _route(call, config)
    heads = heads.transpose(1, 2)
    path = choose_path("head_routed_attention", call.query, call.query.shape[3], call.value.shape[3])
    if call.layer.recording:
        _record(call, heads, path)
    if call.tokens.dense is not None or call.tokens.window is not None:
        return zero_unchosen(dense_attention(call), heads)
    tokens = None if call.tokens.is_plain else call.tokens
    return head_routed_attention(
        call.query, call.key, call.value, heads, causal=call.causal, scale=call.scale, tokens=tokens
    )


def _record(call: AttentionCall, heads: Tensor, path: str) -> None:
    reason = None
    if path != "reference" and call.tokens.is_plain and routes_dense(call.query, call.key, call.value, heads):
        path = f"{path}: dense"
        reason = "too short, or too few heads skipped, to be faster than dense attention"
    rows = call.tokens.query_ranks(call.query.device) + 1 if call.causal else torch.full((1, 1), call.k_len)
    rows = rows.to(heads.device, torch.float64)[:, None].clamp(min=0).expand(heads.shape)
    chosen = (heads * rows).sum()
    visible = rows.sum()
    call.layer.record(path=path, reason=reason, computed=visible if reason else chosen, visible=visible)


def _route(call: AttentionCall, config: MoHConfig) -> Tensor:
    """bool `[B, Nq, Hq]` by the norms of the queries, which a rotary embedding leaves as they are."""
    module, count = call.layer.module, call.query.shape[1]
    if getattr(module, "q_norm", None) is not None:
        raise ValueError(
            f"moh routes by the norm of the queries, but {type(module).__name__} normalises them; convert the model, "
            "hf_attn.convert(model, 'moh', ...), which reads them before q_norm"
        )
    whole = getattr(getattr(module, "config", None), "num_attention_heads", count)
    if call.layer.head_offset or count != whole:
        raise ValueError(f"moh compares all {whole} heads of a layer, got {count} of them; use no tensor parallelism")
    shared = list(range(count // 2)) if config.shared_heads is None else config.shared_heads
    top_k = (count - len(shared)) // 2 or 1 if config.top_k is None else config.top_k
    check_heads(shared, top_k, count, router="learned", name="")
    norms = call.query.detach().float().square().sum(-1).transpose(1, 2)
    routed = [head for head in range(count) if head not in set(shared)]
    heads = torch.ones_like(norms, dtype=torch.bool)
    if routed:
        heads[..., routed] = choose_top_k(norms[..., routed], top_k)
    return heads


def attended(call: AttentionCall, config: MoHConfig, rows: Tensor) -> Tensor:
    """Keys that the given query rows read, bool `[B, Hq, R, Nk]`; for rows without padding."""
    heads = _route(call, config).transpose(1, 2)[:, :, rows, None]
    last = (rows + call.k_len - call.q_len)[:, None] if call.causal else call.k_len
    return heads & (torch.arange(call.k_len, device=rows.device) <= last)


def describe(config: MoHConfig, q_len: int, k_len: int) -> dict[str, Any]:
    """The density depends on the input: on how many heads the layer has, and on which tokens chose which."""
    return {"density": None}


MECHANISM = Mechanism(
    name="moh",
    summary="every token computes the shared heads and the top_k others with the longest queries",
    source="MoH, arXiv 2410.11842",
    config=MoHConfig,
    capabilities=Capabilities(triton=True),
    attend=attend,
    attended=attended,
    describe=describe,
)
