"""The long-term memory layer of Titans: projections, convolutions and gates around `ops.neural_memory`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from hf_attn import ops
from hf_attn.checks import require_int
from hf_attn.nn.ragged import causal_convolution, real, tail

# What a layer carries from call to call: tensors with the batch first, and counts.
State = dict[str, Any]


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden / sqrt(mean(hidden^2) + eps) * weight over the last dimension, in fp32 (fp64 in fp64).

    hidden `[..., d]`, weight `[d]` or as wide; returns `[..., d]`.
    """
    exact = hidden.float() if hidden.dtype != torch.float64 else hidden
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype) * weight


class NeuralMemory(nn.Module):
    """A memory that learns while it reads (Titans, arXiv 2501.00663, section 3.1); usable on any `[B, T, D]`.

    Queries, keys and values are SiLU of a causal depthwise convolution of a projection; queries and keys have length 1
    a head. Step size, momentum and forgetting are sigmoids of the token. What is read is normalised a head, gated with
    SiLU of another projection, and projected.

    Args:
        hidden_size: D, a multiple of `num_heads`.
        num_heads: memories beside one another; default one for 64 channels.
        depth: matrices of each memory, >= 1; 1 is a linear memory.
        inner_size: width between them; default 4 D / num_heads.
        chunk_size: tokens whose gradients are taken at the same weights; 1 is exact and slow.
        conv_kernel: taps of the convolutions; 0 for none.
        theta_max: largest step. A chunk's steps add up: above 16 / chunk_size training tends to diverge.
        norm_eps: of the norm of what is read.
        max_inner_grad_norm: see `ops.neural_memory`.
    """

    # What the gates begin with: small steps, half the momentum, little forgetting.
    biases = {"theta": -2.0, "eta": 0.0, "alpha": -4.0}

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        *,
        depth: int = 2,
        inner_size: int | None = None,
        chunk_size: int = 64,
        conv_kernel: int = 4,
        theta_max: float = 0.1,
        norm_eps: float = 1e-6,
        max_inner_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        heads = max(hidden_size // 64, 1) if num_heads is None else num_heads
        require_int("num_heads", heads, 1)
        if hidden_size % heads:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_heads={heads}")
        require_int("depth", depth, 1)
        require_int("chunk_size", chunk_size, 1)
        require_int("conv_kernel", conv_kernel, 0)
        if theta_max * chunk_size > 16:
            warnings.warn(
                f"theta_max={theta_max} with chunk_size={chunk_size}: the steps of a chunk add up to as much as "
                f"{theta_max * chunk_size:.0f} and may diverge; keep the product at or below 16",
                stacklevel=2,
            )
        width = hidden_size // heads
        inner = 4 * width if inner_size is None else inner_size
        self.num_heads, self.depth, self.chunk_size, self.conv_kernel = heads, depth, chunk_size, conv_kernel
        self.theta_max, self.norm_eps, self.max_inner_grad_norm = theta_max, norm_eps, max_inner_grad_norm
        for name in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden_size, hidden_size, bias=False))
        for name in ("q_conv", "k_conv", "v_conv") if conv_kernel else ():
            setattr(self, name, nn.Parameter(torch.empty(hidden_size, conv_kernel)))
        for name in self.biases:
            setattr(self, f"{name}_proj", nn.Linear(hidden_size, heads))
        sizes = [width, *[inner] * (depth - 1), width]
        self.memory = nn.ParameterList(torch.empty(heads, a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.norm = nn.Parameter(torch.ones(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W_0 from N(0, 1 / fan_in), gates from `biases`, convolutions around the mean of their taps.

        Keys begin with the projection of the queries: what is written for a token is found by that token from the first
        step on. With two random projections training first has to align them, which takes longer than all the rest.
        """
        for weight in self.memory:
            weight.normal_(0, weight.shape[1] ** -0.5)
        for name in ("q_conv", "k_conv", "v_conv") if self.conv_kernel else ():
            getattr(self, name).uniform_(0, 2 / self.conv_kernel)
        self.k_proj.weight.copy_(self.q_proj.weight)
        for name, bias in self.biases.items():
            getattr(self, f"{name}_proj").bias.fill_(bias)
        self.norm.fill_(1)

    def forward(
        self, hidden: Tensor, state: State | None = None, lengths: Tensor | None = None, *, frozen: bool = False
    ) -> tuple[Tensor, State]:
        """Reads and writes `[B, T, D]` (already normed), and what the next call needs.

        Args:
            state: what the call before returned, or None to begin.
            lengths: int64 `[B]`, real tokens of each row, which stand first; default all.
            frozen: read only.
        """
        state = state or {}
        query, q_tail = self.query(hidden, state.get("q_tail"), lengths)
        out, new = self.write_and_read(hidden, query, state, lengths, frozen=frozen)
        return self.out(out, hidden), {**new, "q_tail": q_tail}

    def query(self, stream: Tensor, past: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`[B, H, T, d]` of length 1, and the end of the stream for the next call."""
        query, rest = self._convolved("q", stream, past, lengths)
        return _unit(query), rest

    def write_and_read(
        self, stream: Tensor, query: Tensor, state: State, lengths: Tensor | None, *, frozen: bool = False
    ) -> tuple[Tensor, State]:
        """Writes `stream` `[B, T, D]`, reads `query` `[B, H, T, d]` after each of its tokens; and the new state."""
        key, k_tail = self._convolved("k", stream, state.get("k_tail"), lengths)
        value, v_tail = self._convolved("v", stream, state.get("v_tail"), lengths)
        new = {**state, "k_tail": k_tail, "v_tail": v_tail}
        if frozen:
            return ops.read_memory(query, self.weights(state)), new
        theta, eta, alpha = (self._gate(name, stream) for name in self.biases)
        out, states = ops.neural_memory(
            query,
            _unit(key),
            value,
            self.theta_max * theta,
            eta,
            alpha,
            self.weights(state),
            momentum=self._held(state, "momentum"),
            chunk_start_weights=self._held(state, "chunk_start_weights"),
            chunk_offset=state.get("written", 0),
            chunk_size=self.chunk_size,
            mask=real(lengths, stream.shape[1]),
            output_final_state=True,
            max_inner_grad_norm=self.max_inner_grad_norm,
        )
        for kind in ("weights", "momentum", "chunk_start_weights"):
            new |= {f"{kind}.{layer}": t for layer, t in enumerate(getattr(states, kind))}
        return out, {**new, "written": states.chunk_offset}

    def out(self, read: Tensor, stream: Tensor) -> Tensor:
        """What was read `[B, H, T, d]`, normed, gated by `stream` `[B, T, D]`, and projected."""
        read = rms_norm(read, self.norm, self.norm_eps).transpose(1, 2).flatten(2)
        return self.o_proj(read.to(stream.dtype) * silu(self.g_proj(stream)))

    def weights(self, state: State) -> list[Tensor]:
        """The memory as it is: W_0 `[H, in, out]` at the beginning, `[B, H, in, out]` later."""
        return self._held(state, "weights") or list(self.memory)

    def _held(self, state: State, kind: str) -> list[Tensor] | None:
        return [state[f"{kind}.{layer}"] for layer in range(self.depth)] if f"{kind}.0" in state else None

    def _convolved(
        self, name: str, stream: Tensor, past: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        projected, rest = getattr(self, f"{name}_proj")(stream), None
        mixed = projected
        if self.conv_kernel:
            mixed = causal_convolution(projected, getattr(self, f"{name}_conv"), past)
            rest = tail(None if past is None else past.to(projected.dtype), projected, lengths, self.conv_kernel - 1)
        return silu(mixed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2), rest

    def _gate(self, name: str, stream: Tensor) -> Tensor:
        """`[B, H, T]`, in fp32 or wider."""
        logits = getattr(self, f"{name}_proj")(stream)
        return (logits.float() if logits.dtype != torch.float64 else logits).sigmoid().transpose(1, 2)


def _unit(heads: Tensor) -> Tensor:
    """Rows divided by their length, in fp32: half precision loses the small ones."""
    exact = heads.float() if heads.dtype != torch.float64 else heads
    return normalize(exact, dim=-1, eps=1e-12)
