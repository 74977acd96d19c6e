"""Top-k routing of attention heads: which heads a token computes, and what each of them weighs.

Mixture-of-Head attention (MoH, arXiv 2410.11842). Some heads are shared (every token computes them), of the others a
token chooses `top_k`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_attn.ops.head_routed import check_heads, choose_top_k

STE = ("selected", "all")
SCALINGS = ("code", "paper", "quantized")
GRANULARITIES = ("head", "kv_group")


@dataclass(frozen=True)
class HeadRouting:
    """What a router says about `[B, N]` tokens and H heads.

    Args:
        gates: `[B, N, H]`, factor on each head's output; 0 for heads that are not chosen.
        heads: bool `[B, N, H]`, heads that must be computed.
        chosen: bool `[B, N, E]`, choice among the routed heads, ascending; None without routed heads.
        scores: `[B, N, E]`, fp32, what the choice compares; None without routed heads.
        standardized: whether `prob` divides the scores by their standard deviation over the routed heads.
        binary: whether the gates are exactly `heads`, and carry no gradient.
    """

    gates: Tensor
    heads: Tensor
    chosen: Tensor | None
    scores: Tensor | None
    standardized: bool = False
    binary: bool = False

    @property
    def prob(self) -> Tensor | None:
        """`[B, N, E]`, softmax of the scores; None without routed heads. Computed when asked for: only losses do."""
        if self.scores is None:
            return None
        return softened(self.scores, standardized=self.standardized)


def softened(scores: Tensor, *, standardized: bool = False) -> Tensor:
    """Softmax over the last dimension; `standardized` divides the scores by their standard deviation (MoH, eq. 9)."""
    if standardized:
        scores = scores / scores.std(-1, keepdim=True).clamp(min=1e-6)
    return scores.softmax(-1)


def straight_through(mask: Tensor, prob: Tensor, ste: str) -> Tensor:
    """Gates with the value of `mask` whose gradient goes to `prob`: of the chosen heads only, or of "all".

    mask: bool `[..., E]`; prob: `[..., E]`; returns `[..., E]`.
    """
    change = prob - prob.detach()
    return mask + change if ste == "all" else mask * (1 + change)


def load_balance(prob: Tensor, chosen: Tensor, *, form: str = "code", real: Tensor | None = None) -> Tensor:
    """Load-balance loss of one layer: sum_i P_i f_i over experts, times their number E in the "code" form.

    Args:
        prob: `[..., E]`, softmax over all experts (gradient flows through it only).
        chosen: bool `[..., E]`.
        form: "code" or "paper" (MoH, eq. 7: without E). Even routing gives k, or k / E.
        real: bool `[...]`, tokens that count; padding does not.

    P_i is the mean probability and f_i the share of tokens that chose expert i, over all tokens together. 0 when no
    token is real.

    Raises ValueError for another form.
    """
    if form not in ("code", "paper"):
        raise ValueError(f"form must be one of 'code', 'paper', got {form!r}")
    weight = torch.ones(prob.shape[:-1], device=prob.device) if real is None else real.to(prob.dtype)
    weight = (weight / weight.sum().clamp(min=1)).unsqueeze(-1)
    axes = tuple(range(prob.dim() - 1))
    loss = ((prob * weight).sum(axes) * (chosen * weight).sum(axes)).sum()
    return loss * prob.shape[-1] if form == "code" else loss


class QueryNormRouter(nn.Module):
    """Chooses heads by the norm of their queries, without weights of its own; chosen heads weigh 1 (MoH, eq. 9-10).

    Args:
        num_heads, shared, top_k: heads of the layer, indices of the shared ones, routed heads a token computes.
        group: heads that are chosen together: 1, or Hq // Hkv to choose whole KV groups (RMS of their norms); then
            `num_heads`, `shared` and `top_k` count groups.
        ste: heads the gradient of the choice goes through: "selected", or "all" (then training computes all heads).
    """

    needs_query = True

    def __init__(self, num_heads: int, shared: Sequence[int], top_k: int, *, group: int = 1, ste: str = "selected"):
        super().__init__()
        check_heads(shared, top_k, num_heads, router="query_norm")
        self.num_heads, self.shared, self.top_k, self.group, self.ste = num_heads, sorted(shared), top_k, group, ste
        self.routed = [head for head in range(num_heads) if head not in set(shared)]

    def forward(self, query: Tensor) -> HeadRouting:
        """query `[B, N, H, D]`, before or after a rotary embedding."""
        norm = torch.linalg.vector_norm(query, dim=-1, dtype=torch.float32)
        if self.group > 1:
            norm = norm.square().unflatten(-1, (self.num_heads, self.group)).mean(-1)
            norm = norm.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        norm = norm[..., self.routed]
        if not self.routed:
            ones = torch.ones(*query.shape[:3], device=query.device)
            return HeadRouting(ones, ones.bool(), None, None)
        ste = self.ste if self.training else "selected"
        routing = quantized(norm, self.top_k, self.shared, self.routed, ste, standardized=True)
        if self.group == 1:
            return routing
        gates, heads = (x.repeat_interleave(self.group, -1) for x in (routing.gates, routing.heads))
        return replace(routing, gates=gates, heads=heads)


class LearnedRouter(nn.Module):
    """Chooses heads by a linear map of the hidden state, and weighs them in two stages (MoH, eq. 5-6).

    Args:
        width: of the hidden states.
        num_heads, shared, top_k, ste: as in `QueryNormRouter`.
        scaling: "code" (as published: gates have mean 1), "paper" (eq. 5-6 as written), or "quantized": shared and
            chosen heads weigh 1, for pretrained models whose outputs must stay as they are; then the only weights are
            those of the choice, with a bias.
    """

    needs_query = False

    def __init__(
        self, width: int, num_heads: int, shared: Sequence[int], top_k: int, *, scaling: str = "code",
        ste: str = "selected",
    ):  # fmt: skip
        super().__init__()
        check_heads(shared, top_k, num_heads, router="learned")
        self.num_heads, self.shared, self.top_k, self.scaling, self.ste = num_heads, sorted(shared), top_k, scaling, ste
        self.routed = [head for head in range(num_heads) if head not in set(shared)] if top_k else []
        self.plain = [head for head in range(num_heads) if head not in set(self.routed)]
        soft = scaling != "quantized"
        self.wg = nn.Linear(width, len(self.routed), bias=not soft) if self.routed else None
        self.wg_0 = nn.Linear(width, 2, bias=False) if soft and self.routed and self.shared else None
        self.wg_1 = nn.Linear(width, len(self.shared), bias=False) if soft and len(self.shared) > 1 else None

    def reset_parameters(self) -> None:
        """Zeros: every head weighs the same, and the first `top_k` routed heads are chosen."""
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, hidden: Tensor) -> HeadRouting:
        """hidden `[B, N, width]`, the normalised states that also feed the projections."""
        scores = None if self.wg is None else self.wg(hidden).float()
        if self.scaling == "quantized":
            if scores is None:
                gates = torch.zeros(*hidden.shape[:2], self.num_heads, device=hidden.device)
                gates[..., self.shared] = 1.0
                return HeadRouting(gates, gates.bool(), None, None)
            return quantized(scores, self.top_k, self.shared, self.routed, self.ste if self.training else "selected")
        return self._soft(hidden, scores)

    def _soft(self, hidden: Tensor, scores: Tensor | None) -> HeadRouting:
        code = self.scaling == "code"
        gates = torch.zeros(*hidden.shape[:2], self.num_heads, device=hidden.device)
        heads = torch.zeros_like(gates, dtype=torch.bool)
        stages = None if self.wg_0 is None else self.wg_0(hidden).float().softmax(-1) * (2 if code else 1)
        chosen = prob = None
        if self.shared:
            if self.wg_1 is None:
                share = torch.ones(*hidden.shape[:2], 1, device=hidden.device)
            else:
                share = self.wg_1(hidden).float().softmax(-1) * (len(self.shared) if code else 1)
            gates[..., self.shared] = share if stages is None else share * stages[..., :1]
            heads[..., self.shared] = True
        if scores is not None:
            prob = scores.softmax(-1)
            chosen = choose_top_k(scores, self.top_k)
            kept = prob * chosen
            if code:
                kept = kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).eps) * self.top_k
            gates[..., self.routed] = kept if stages is None else kept * stages[..., 1:]
            heads[..., self.routed] = chosen
        return HeadRouting(gates, heads, chosen, scores)


def quantized(
    scores: Tensor, top_k: int, shared: list[int], routed: list[int], ste: str, *, standardized: bool = False
) -> HeadRouting:
    """Routing in which shared and chosen heads weigh exactly 1, with a straight-through gradient to `prob`.

    scores: `[B, N, E]` over the routed heads; shared and routed: numbers of heads.
    """
    chosen = choose_top_k(scores, top_k)
    heads = torch.ones(*scores.shape[:-1], len(shared) + len(routed), device=scores.device, dtype=torch.bool)
    heads.index_copy_(-1, torch.tensor(routed, device=scores.device), chosen)
    if not (torch.is_grad_enabled() and scores.requires_grad) and ste == "selected":
        return HeadRouting(heads.to(scores.dtype), heads, chosen, scores, standardized, binary=True)
    gates = torch.ones(heads.shape, device=scores.device, dtype=scores.dtype)
    gates[..., routed] = straight_through(chosen.to(scores.dtype), softened(scores, standardized=standardized), ste)
    if ste == "all":
        heads = torch.ones_like(heads)
    return HeadRouting(gates, heads, chosen, scores, standardized)
