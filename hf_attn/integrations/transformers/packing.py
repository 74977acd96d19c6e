"""Packing that the host dropped: position ids still restart, but the mask no longer says so."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn.call import TokenLayout


def check_packing(module: nn.Module, owner: str, tokens: TokenLayout, position_ids: Any) -> None:
    """Raise ValueError in training, warn otherwise, when tokens of one sequence restart at position 0.

    transformers recognises packed rows by their `position_ids`, but not together with a cache or an attention mask.
    Looks once per forward (first layer), and only where the model hands its position ids over.
    """
    if torch.compiler.is_compiling() or getattr(module, "layer_idx", None) not in (0, None):
        return
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return
    if not tokens.q_len == tokens.k_len == position_ids.shape[1] or tokens.dense is not None:
        return
    restarts = position_ids[:, 1:] == 0
    if tokens.index is not None:
        segments = tokens.index[:, 0, : tokens.q_len]
        restarts = restarts & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
    if not bool(restarts.any()):
        return
    told = (
        f"{owner}: position_ids restart, so the row holds several packed sequences, but transformers dropped their "
        "borders and every sequence sees the ones before it. Pass use_cache=False and no attention_mask (recipes: "
        "hf_attn.training.packing.keep_packing(trainer)), or cu_seq_lens_q and cu_seq_lens_k."
    )
    if module.training:
        raise ValueError(told)
    warnings.warn(told, stacklevel=2)
