"""Continuous batching (`generate_batch`): one explicit switch, and the reader of its packed rows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_attn.integrations.transformers.config import mechanism_of

_ARGUMENTS = ("read_index", "write_index", "block_table")
_MARK = "_hf_attn_wrapped"


def enable_continuous_batching() -> None:
    """Let transformers' `generate_batch` and its continuous-batching server run `hf_attn_<mechanism>` models.

    transformers has a closed list of implementations for it. This wraps the one method that checks the list, for all
    models of the process; implementations of others go through it as before. Harmless when repeated.
    """
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    original = ContinuousBatchingManager.switch_to_cb_friendly_attn
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def switch(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if mechanism_of(model.config.get_text_config()._attn_implementation) is None:
            original(self, model, *args, **kwargs)

    setattr(switch, _MARK, True)
    ContinuousBatchingManager.switch_to_cb_friendly_attn = switch


def is_enabled() -> bool:
    """Whether `enable_continuous_batching` was called in this process."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    return getattr(ContinuousBatchingManager.switch_to_cb_friendly_attn, _MARK, False)


def is_continuous(kwargs: dict[str, Any]) -> bool:
    """Whether a host call comes from continuous batching. Its attention mask then means nothing."""
    return any(kwargs.get(name) is not None for name in _ARGUMENTS)


class PagedSequence(NamedTuple):
    """One request's part of a step: `rows` of the packed query, `[1, Hq, q, D]`, are the last of its `k` keys."""

    rows: slice
    query: Tensor
    key: Tensor
    value: Tensor


def paged_sequences(
    module: nn.Module, owner: str, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> Iterator[PagedSequence]:
    """The requests of a packed row, each with everything its part of the paged cache holds.

    Args:
        owner: who refuses, for messages.
        query, key, value: `[1, H, total, D]`.
        kwargs: the host's arguments, with cu_seq_lens_q, cu_seq_lens_k and, where the model does not write the cache
            itself (as in 5.20), the cache.

    Raises ValueError when continuous batching was not enabled, or for a cache layout that only FlashAttention reads.
    """
    if not is_enabled():
        raise ValueError(
            f"{owner} runs continuous batching only after hf_attn.enable_continuous_batching(); call it before "
            "generate_batch, or use generate"
        )
    if kwargs.get("block_table") is not None:
        raise ValueError(
            f"{owner} does not read block tables (got block_table=), which belong to FlashAttention; pass "
            "ContinuousBatchingConfig(use_block_table=False) or leave the option out"
        )
    if kwargs.get("cache") is not None:
        kwargs = dict(kwargs)
        key, value = _write_cache(module, key, value, kwargs)
    ends_q, ends_k = kwargs["cu_seq_lens_q"].tolist(), _of_layer(module, kwargs["cu_seq_lens_k"]).tolist()
    for i in range(len(ends_q) - 1):
        q, k = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        if q.stop > q.start:
            yield PagedSequence(q, query[:, :, q], key[:, :, k], value[:, :, k])


def _write_cache(module: nn.Module, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Store new keys and values, and read all of the step's requests `[1, Hkv, total, D]`; updates `kwargs`."""
    cache = kwargs["cache"]
    options = {"key_states": key, "value_states": value, "layer_idx": module.layer_idx}
    if "kwargs" in inspect.signature(cache.update).parameters:
        return cache.update(**options, kwargs=kwargs)
    # transformers < 5.20: no heads-first layout yet, and lengths stay by layer type.
    rows = cache.update(**options, read_index=kwargs["read_index"], write_index=kwargs["write_index"])
    key, value = (tensor.transpose(0, 1)[None] for tensor in rows)
    return key, value


def _of_layer(module: nn.Module, lengths: Tensor | dict[str, Tensor]) -> Tensor:
    if isinstance(lengths, Tensor):
        return lengths
    if len(lengths) == 1:
        return next(iter(lengths.values()))
    return lengths[module.config.layer_types[module.layer_idx]]
