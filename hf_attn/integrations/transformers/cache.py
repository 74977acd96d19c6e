"""Caches of mechanisms that have storage of their own (LServe), as transformers' cache classes, and who makes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig

from hf_attn.caches.store import LayerStore
from hf_attn.integrations.transformers.config import mechanism_of, mechanism_options
from hf_attn.integrations.transformers.handle import attach
from hf_attn.integrations.transformers.masks import COMPACT_OK
from hf_attn.integrations.transformers.own_layer import OwnLayer
from hf_attn.mechanism import MechanismConfig, get_mechanism, parse_config

_MARK = "_hf_attn_wrapped"
# How a store keeps tokens is the cache's own business; what it keeps must be what the model reads.
_FORMAT = ("kv_quant", "zero_dtype", "stats_dtype", "kv_scales")


class StoreLayer(OwnLayer):
    """One layer of a cache, kept by a `LayerStore`.

    `update` returns the new keys with this layer attached when our attention function will read it in the same call,
    else all keys and values. Not for compiled decoding, which needs a StaticCache.

    Args:
        store: the storage.
        reads: whether our attention function runs this layer now.
    """

    is_croppable = True

    def __init__(self, store: LayerStore, reads: Callable[[], bool]) -> None:
        super().__init__(store)
        self.store, self.reads = store, reads
        self.waiting = False
        self.offloaded = False
        self._checked: MechanismConfig | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Check new tokens and hand them on; they are stored by whoever reads the handle."""
        return self.hand_on(key_states, value_states, self.reads())

    def hand_on(self, key_states: Tensor, value_states: Tensor, read: bool) -> tuple[Tensor, Tensor]:
        """`update` by who knows whether our attention function runs."""
        if self.waiting:
            self.waiting = False
            raise RuntimeError(
                "the keys of the last step were never read: config._attn_implementation names an hf_attn mechanism, "
                "but another attention function ran. Set the implementation with model.set_attn_implementation or "
                "hf_attn.apply, and run the prompt again with a new cache"
            )
        self.store.check(key_states, value_states)
        if not read:
            return self.store.dense(key_states, value_states)
        self.waiting = True
        return attach(key_states, self), value_states

    def taken(self) -> None:
        """The handle has been read."""
        self.waiting = False

    def open(self, config: MechanismConfig, layer: int | None, device: torch.device) -> LayerStore:
        """The store, on `device`, for a layer that runs with `config`; ValueError when made for other options."""
        if config is not self._checked:
            self._checked = None
            made_for: Any = config  # whatever has a store has options for it, and the store remembers them
            store: Any = self.store
            wanted, held = asdict(made_for.store_options(layer)), asdict(store.options)
            different = [name for name in wanted if name not in _FORMAT and wanted[name] != held[name]]
            if different:
                name = different[0]
                raise ValueError(
                    f"this cache was made with {name}={held[name]!r}, but the model runs with {wanted[name]!r}; make "
                    "it from model.config after hf_attn.apply"
                )
            self._checked = config
        if self.offloaded:
            self.store.to(device)
        return self.store

    def close(self) -> None:
        """The step of this layer is over."""
        if self.offloaded:
            self.store.to("cpu")

    def reset(self) -> None:
        """As the host's."""
        self.waiting = False
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """See `OwnLayer.crop`."""
        self.waiting = False
        super().crop(tokens_to_remove)

    def take_back(self, count: int) -> None:
        """Undo the newest step, which brought `count` tokens."""
        self.waiting = False
        self.store.take_back(count)

    def offload(self) -> None:
        """As the host's."""
        self.offloaded = True
        if not self.waiting:
            self.store.to("cpu")

    def prefetch(self) -> None:
        """The store moves when it is opened."""


