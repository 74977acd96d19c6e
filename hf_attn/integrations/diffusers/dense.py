"""Dense attention of a site as diffusers itself would run it: its own mask, the user's backend."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PREFIX = "hf_attn"


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, backend: Any = None
) -> Tensor:
    """Plain attention `[B, H, S, D]`.

    Args:
        mask: the host's mask, passed on as it is.
        backend: the backend the user set on this module; default the process-wide one.
    """
    if backend is None or is_ours(backend):
        backend = _AttentionBackendRegistry.get_active_backend()[0]
    if is_ours(backend) or backend == AttentionBackendName.NATIVE:
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None]
        gqa = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return dispatch_attention_fn(query, key, value, attn_mask=mask, scale=scale, backend=backend).transpose(1, 2)


def is_ours(backend: Any) -> bool:
    """Whether a backend is one of this package."""
    value = getattr(backend, "value", backend)
    return isinstance(value, str) and value.startswith(PREFIX)
