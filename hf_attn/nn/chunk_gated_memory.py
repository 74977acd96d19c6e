"""The memory layer as titans-pytorch builds it, for weights that were trained there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_attn import ops
from hf_attn.checks import require_int, require_one_of
from hf_attn.nn.neural_memory import rms_norm


class ChunkGatedMemory(nn.Module):
    """Norms, projections and gates around `ops.chunk_gated_memory`; no convolution, no activation on tokens.

    Args:
        hidden_size: D, a multiple of `num_heads`.
        num_heads: memories beside one another.
        chunk_size: tokens whose gradients make one step of the memory.
        depth, expansion: matrices of the memory, and the width between them over that of a head.
        theta_max: largest step size of a token.
        gradient_anchor: tokens between anchors; None takes all gradients at the initial weights.
        gate_granularity: "chunk", the only one; `NeuralMemory` has gates a token.
        loss_reduction, memory_residual_norm: see `ops.chunk_gated_memory`.
        norm_eps: of all RMS norms; there nothing but the rounding unit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        chunk_size: int,
        depth: int = 2,
        expansion: float = 2.0,
        theta_max: float = 0.1,
        gradient_anchor: int | None = None,
        gate_granularity: str = "chunk",
        loss_reduction: str = "mean",
        memory_residual_norm: bool = True,
        norm_eps: float = 2.0**-52,
    ) -> None:
        super().__init__()
        require_int("num_heads", num_heads, 1)
        require_int("depth", depth, 1)
        require_one_of("gate_granularity", gate_granularity, ("chunk",))
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads}")
        width = hidden_size // num_heads
        self.num_heads, self.chunk_size, self.theta_max, self.norm_eps = num_heads, chunk_size, theta_max, norm_eps
        self.options: dict[str, Any] = {
            "chunk_size": chunk_size,
            "gradient_anchor": gradient_anchor,
            "loss_reduction": loss_reduction,
            "memory_residual_norm": memory_residual_norm,
        }
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden_size, hidden_size, bias=False))
        for name in ("theta_proj", "eta_proj", "alpha_proj"):
            setattr(self, name, nn.Linear(hidden_size, num_heads))
        self.gate_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.store_norm = nn.Parameter(torch.ones(hidden_size))
        self.read_norm = nn.Parameter(torch.ones(hidden_size))
        self.q_gamma = nn.Parameter(torch.zeros(num_heads, 1, width))
        self.k_gamma = nn.Parameter(torch.zeros(num_heads, 1, width))
        sizes = [width, *[int(width * expansion)] * (depth - 1), width]
        self.memory = nn.ParameterList(
            torch.randn(num_heads, a, b) / a**0.5 for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.memory_gamma = nn.Parameter(torch.zeros(num_heads, width)) if memory_residual_norm else None

    def forward(self, hidden: Tensor) -> tuple[Tensor, ops.ChunkWeights]:
        """`[B, T, D]` -> `[B, T, D]`, and the weights of all chunks with the last momentum."""
        one = torch.ones((), dtype=hidden.dtype, device=hidden.device)
        stored, asked = (rms_norm(hidden, weight, self.norm_eps) for weight in (self.store_norm, self.read_norm))
        query = rms_norm(self._heads(self.q_proj(asked)), one, self.norm_eps) * (1 + self.q_gamma)
        key = rms_norm(self._heads(self.k_proj(stored)), one, self.norm_eps) * (1 + self.k_gamma)
        theta = self.theta_max * self.theta_proj(stored).sigmoid().transpose(1, 2)
        count = hidden.shape[1] // self.chunk_size
        pooled = stored[:, : count * self.chunk_size].unflatten(1, (count, self.chunk_size)).mean(2)
        eta, alpha = (gate(pooled).sigmoid().transpose(1, 2) for gate in (self.eta_proj, self.alpha_proj))
        weights = [*self.memory, *([] if self.memory_gamma is None else [self.memory_gamma])]
        out, states = ops.chunk_gated_memory(
            query, key, self._heads(self.v_proj(stored)), theta, eta, alpha, weights, **self.options
        )
        gate = self.gate_proj(asked).sigmoid().transpose(1, 2)[..., None]
        return self.o_proj((out * gate).transpose(1, 2).flatten(2)), states

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
