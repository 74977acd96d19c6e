"""The one attention function behind every `hf_attn_<mechanism>` name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.integrations.transformers.config import PREFIX, mechanism_options
from hf_attn.integrations.transformers.continuous import is_continuous, paged_sequences
from hf_attn.integrations.transformers.handle import take
from hf_attn.integrations.transformers.masks import COMPACT_OK, layout_from_mask, mask_kind
from hf_attn.integrations.transformers.packing import check_packing
from hf_attn.integrations.transformers.stats import stats_of
from hf_attn.mechanism import Mechanism, MechanismConfig, get_mechanism, observed, parse_config

# Arguments of a host call that change the result in a way no mechanism can honour.
REFUSED = {
    "softcap": "soft-capping of the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "an additive position bias",
    "indices": "the model's own token selection",
    "block_indices": "the model's own block selection",
}
CROSS_ATTENTION = "cross-attention: queries and keys are different tokens"


@dataclass(frozen=True)
class Resolved:
    """What one layer runs: `config` is `None` for a layer that its `layers` option leaves dense.

    `steps`: a plain causal layer whose mechanism has a `step`.
    """

    mechanism: Mechanism
    config: MechanismConfig | None
    steps: bool = False


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    hf_attn_name: str,
    hf_attn_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers' AttentionInterface calls it.

    Args:
        module: the host's attention module; its `config.hf_attn` holds the options.
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`, positions encoded, cache included.
        attention_mask: what `index_mask` made, or a mask of the user.
        dropout: must be 0.
        is_causal: wins over `module.is_causal`; what a compact mask says wins over both.
        hf_attn_name: the mechanism's name.
        hf_attn_options: options bound by `hf_attn.spec`; `None` reads `config.hf_attn`.

    Returns the output `[B, Nq, Hq, Dv]`, contiguous, and `None`: attention weights are never formed.
    Raises ValueError for what cannot be honoured: dropout, soft-capping, sinks, biases, arbitrary masks of the user,
    and bidirectional layers under a mechanism that needs causal ones. Cross-attention, and layers with a sliding window
    of their own, run dense and are counted.
    """
    # Before anything can fail: a handle that nobody takes is an error of the next step.
    cache = take(key)
    refuse_unsupported(module, hf_attn_name, dropout, kwargs)
    resolved = resolve(module, hf_attn_name, hf_attn_options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache is not None and resolved.steps and attention_mask is None and query.shape[2] == 1:
        out = _step(module, resolved, query, key, value, scale, is_causal, cache, kwargs)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    host = HostLayer(module, hf_attn_name, resolved, scale, kwargs.get("sliding_window"))
    if is_continuous(kwargs):
        return _continuous(host, query, key, value, kwargs), None
    k_len = key.shape[2] + (0 if cache is None else cache.store.slots)
    kind = mask_kind(attention_mask, query.shape[2], k_len)
    if kind in ("causal", "bidirectional", "documents"):
        causal = kind != "bidirectional"
    else:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    cross = is_cross_attention(module, causal, query.shape[2], key.shape[2])
    if cross or getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        refuse_packing(module, hf_attn_name, kwargs)
    tokens = layout_from_mask(attention_mask, query, k_len, kwargs)
    refuse_documents(host, tokens)
    check_packing(module, _owner(module, hf_attn_name), tokens, kwargs.get("position_ids"))
    out = _attend(host, query, key, value, causal, tokens, kind, cache)
    return out.transpose(1, 2).contiguous(), None


def _step(
    module: nn.Module,
    resolved: Resolved,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    is_causal: bool | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The mechanism's `step` `[B, Hq, 1, Dv]`, counted; None where the call must be described in full."""
    step = resolved.mechanism.step
    if step is None or _WATCHERS or observed() or torch.compiler.is_compiling():
        return None
    if any(kwargs.get(name) is not None for name in ("sliding_window", "cu_seq_lens_q", "cu_seq_lens_k")):
        return None
    if is_causal is False or not getattr(module, "is_causal", True) or is_continuous(kwargs):
        return None
    store = cache.open(resolved.config, getattr(module, "layer_idx", None), query.device)
    stats = stats_of(module)
    out = step(query, key, value, scale, store, resolved.config, stats.record)
    if out is not None:
        stats.begin(1, store.slots)
        cache.close()
    return out


@dataclass(frozen=True)
class HostLayer:
    """What stays the same for every call of one attention layer: its module, options, scale and own window."""

    module: nn.Module
    name: str
    resolved: Resolved
    scale: float
    window: int | None


def _attend(
    host: HostLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    tokens: TokenLayout,
    kind: str,
    cache: Any = None,
) -> Tensor:
    """One call of the mechanism, or of dense attention where the layer stays dense: `[B, Hq, Nq, Dv]`, counted.

    `cache`: the cache layer that came with the keys; they are then the new ones alone.
    """
    module, config = host.module, host.resolved.config
    cross = is_cross_attention(module, causal, query.shape[2], key.shape[2])
    reason = CROSS_ATTENTION if cross else dense_reason(module, host.name, host.resolved, tokens, kind, host.window)
    store = None
    if cache is not None and reason is not None:
        key, value = cache.store.dense(key, value)
    elif cache is not None:
        store = cache.open(config, getattr(module, "layer_idx", None), query.device)
    recording = not torch.compiler.is_compiling()
    listener: dict[str, Any] = {}
    if recording:
        stats = stats_of(module)
        stats.begin(query.shape[2], tokens.k_len)
        listener["record"] = stats.record
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        scale=host.scale,
        causal=causal,
        tokens=tokens,
        layer=LayerContext(
            index=getattr(module, "layer_idx", None),
            count=getattr(getattr(module, "config", None), "num_hidden_layers", None),
            module=module,
            cache=store,
            training=module.training,
            **listener,
        ),
    )
    if reason is None and not causal:
        refuse_bidirectional(module, host.resolved.mechanism)
    if recording:
        for watcher in _WATCHERS:
            watcher(call, host.resolved, reason)
    if reason is None and config is not None:
        out = host.resolved.mechanism(call, config)
        if cache is not None:
            cache.close()
        return out
    from hf_attn.ops import dense_attention

    call.layer.record(path="dense", reason=reason)
    return dense_attention(call)


def _continuous(host: HostLayer, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The packed row of a continuous-batching step `[1, total, Hq, Dv]`: every request is a call of its own."""
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    owner = _owner(host.module, host.name)
    window = window_of(host.module, host.window)
    for part in paged_sequences(host.module, owner, query, key, value, kwargs):
        tokens = TokenLayout.full(1, part.query.shape[2], part.key.shape[2])
        if isinstance(window, int):
            last = torch.arange(tokens.k_len - tokens.q_len, tokens.k_len, device=query.device)
            tokens = replace(tokens, window=torch.stack([last - window + 1, last])[None].to(torch.int32))
        part_out = _attend(host, part.query, part.key, part.value, True, tokens, "none")
        out[:, part.rows] = part_out.transpose(1, 2)
    return out


def dense_reason(
    module: nn.Module, name: str, resolved: Resolved, tokens: TokenLayout, kind: str, window: Any
) -> str | None:
    """Why this layer runs dense in this call, or `None`; raises ValueError for a mask of the user."""
    config = getattr(module, "config", None)
    if resolved.config is None:
        return "layers option"
    window = window_of(module, window, tokens)
    if window is not None:
        return f"sliding window {window} of the model"
    if tokens.dense is None:
        return None
    model_type = getattr(config, "model_type", None)
    if kind == "pattern":
        return "mask pattern of the model that is not made of sequences and windows"
    if model_type not in COMPACT_OK:
        return f"dense mask of model type {model_type!r}"
    raise ValueError(
        f"{PREFIX}{name} cannot follow an arbitrary mask, got a 4-D attention_mask {tuple(tokens.dense.shape)} "
        f"{tokens.dense.dtype}. Pass a 2-D attention_mask [batch, tokens] (padding) or position_ids that restart at 0 "
        "(packing), or use attn_implementation='sdpa'."
    )


def window_of(module: nn.Module, window: Any = None, tokens: TokenLayout | None = None) -> int | str | None:
    """The layer's own sliding window in tokens, `None` when it has none.

    Read from the argument of the host call, the mask, or the config's `layer_types`, whichever tells.
    """
    if isinstance(window, int) and window > 0:
        return window
    config = getattr(module, "config", None)
    layer_types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if layer_types and index is not None and index < len(layer_types) and layer_types[index] == "sliding_attention":
        return getattr(config, "sliding_window", None) or "of unknown size"
    if tokens is not None and tokens.window is not None:
        return getattr(config, "sliding_window", None) or "of unknown size"
    return None


def is_cross_attention(module: nn.Module, causal: bool, q_len: int, k_len: int) -> bool:
    """Whether queries and keys are different tokens, so that no position or block of one means anything in the other.

    The host does not say it; the module does (a flag, its class, a decoder's layer that is not causal), or the lengths.
    """
    if getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__:
        return True
    return not causal and (q_len != k_len or bool(getattr(module, "is_decoder", False)))


def refuse_bidirectional(module: nn.Module, mechanism: Mechanism) -> None:
    """Raise ValueError when a mechanism that needs an order of tokens meets a layer without one."""
    if mechanism.capabilities.bidirectional:
        return
    raise ValueError(
        f"{PREFIX}{mechanism.name} needs causal attention, but {type(module).__name__} is not causal. For a multimodal "
        f"model name its text model alone, attn_implementation={{'text_config': '{PREFIX}{mechanism.name}'}}; for an "
        f"encoder use '{PREFIX}moba' or 'sdpa'."
    )


def refuse_documents(host: HostLayer, tokens: TokenLayout) -> None:
    """Raise ValueError for a prompt of documents under a mechanism that would not see its borders."""
    if tokens.roles is None or host.resolved.mechanism.capabilities.documents:
        return
    raise ValueError(
        f"{_owner(host.module, host.name)} cannot follow a mask of documents; use attn_implementation="
        f"'{PREFIX}blockrank' (hf_attn.BlockRanker does)"
    )


def refuse_packing(module: nn.Module, name: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for packed rows where the host hands one `cu_seq_lens` to layers with different tokens."""
    if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None:
        raise ValueError(
            f"{PREFIX}{name} ({type(module).__name__}) does not support packed rows (cu_seq_lens_q) in models with "
            "cross-attention; pass one sequence a row, padded"
        )


def refuse_unsupported(module: nn.Module, name: str, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for a host argument that would have to be ignored."""
    owner = _owner(module, name)
    for argument, what in REFUSED.items():
        if kwargs.get(argument) is not None:
            got = kwargs[argument]
            shown = f"a tensor {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise ValueError(
                f"{owner} does not support {what} ({argument}), got {shown}; only None is allowed. "
                "Use attn_implementation='eager' for this model."
            )
    if dropout:
        raise ValueError(
            f"{owner} has no attention dropout, got dropout={dropout}; only 0 is allowed. Load the model with "
            "attention_dropout=0 (attn_pdrop=0 for GPT-2, attention_probs_dropout_prob=0 for BERT and ViT)."
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{owner} never forms attention weights, got output_attentions=True; use attn_implementation='eager'"
        )


def _owner(module: nn.Module, name: str) -> str:
    """Who refuses or warns, for messages."""
    return f"{PREFIX}{name} ({type(module).__name__})"


# -- options of a layer ------------------------------------------------------------------------------------------------

_RESOLVED: WeakKeyDictionary[nn.Module, tuple[str, dict[str, Any] | None, Resolved]] = WeakKeyDictionary()


def resolve(module: nn.Module, name: str, options: dict[str, Any] | None) -> Resolved:
    """Mechanism and options of this layer, parsed once and again whenever the dict's content changes."""
    config = getattr(module, "config", None)
    given = getattr(config, "hf_attn", None) if options is None else options
    compiling = torch.compiler.is_compiling()
    known = None if compiling else _RESOLVED.get(module)
    if known is not None and known[0] == name and known[1] == given:
        return known[2]
    if options is None:
        options = mechanism_options(given, name)
    index, count = getattr(module, "layer_idx", None), getattr(config, "num_hidden_layers", None)
    if compiling:
        return getattr(_CONSTANTS, _constant(name, options, index, count))
    found = _parse(name, options, index, count)
    plain = not (is_cross_attention(module, True, 1, 1) or getattr(config, "is_encoder_decoder", False))
    steps = found.mechanism.step is not None and found.config is not None and plain and window_of(module) is None
    found = replace(found, steps=steps)
    _RESOLVED[module] = (name, copy.deepcopy(given), found)
    return found


def _parse(name: str, options: dict[str, Any], index: int | None, count: int | None) -> Resolved:
    mechanism, config = parse_config({**options, "mechanism": name})
    return Resolved(mechanism, config.for_layer(index, count))


# What compiled graphs use, by attribute: a compiler can follow a global's attribute, but not parse options itself.
_CONSTANTS = SimpleNamespace()


@torch.compiler.assume_constant_result
def _constant(name: str, options: dict[str, Any], index: int | None, count: int | None) -> str:
    """Attribute of `_CONSTANTS` with the parsed options; a compiler takes it as constant for this content."""
    key = f"{name} {json.dumps(options, sort_keys=True)} {index} {count}"
    known = getattr(_CONSTANTS, key, None)
    if known is None or known.mechanism is not get_mechanism(name):
        setattr(_CONSTANTS, key, _parse(name, options, index, count))
    return key


# -- watching calls ----------------------------------------------------------------------------------------------------

Watcher = Callable[[AttentionCall, Resolved, str | None], None]
_WATCHERS: list[Watcher] = []


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Show every uncompiled call to `watcher(call, resolved, reason it runs dense or None)` for a while."""
    _WATCHERS.append(watcher)
    try:
        yield
    finally:
        _WATCHERS.remove(watcher)
