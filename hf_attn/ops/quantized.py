"""quantized_block_attention: block-sparse attention whose products run on 8- or 4-bit codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn.checks import require_int
from hf_attn.ops.backend import autocast, check_qkv, choose_path
from hf_attn.ops.block_sparse import check_pattern
from hf_attn.pattern import BlockPattern

BITS = (None, 4, 8)


def quantized_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    qk_bits: int | None = 8,
    pv_bits: int | None = None,
    q_group: int = 32,
    k_group: int = 64,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Block-sparse attention with symmetric codes in q k^T, P V or both (PAROAttention, arXiv 2506.16054).

    Scales: one for `q_group` rows of the query, `k_group` rows of the key, a block of P, a channel of the value.

    Args:
        query: `[B, Hq, Nq, D]`.
        key, value: `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`; `Hq % Hkv == 0`, `Dv` may differ.
        pattern: blocks of each query block; its blocks are the groups of P.
        qk_bits, pv_bits: 8 (codes -127 to 127), 4 (-7 to 7), or None, not quantised. One of them must be given.
        q_group, k_group: rows that share a scale, >= 1.
        scale: factor on the scores, default `D ** -0.5`.
        key_mask: bool `[B | 1, Nk]`, False hides a key from everybody and from every scale.

    Returns `[B, Hq, Nq, Dv]` in the query's dtype; rows that see no key give 0. Inference only.

    On a CPU with int8 instructions (VNNI) q k^T of codes is an int8 product, and an unquantised P V runs in bf16, also
    for fp32 inputs. `pv_bits` saves no time on a CPU: a scale for every block of P leaves no integer product of a
    useful size, so its codes are multiplied in fp32.

    Raises ValueError for bits, shapes or patterns that do not fit, and for inputs that want gradients.
    """
    for name, bits in (("qk_bits", qk_bits), ("pv_bits", pv_bits)):
        check_bits(name, bits)
    if qk_bits is None and pv_bits is None:
        raise ValueError("qk_bits and pv_bits are both None: use ops.block_sparse_attention, or give 8 or 4")
    require_int("q_group", q_group, 1)
    require_int("k_group", k_group, 1)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError(
            "quantized_block_attention is for inference only, but query, key or value requires a gradient; use "
            "torch.no_grad(), or ops.block_sparse_attention for training"
        )
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    path = choose_path("quantized_block_attention", query, query.shape[3], value.shape[3])
    check_pattern(pattern, query, key)
    if key_mask is not None and (
        key_mask.dtype != torch.bool or key_mask.dim() != 2 or key_mask.shape[0] not in (1, key.shape[0])
        or key_mask.shape[1] != key.shape[2]
    ):  # fmt: skip
        raise ValueError(
            f"key_mask must be bool [{key.shape[0]} or 1, {key.shape[2]}], got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    indices = pattern.indices.to(query.device)
    options = (pattern.block_q, pattern.block_k, q_group, k_group, qk_bits, pv_bits, scale)
    return _form(path)(query, key, value, indices, key_mask, *options)


def check_bits(name: str, bits: Any) -> None:
    """Raise ValueError unless `bits` is None, 4 or 8."""
    if bits is not None and (isinstance(bits, bool) or bits not in BITS):
        raise ValueError(f"{name} must be None, 4 or 8, got {bits!r}")


def _form(path: str) -> Callable[..., Tensor]:
    if path == "triton":
        from hf_attn.ops.hfattn_sparse.quantized import triton_op

        return triton_op.quantized_block_attention
    from hf_attn.ops.hfattn_sparse.quantized import op

    return op.run_reference if path == "reference" else op.quantized_block_attention
