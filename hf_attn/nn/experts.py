"""Experts that are slices of one block: whom a gate chooses, and the blocks built of such experts from scratch.

Union of Experts (arXiv 2503.02495). A dense attention or MLP block is cut along the partition of tensor parallelism;
the sum of all experts is the dense block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from hf_attn import ops
from hf_attn.checks import require_int, require_one_of, require_share

SELECTIONS = ("token_choice", "expert_choice")
SCORE_NORMS = ("token", "batch")
GATE_MODES = ("ste", "none", "sum", "scaled")


@dataclass(frozen=True)
class Routing:
    """What a gate decided.

    Args:
        probabilities: softmax over the experts, `[B, N, n]` fp32.
        chosen: bool `[B, N, n]`, the experts of every token (its `top_k`, all of them for forced tokens).
        selected: bool `[B, N, n]`, the tokens every expert works on; equal to `chosen` under "token_choice".
    """

    probabilities: Tensor
    chosen: Tensor
    selected: Tensor


def route(
    logits: Tensor,
    top_k: int,
    *,
    selection: str = "token_choice",
    capacity: float | None = None,
    score_norm: str = "token",
    score_eps: float = 1.0,
    score_scale: float = 1.0,
    real: Tensor | None = None,
    forced: Tensor | None = None,
    kept: Tensor | None = None,
) -> Routing:
    """Choose experts for tokens, and tokens for experts.

    Args:
        logits: `[B, N, n]` of the gate.
        top_k: experts of a token, 1 to n; ties go to the lower index.
        selection: "token_choice": an expert works on exactly the tokens that chose it, which is causal.
            "expert_choice": on the tokens with the highest score, as many for all rows and experts; looks ahead.
        capacity: under "expert_choice" the share of the N tokens an expert takes, in (0, 1]; None: as many as the most
            wanted expert has. Tokens that did not choose the expert never fill up.
        score_norm: "token": a token's score is relative to its own sum. "batch": relative to the sum over the rows of
            the batch, as in the released language model; results then depend on the other rows.
        score_eps, score_scale: epsilon and kappa of the score.
        real: bool `[B, N]`; other tokens are chosen by nobody.
        forced: bool `[B, N]`, tokens that every expert takes.
        kept: bool `[B, n]`, the experts a whole sequence uses, at least `top_k` of them; the softmax is over these.

    Raises ValueError for values outside of these.
    """
    count = logits.shape[-1]
    require_int("top_k", top_k, 1)
    if top_k > count:
        raise ValueError(f"top_k must be at most the number of experts ({count}), got {top_k}")
    require_one_of("selection", selection, SELECTIONS)
    require_one_of("score_norm", score_norm, SCORE_NORMS)
    if kept is not None:
        logits = logits.masked_fill(~kept[:, None], float("-inf"))
    probabilities = logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    best = probabilities.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, best, True)
    if forced is not None:
        chosen = chosen | forced[..., None]
    if kept is not None:
        chosen = chosen & kept[:, None]
    if real is not None:
        chosen = chosen & real[..., None]
    if selection == "token_choice":
        return Routing(probabilities, chosen, chosen)
    scores = _scores(probabilities.detach() * chosen, score_norm, score_eps, score_scale)
    if capacity is None:
        size = int(chosen.sum(1).max()) if chosen.numel() else 0
    else:
        require_share("capacity", capacity)
        size = int(capacity * logits.shape[1])
    highest = scores.sort(dim=1, descending=True, stable=True).indices[:, :size]
    selected = torch.zeros_like(chosen).scatter_(1, highest, True) & chosen
    return Routing(probabilities, chosen, selected)


def gate_weights(routing: Routing, mode: str = "ste", *, eps: float = 1.0, scale: float = 1.0) -> Tensor:
    """Factors of the experts' outputs, `[B, N, n]`; 0 for tokens an expert does not work on.

    Args:
        mode: "none": 1, the gate gets no gradient. "ste": 1 in the forward pass, the probability's gradient in the
            backward pass. "sum": sigma / (sigma + eps) * scale for all experts of a token, sigma the probabilities of
            its chosen experts. "scaled": probability / sigma times the number of chosen experts.
    """
    require_one_of("gate_mode", mode, GATE_MODES)
    p, on = routing.probabilities, routing.selected
    if mode == "none":
        return on.to(p.dtype)
    if mode == "ste":
        return torch.where(on, 1 + p - p.detach(), 0)
    sigma = (p * routing.chosen).sum(-1, keepdim=True)
    if mode == "sum":
        return torch.where(on, sigma / (sigma + eps) * scale, 0)
    safe = torch.where(sigma > 0, sigma, 1)
    return torch.where(on, routing.chosen.sum(-1, keepdim=True) * p / safe, 0)


def pool_patches(hidden: Tensor, size: int, causal: bool) -> Tensor:
    """What the gate sees of patches of `size` tokens, `[B, ceil(N / size), width]`; a short last patch is its own.

    The first token of a patch under causal attention, else the mean of its tokens.
    """
    require_int("patch_size", size, 1)
    if size == 1:
        return hidden
    if causal:
        return hidden[:, ::size]
    length = hidden.shape[1]
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, -length % size)).unflatten(1, (-1, size))
    counts = torch.full((padded.shape[1], 1), size, device=hidden.device, dtype=hidden.dtype)
    counts[-1] = (length - 1) % size + 1
    return padded.sum(2) / counts


def spread_patches(logits: Tensor, size: int, length: int) -> Tensor:
    """Logits of patches `[B, patches, n]` for each of their tokens, `[B, length, n]`."""
    return logits if size == 1 else logits.repeat_interleave(size, 1)[:, :length]


def _scores(masked: Tensor, norm: str, eps: float, scale: float) -> Tensor:
    if norm == "token":
        return masked / (masked.sum(-1, keepdim=True) + eps) * scale
    return masked / (masked.sum(0, keepdim=True) + eps) * int(scale * masked.shape[0])


class SequenceGate(nn.Module):
    """Which experts a whole sequence uses, by the mean of its tokens (in place of the original's fixed-length input).

    Args:
        width, num_experts: sizes.
        kept: experts of a sequence, 1 to `num_experts`.
    """

    def __init__(self, width: int, num_experts: int, kept: int) -> None:
        super().__init__()
        require_int("expert_selection_top_k", kept, 1)
        if kept > num_experts:
            raise ValueError(f"expert_selection_top_k must be at most num_experts={num_experts}, got {kept}")
        self.gate, self.kept = nn.Linear(width, num_experts), kept

    def forward(self, hidden: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`[B, N, width]` -> bool `[B, n]`, and factors `[B, 1, n]` of the experts: 1, with the probability's gradient.

        Ties go to the lower index. `real` bool `[B, N]`: other tokens count for nothing.
        """
        weights = hidden.new_ones(hidden.shape[:2]) if real is None else real.to(hidden.dtype)
        mean = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        p = self.gate(mean).softmax(-1, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        best = p.detach().sort(dim=-1, descending=True, stable=True).indices[:, : self.kept]
        return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, best, True), (1 + p - p.detach())[:, None]


def _decide(layer: nn.Module, hidden: Tensor, real: Tensor | None) -> tuple[Routing, Tensor]:
    """Routing of a layer with its gate, and the experts' factors `[B, N, n]`."""
    kept, learning = (None, None) if layer.sequence is None else layer.sequence(hidden, real)
    routing = route(layer.gate(hidden), layer.top_k, real=real, kept=kept, **layer.routing)
    eps, scale = (layer.routing.get(name, 1.0) for name in ("score_eps", "score_scale"))
    weights = gate_weights(routing, layer.gate_mode, eps=eps, scale=scale)
    return routing, weights if learning is None or layer.gate_mode == "none" else weights * learning


def _sequence_gate(width: int, num_experts: int, top_k: int, kept: int | None) -> SequenceGate | None:
    if kept is not None and kept < top_k:
        raise ValueError(f"expert_selection_top_k={kept} leaves a token fewer experts than its top_k={top_k}")
    return None if kept is None else SequenceGate(width, num_experts, kept)


class UnionOfMlpExperts(nn.Module):
    """An MLP made of n experts with a gate, each with weights and biases of its own, stacked `[n, in, out]`.

    Args:
        width, hidden: of the whole block; `hidden` is shared out evenly.
        num_experts, top_k: experts, and how many of them a token chooses.
        activation: "gelu" (exact), or "swiglu" with a third matrix.
        expert_selection_top_k: experts a sequence keeps, by the mean of its tokens, before tokens choose among them;
            looks at later tokens. None keeps all.
        gate_mode, selection, capacity, score_norm, score_eps, score_scale: see `route` and `gate_weights`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "gelu",
        expert_selection_top_k: int | None = None,
        gate_mode: str = "none",
        **routing: object,
    ) -> None:
        super().__init__()
        require_int("num_experts", num_experts, 1)
        require_one_of("activation", activation, ("gelu", "swiglu"))
        require_one_of("gate_mode", gate_mode, GATE_MODES)
        if hidden % num_experts:
            raise ValueError(f"hidden={hidden} must be a multiple of num_experts={num_experts}")
        self.top_k, self.activation, self.gate_mode, self.routing = top_k, activation, gate_mode, routing
        part = hidden // num_experts
        self.gate = nn.Linear(width, num_experts)
        self.sequence = _sequence_gate(width, num_experts, top_k, expert_selection_top_k)
        self.w_up, self.b_up = _stack(num_experts, width, part)
        self.w_down, self.b_down = _stack(num_experts, part, width)
        if activation == "swiglu":
            self.w_act, self.b_act = _stack(num_experts, width, part)

    def forward(self, hidden: Tensor, real: Tensor | None = None) -> tuple[Tensor, Routing]:
        """`[B, N, width]` -> the same shape, and the routing; tokens without an expert give 0."""
        routing, weights = _decide(self, hidden, real)
        out = torch.zeros_like(hidden).flatten(0, 1)
        flat, factors = hidden.flatten(0, 1), weights.flatten(0, 1).to(hidden.dtype)
        for expert, tokens in enumerate(routing.selected.flatten(0, 1).unbind(1)):
            index = tokens.nonzero()[:, 0]
            x = flat[index]
            up = x @ self.w_up[expert] + self.b_up[expert]
            inner = silu(x @ self.w_act[expert] + self.b_act[expert]) * up if self.activation == "swiglu" else gelu(up)
            part = inner @ self.w_down[expert] + self.b_down[expert]
            out = out.index_add(0, index, part * factors[index, expert, None])
        return out.view_as(hidden), routing


class SelectiveMultiHeadAttention(nn.Module):
    """Attention made of n one-head experts that attend among the tokens they chose, weights stacked `[n, in, out]`.

    Args:
        width, num_experts, head_dim, top_k: sizes, and experts of a token.
        causal: whether a token sees only tokens up to itself.
        rope_theta: base of half-rotation rotary positions; None for none.
        positions: "original", or "compact": ranks among the chosen tokens, as in the released language model.
        expert_selection_top_k: experts a sequence keeps, by the mean of its tokens, before tokens choose among them;
            needs `causal=False`. None keeps all.
        gate_mode, selection, ...: see `route` and `gate_weights`. "expert_choice" needs `causal=False`.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        head_dim: int,
        top_k: int,
        *,
        causal: bool = True,
        rope_theta: float | None = 10000.0,
        positions: str = "original",
        expert_selection_top_k: int | None = None,
        gate_mode: str = "none",
        **routing: object,
    ) -> None:
        super().__init__()
        require_int("num_experts", num_experts, 1)
        require_one_of("positions", positions, ("original", "compact"))
        require_one_of("gate_mode", gate_mode, GATE_MODES)
        if causal and routing.get("selection", "token_choice") != "token_choice":
            raise ValueError("selection='expert_choice' looks at later tokens; it needs causal=False")
        if causal and expert_selection_top_k is not None:
            raise ValueError("expert_selection_top_k looks at later tokens; it needs causal=False")
        self.top_k, self.causal, self.rope_theta, self.positions = top_k, causal, rope_theta, positions
        self.gate_mode, self.routing = gate_mode, routing
        self.gate = nn.Linear(width, num_experts)
        self.sequence = _sequence_gate(width, num_experts, top_k, expert_selection_top_k)
        self.w_q, self.b_q = _stack(num_experts, width, head_dim)
        self.w_k, self.b_k = _stack(num_experts, width, head_dim)
        self.w_v, self.b_v = _stack(num_experts, width, head_dim)
        self.w_o, self.b_o = _stack(num_experts, head_dim, width)

    def forward(self, hidden: Tensor, real: Tensor | None = None) -> tuple[Tensor, Routing]:
        """`[B, N, width]` -> the same shape, and the routing."""
        routing, weights = _decide(self, hidden, real)
        selected = routing.selected.transpose(1, 2)
        query, key, value = (
            torch.einsum("bnd,edk->benk", hidden, w) + b[None, :, None]
            for w, b in ((self.w_q, self.b_q), (self.w_k, self.b_k), (self.w_v, self.b_v))
        )
        if self.rope_theta is not None:
            if self.positions == "compact":
                places = (selected.long().cumsum(-1) - 1).clamp(min=0)
            else:
                places = torch.arange(hidden.shape[1], device=hidden.device).expand_as(selected)
            query, key = (rotate(t, places, self.rope_theta) for t in (query, key))
        out = ops.selective_attention(query, key, value, selected, causal=self.causal)
        weights = weights.to(hidden.dtype)
        mixed = torch.einsum("benk,ekd,bne->bnd", out, self.w_o, weights)
        return mixed + weights @ self.b_o, routing


def rotate(states: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Half-rotation rotary embedding of `[B, H, N, D]` at positions `[B, H, N]`."""
    half = states.shape[-1] // 2
    rates = theta ** (-torch.arange(half, device=states.device, dtype=torch.float32) / half)
    angle = positions[..., None].float() * rates
    cos, sin = (torch.cat([t, t], -1).to(states.dtype) for t in (angle.cos(), angle.sin()))
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


def _stack(count: int, fan_in: int, fan_out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights `[count, fan_in, fan_out]`, Xavier-normal by expert, and zero biases `[count, fan_out]`."""
    weight = torch.empty(count, fan_in, fan_out)
    for part in weight:
        nn.init.xavier_normal_(part)
    return nn.Parameter(weight), nn.Parameter(torch.zeros(count, fan_out))
