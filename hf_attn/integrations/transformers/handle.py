"""From a host cache to the attention function: the cache layer travels as an attribute of the key tensor.

transformers does not hand its cache to attention functions, but the tensors that `Cache.update` returns go straight to
them. A layer whose mechanism has storage of its own returns the new keys with itself attached; everything else of the
host sees ordinary tensors. Whoever attaches a layer must know that our function will take it in the same call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_ATTRIBUTE = "_hf_attn_layer"


def attach(key: Tensor, layer: Any) -> Tensor:
    """The same keys as another tensor object that carries `layer`."""
    carrier = key.view_as(key)
    setattr(carrier, _ATTRIBUTE, layer)
    return carrier


def take(key: Tensor) -> Any | None:
    """The layer `attach` put there, taken off; None for ordinary keys."""
    layer = getattr(key, _ATTRIBUTE, None)
    if layer is not None:
        delattr(key, _ATTRIBUTE)
        layer.taken()
    return layer
