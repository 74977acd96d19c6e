"""NATTEN's names and signatures, computed by `ops.neighborhood_attention`: code written for natten runs unchanged.

`from hf_attn.natten import na2d, NeighborhoodAttention2D` takes the place of the same import from natten (0.20 and
later); the names of releases before 0.17.5 (`natten2dqkrpb`, `na2d_qk`, ...) are here as well. Differences: `rpb=` on
every fused function, any head_dim, fp64, no compiler. Options that choose natten's own kernels (tile shapes, schedules,
`backend="cutlass-fna"`, ...) name nothing here: they are accepted and do nothing, as they never change a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn import ops
from hf_attn.ops.neighborhood import Flags, Sizes
from hf_attn.pattern import BlockPattern

__all__ = [
    "NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D", "attention", "merge_attentions",
    "na1d", "na1d_av", "na1d_qk", "na2d", "na2d_av", "na2d_qk", "na3d", "na3d_av", "na3d_qk",
    "natten1dav", "natten1dqk", "natten1dqkrpb", "natten2dav", "natten2dqk", "natten2dqkrpb", "natten3dav",
    "natten3dqk", "natten3dqkrpb",
]  # fmt: skip

# Options of natten that choose how its kernels run.
_TUNING = frozenset(
    {
        "attention_kwargs", "backend", "q_tile_shape", "kv_tile_shape", "backward_q_tile_shape",
        "backward_kv_tile_shape", "backward_kv_splits", "backward_use_pt_reduction", "run_persistent_kernel",
        "kernel_schedule", "torch_compile", "try_fuse_additional_kv",
    }
)  # fmt: skip


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """1-D neighborhood attention of `[B, L, heads, D]`; see `ops.neighborhood_attention` for all arguments."""
    window = (kernel_size, stride, dilation, is_causal)
    return _fused(1, query, key, value, window, scale, additional_keys, additional_values, rpb, return_lse, tuning)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """2-D neighborhood attention of `[B, height, width, heads, D]`; see `ops.neighborhood_attention`."""
    window = (kernel_size, stride, dilation, is_causal)
    return _fused(2, query, key, value, window, scale, additional_keys, additional_values, rpb, return_lse, tuning)


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """3-D neighborhood attention of `[B, frames, height, width, heads, D]`; see `ops.neighborhood_attention`."""
    window = (kernel_size, stride, dilation, is_causal)
    return _fused(3, query, key, value, window, scale, additional_keys, additional_values, rpb, return_lse, tuning)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Full attention of `[B, N, heads, D]`, heads last; with `return_lse` also lse `[B, N, heads]`. Differentiable.

    Keys may be more or fewer than queries, unless causal. Raises ValueError for shapes that do not fit.
    """
    _check_tuning(tuning)
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(f"query, key and value must be [B, N, heads, D], got query {tuple(query.shape)}")
    if is_causal and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"causal attention needs as many queries as keys, got {query.shape[1]} and {key.shape[1]}; drop is_causal"
        )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if return_lse:
        pattern = BlockPattern.full(block_q=64, block_k=64, q_len=query.shape[2], k_len=key.shape[2])
        out, lse = ops.block_sparse_attention(
            query, key, value, pattern, causal=is_causal, scale=scale, return_lse=True
        )
        return out.transpose(1, 2), lse.transpose(1, 2)
    gqa = query.shape[1] != key.shape[1]
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=gqa
    )
    return out.transpose(1, 2)