class StoreCache(Cache):
    """A cache of `StoreLayer`s, with transformers' own layers where the mechanism does not run.

    Args:
        config: of the model (its text config is used where it has one).
        options: of the mechanism.
        offloading: keep layers on the CPU between their steps (as transformers' `Cache`; needs CUDA).
    """

    mechanism: str = ""

    def __init__(self, config: PreTrainedConfig, options: MechanismConfig, offloading: bool = False) -> None:
        text = config.get_text_config(decoder=True)
        mechanism = get_mechanism(self.mechanism)
        if mechanism.store is None:
            raise TypeError(f"{self.mechanism!r} keeps everything in the host's cache and has none of its own")
        layers = DynamicCache(config=text).layers
        count, kv_heads = len(layers), getattr(text, "num_key_value_heads", None)

        def reads() -> bool:
            running = mechanism_of(getattr(text, "_attn_implementation", None)) == self.mechanism
            return running and not torch.compiler.is_compiling()

        for index, layer in enumerate(layers):
            own = options.for_layer(index, count)
            if own is not None and type(layer) is DynamicLayer and text.model_type in COMPACT_OK:
                layers[index] = StoreLayer(mechanism.store(own, index, kv_heads), reads)
        self.options = options
        # Whether our attention function runs the current step, asked in its first layer; None before any.
        self._read: bool | None = None
        super().__init__(layers=layers, offloading=offloading)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `Cache.update`; the first layer of a step takes back what a failed step left in other layers."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"this cache was made for {len(self.layers)} layers, but layer {layer_idx} asks for it; make it from "
                "the config of the model that runs"
            )
        if layer_idx == 0:
            length = self.get_seq_length()
            for layer in self.layers:
                ahead = layer.get_seq_length() - length
                if ahead > 0 and isinstance(layer, StoreLayer):
                    layer.take_back(ahead)
                elif ahead > 0:
                    layer.crop(-ahead)
        layer = self.layers[layer_idx]
        if isinstance(layer, StoreLayer) and not self.offloading:
            if layer_idx == 0:
                self._read = layer.reads()
            return layer.hand_on(key_states, value_states, layer.reads() if self._read is None else self._read)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that every layer holds; a step that failed half-way does not count."""
        if layer_idx:
            return super().get_seq_length(layer_idx)
        return min((layer.get_seq_length() for layer in self.layers), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As the host's."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(layer, StoreLayer):
            return self.get_seq_length() + int(query_length), 0
        return super().get_mask_sizes(query_length, layer_idx)

    @property
    def is_croppable(self) -> bool:
        return all(layer.is_croppable for layer in self.layers)

    @property
    def is_initialized(self) -> bool:
        return True


class LServeCache(StoreCache):
    """LServe's cache: retrieval heads in pages with key statistics, streaming heads in sinks and a ring.

    `model.generate` makes one by itself for a model with the mechanism "lserve"; make your own to keep it over several
    turns, or to choose another format: `LServeCache(model.config, kv_quant="int4")`.

    Args:
        config: `model.config`.
        lserve: `LServeConfig`; None takes the options of `config.hf_attn`.
        options: single options that replace those.
    """

    mechanism = "lserve"

    def __init__(
        self,
        config: PreTrainedConfig,
        lserve: MechanismConfig | None = None,
        *,
        offloading: bool = False,
        **options: Any,
    ) -> None:
        text = config.get_text_config(decoder=True)
        known = mechanism_options(text.hf_attn or config.hf_attn, "lserve") if lserve is None else lserve.to_dict()
        _, parsed = parse_config({**known, **options, "mechanism": "lserve"})
        parsed.check_layer_count(text.num_hidden_layers)
        super().__init__(config, parsed, offloading)


CACHES: dict[str, type[StoreCache]] = {"lserve": LServeCache}


def cache_report(cache: Cache) -> dict[str, Any]:
    """What a cache holds and what was read of it, JSON-ready.

    Returns
        bytes: of the retrieval heads' pages in use by part (data, scales, zeros, statistics), of the streaming heads,
            of layers that stay dense, their `total`, and `allocated` (pages are allocated ahead).
        tokens, layers: held.
        pages_held: in use, over layers, rows and retrieval heads. pages_read: by single new tokens since the reset.

    Raises TypeError for a cache without a mechanism of its own.
    """
    if not isinstance(cache, StoreCache):
        raise TypeError(f"cache_report takes a cache of hf_attn such as LServeCache, got {type(cache).__name__}")
    parts: dict[str, int] = {"dense layers": 0}
    held = read = 0
    for layer in cache.layers:
        if isinstance(layer, StoreLayer):
            for name, size in layer.store.bytes().items():
                parts[name] = parts.get(name, 0) + size
            held += getattr(layer.store, "pages_held", 0)
            read += int(getattr(layer.store, "pages_read", 0))
        elif getattr(layer, "keys", None) is not None:
            parts["dense layers"] += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    allocated = parts.pop("allocated", 0) + parts["dense layers"]
    sizes = {**parts, "total": sum(parts.values()), "allocated": allocated}
    return {
        "bytes": sizes,
        "tokens": cache.get_seq_length(),
        "layers": len(cache.layers),
        "pages_held": held,
        "pages_read": read,
    }


# -- automatic creation ------------------------------------------------------------------------------------------------


def install() -> None:
    """Let `generate` make the cache of a mechanism that has one; harmless when repeated.

    Wraps the one method in which `generate` makes its caches, for all models of the process, because a checkpoint whose
    config carries a mechanism passes through no code of ours before it generates. Models without such a mechanism, a
    cache of the user and a named `cache_implementation` go through as before.
    """
    from transformers.generation.utils import GenerationMixin

    original = GenerationMixin._prepare_cache_for_generation
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        name = cache_argument(self)
        given = model_kwargs.get(name)
        if isinstance(given, StoreCache):
            check_cache(self.config, given)
        elif given is None and _wants_own_cache(self, generation_config):
            made = make_cache(self.config)
            if made is not None:
                model_kwargs[name] = made
                if getattr(generation_config, "is_assistant", False):
                    made.activate_past_recording()
                return None
        return original(self, generation_config, model_kwargs, *args, **kwargs)

    setattr(prepare, _MARK, True)
    GenerationMixin._prepare_cache_for_generation = prepare


def cache_argument(model: Any) -> str:
    """The name of the cache in this version's forward (`past_key_values` became `cache`)."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def make_cache(config: PreTrainedConfig) -> StoreCache | None:
    """The cache of the mechanism a model config runs with; None when it has no cache of its own."""
    text = config.get_text_config(decoder=True)
    name = mechanism_of(getattr(text, "_attn_implementation", None))
    if name not in CACHES or text.model_type not in COMPACT_OK:
        return None
    from hf_attn.integrations.transformers.registration import bound_options

    bound = bound_options(text._attn_implementation)
    options = mechanism_options(text.hf_attn or config.hf_attn, name) if bound is None else bound
    return CACHES[name](config, **options)


def check_cache(config: PreTrainedConfig, cache: StoreCache) -> None:
    """Raise ValueError for a cache of a model with another number of layers."""
    count = config.get_text_config(decoder=True).num_hidden_layers
    if len(cache.layers) != count:
        raise ValueError(
            f"this cache was made for {len(cache.layers)} layers, but the model has {count}; make it with "
            f"{type(cache).__name__}(model.config)"
        )


def _wants_own_cache(model: Any, generation_config: Any) -> bool:
    if generation_config.use_cache is False or generation_config.cache_implementation not in (None, "dynamic"):
        return False
    return not model.config.is_encoder_decoder and model._supports_default_dynamic_cache()
