"""Reading the scores of documents out of a model's forward pass, all of it or its first layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hf_attn.call import AttentionCall
from hf_attn.mechanism import Mechanism, observe
from hf_attn.mechanisms.blockrank import head_scores
from hf_attn.models.blockrank.prompt import PromptBatch


class _Scored(Exception):
    """The last layer asked for has its scores: nothing above it is needed."""


@contextmanager
def captured_scores(model: Any, batch: PromptBatch, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect `{layer: scores [B, Hq, N]}` of forward passes of `model` on `batch` inside the `with` block.

    Scores carry gradients of queries and keys, and need a layer that runs the mechanism.
    """
    yield from _capture(model, batch, layers, stop=False)


def first_layer_scores(model: Any, batch: PromptBatch, layers: Sequence[int]) -> dict[int, Tensor]:
    """The same from a forward pass that ends in the highest of `layers`: its values, MLP and all above never run."""
    with contextmanager(_capture)(model, batch, layers, stop=True) as found:
        try:
            model(**batch.model_inputs, use_cache=False)
        except _Scored:
            return found
    raise ValueError(
        f"layer {max(layers)} never ran blockrank: the model has {model.config.num_hidden_layers} layers and uses "
        f"{model.config._attn_implementation!r}"
    )


def _capture(model: Any, batch: PromptBatch, layers: Sequence[int], stop: bool) -> Iterator[dict[int, Tensor]]:
    own = {id(module) for module in model.modules()}
    documents = batch.candidates.shape[1]
    found: dict[int, Tensor] = {}

    def read(mechanism: Mechanism, call: AttentionCall, config: Any) -> None:
        layer = call.layer.index
        if mechanism.name != "blockrank" or layer not in layers or id(call.layer.module) not in own:
            return
        found[layer] = head_scores(call, batch.signals, documents)
        if stop and layer == max(layers):
            raise _Scored

    with observe(read):
        yield found