def merge_attentions(
    outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = False, **tuning: Any
) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of several attentions; see `ops.merge_attentions`. `torch_compile` does nothing.

    Outputs are `[..., D]`, lse `[...]`.
    """
    return ops.merge_attentions(outputs, lse_tensors)


class _NeighborhoodAttention(nn.Module):
    """qkv projection, neighborhood attention, output projection."""

    rank: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        rel_pos_bias: bool = False,
    ) -> None:
        """Weights as in natten: `qkv` (query, key, value; then heads), `proj`.

        Args:
            embed_dim: channels, a multiple of `num_heads`.
            kernel_size, stride, dilation, is_causal: as in `ops.neighborhood_attention`.
            qk_scale: default `(embed_dim / num_heads) ** -0.5`.
            rel_pos_bias: learn a bias by relative position, parameter `rpb` (as before natten 0.20).
        """
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.kernel_size = _tuple(kernel_size, self.rank)
        self.stride, self.dilation = _tuple(stride, self.rank), _tuple(dilation, self.rank)
        self.is_causal = _tuple(is_causal, self.rank)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, *space, embed_dim]` -> the same shape."""
        if x.dim() != self.rank + 2:
            raise ValueError(
                f"{type(self).__name__} takes [B, {self.rank} axes, {self.embed_dim}], got {tuple(x.shape)}"
            )
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = ops.neighborhood_attention(
            query, key, value, kernel_size=self.kernel_size, stride=self.stride, dilation=self.dilation,
            is_causal=self.is_causal, scale=self.scale, rpb=self.rpb,
        )  # fmt: skip
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}"
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Neighborhood attention layer on `[B, L, C]`."""

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighborhood attention layer on `[B, height, width, C]`."""

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Neighborhood attention layer on `[B, frames, height, width, C]`."""

    rank = 3


# -- names of natten before 0.17.5: heads first ------------------------------------------------------------------------


def na1d_qk(
    query: Tensor, key: Tensor, kernel_size: Sizes, dilation: Sizes = 1, is_causal: Flags = False,
    rpb: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scores `[B, heads, L, K]` of `[B, heads, L, D]`; see `ops.na_qk`."""
    return _qk(1, query, key, kernel_size, dilation, is_causal, rpb)


def na2d_qk(
    query: Tensor, key: Tensor, kernel_size: Sizes, dilation: Sizes = 1, is_causal: Flags = False,
    rpb: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scores `[B, heads, H, W, K0 * K1]`; see `ops.na_qk`."""
    return _qk(2, query, key, kernel_size, dilation, is_causal, rpb)


def na3d_qk(
    query: Tensor, key: Tensor, kernel_size: Sizes, dilation: Sizes = 1, is_causal: Flags = False,
    rpb: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scores `[B, heads, F, H, W, K0 * K1 * K2]`; see `ops.na_qk`."""
    return _qk(3, query, key, kernel_size, dilation, is_causal, rpb)


def na1d_av(attn: Tensor, value: Tensor, kernel_size: Sizes, dilation: Sizes = 1, is_causal: Flags = False) -> Tensor:
    """Weighted values `[B, heads, L, Dv]`; see `ops.na_av`."""
    return _av(1, attn, value, kernel_size, dilation, is_causal)


def na2d_av(attn: Tensor, value: Tensor, kernel_size: Sizes, dilation: Sizes = 1, is_causal: Flags = False) -> Tensor:
    """Weighted values `[B, heads, H, W, Dv]`; see `ops.na_av`."""
    return _av(2, attn, value, kernel_size, dilation, is_causal)


def na3d_av(attn: Tensor, value: Tensor, kernel_size: Sizes, dilation: Sizes = 1, is_causal: Flags = False) -> Tensor:
    """Weighted values `[B, heads, F, H, W, Dv]`; see `ops.na_av`."""
    return _av(3, attn, value, kernel_size, dilation, is_causal)


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int = 1) -> Tensor:
    """`na1d_qk` with a bias by relative position.

    Heads first, as before 0.20: `[B, heads, N, D]` -> `[B, heads, N, K]`, K the slots of a window; rpb as in
    `na1d_qk`.
    """
    return _qk(1, query, key, kernel_size, dilation, False, rpb)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Sizes, dilation: Sizes = 1) -> Tensor:
    """`na2d_qk` with a bias by relative position.

    Heads first, as before 0.20: `[B, heads, H, W, D]` -> `[B, heads, H, W, K]`, K the slots of a window; rpb
    as in `na2d_qk`.
    """
    return _qk(2, query, key, kernel_size, dilation, False, rpb)


def natten3dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Sizes, dilation: Sizes = 1) -> Tensor:
    """`na3d_qk` with a bias by relative position.

    Heads first, as before 0.20: `[B, heads, F, H, W, D]` -> `[B, heads, F, H, W, K]`, K the slots of a window; rpb
    `[heads, 2 K - 1, ...]`.
    """
    return _qk(3, query, key, kernel_size, dilation, False, rpb)


def natten1dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """`na1d_qk`.

    Heads first, as before 0.20: `[B, heads, N, D]` -> `[B, heads, N, K]`, K the slots of a window.
    """
    return _qk(1, query, key, kernel_size, dilation, False, None)


def natten2dqk(query: Tensor, key: Tensor, kernel_size: Sizes, dilation: Sizes = 1) -> Tensor:
    """`na2d_qk`.

    Heads first, as before 0.20: `[B, heads, H, W, D]` -> `[B, heads, H, W, K]`, K the slots of a window.
    """
    return _qk(2, query, key, kernel_size, dilation, False, None)


def natten3dqk(query: Tensor, key: Tensor, kernel_size: Sizes, dilation: Sizes = 1) -> Tensor:
    """`na3d_qk`.

    Heads first, as before 0.20: `[B, heads, F, H, W, D]` -> `[B, heads, F, H, W, K]`, K the slots of a window.
    """
    return _qk(3, query, key, kernel_size, dilation, False, None)


def natten1dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """`na1d_av`.

    Heads first, as before 0.20: `[B, heads, N, K]` weights, values `[B, heads, N, D]` -> `[B, heads, N, D]`.
    """
    return _av(1, attn, value, kernel_size, dilation, False)


def natten2dav(attn: Tensor, value: Tensor, kernel_size: Sizes, dilation: Sizes = 1) -> Tensor:
    """`na2d_av`.

    Heads first, as before 0.20: `[B, heads, H, W, K]` weights, values `[B, heads, H, W, D]` -> `[B, heads, H, W, D]`.
    """
    return _av(2, attn, value, kernel_size, dilation, False)


def natten3dav(attn: Tensor, value: Tensor, kernel_size: Sizes, dilation: Sizes = 1) -> Tensor:
    """`na3d_av`.

    Heads first, as before 0.20: `[B, heads, F, H, W, K]` weights, values `[B, heads, F, H, W, D]` -> `[B, heads, F, H,
    W, D]`.
    """
    return _av(3, attn, value, kernel_size, dilation, False)


# -- shared ------------------------------------------------------------------------------------------------------------


def _fused(
    rank: int, query: Tensor, key: Tensor, value: Tensor, window: tuple, scale: float | None,
    more_keys: Tensor | None, more_values: Tensor | None, rpb: Tensor | None, return_lse: bool, tuning: dict[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    _check_tuning(tuning)
    _check_rank(f"na{rank}d", query, rank, "[B, *space, heads, D]")
    kernel_size, stride, dilation, is_causal = window
    out, lse = ops.neighborhood_attention(
        query, key, value, kernel_size=kernel_size, stride=stride, dilation=dilation,
        is_causal=False if is_causal is None else is_causal, scale=scale, additional_keys=more_keys,
        additional_values=more_values, rpb=rpb, return_lse=True,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _qk(
    rank: int, query: Tensor, key: Tensor, kernel_size: Sizes, dilation: Sizes, is_causal: Flags, rpb: Tensor | None
) -> Tensor:
    _check_rank(f"na{rank}d_qk", query, rank, "[B, heads, *space, D]")
    return ops.na_qk(query, key, kernel_size=kernel_size, dilation=dilation, is_causal=is_causal, rpb=rpb)


def _av(rank: int, attn: Tensor, value: Tensor, kernel_size: Sizes, dilation: Sizes, is_causal: Flags) -> Tensor:
    _check_rank(f"na{rank}d_av", value, rank, "[B, heads, *space, D]")
    return ops.na_av(attn, value, kernel_size=kernel_size, dilation=dilation, is_causal=is_causal)


def _check_rank(name: str, tensor: Tensor, rank: int, layout: str) -> None:
    if tensor.dim() != rank + 3:
        raise ValueError(f"{name} takes {layout} with {rank} axes in space, got shape {tuple(tensor.shape)}")


def _check_tuning(tuning: dict[str, Any]) -> None:
    unknown = sorted(set(tuning) - _TUNING)
    if unknown:
        raise TypeError(f"unexpected argument {unknown[0]!r}; natten's own are {', '.join(sorted(_TUNING))}")


def _tuple(value: Sizes | Flags, rank: int) -> tuple:
    return tuple(value) if isinstance(value, Sequence) else (value,) * rank
