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
    """The last layer asked for has been reached: nothing above it is needed."""


@contextmanager
def captured_scores(
    model: Any, batch: PromptBatch, layers: Sequence[int], *, stop: bool = False
) -> Iterator[dict[int, Tensor]]:
    """Collect `{layer: scores [B, Hq, N]}` of a forward pass of `model` on `batch` inside the `with` block.

    The dict is filled when the block ends. Scores carry gradients of queries and keys; with gradient checkpointing
    only the non-reentrant kind does. With `stop` the pass ends in the highest of `layers`: its attention, its MLP and
    all above never run.
    """
    own = {id(module) for module in model.modules()}
    calls: dict[int, AttentionCall] = {}
    found: dict[int, Tensor] = {}

    def read(mechanism: Mechanism, call: AttentionCall, config: Any) -> None:
        layer = call.layer.index
        if mechanism.name != "blockrank" or layer is None or layer not in layers or id(call.layer.module) not in own:
            return
        calls.setdefault(layer, call)
        if stop and layer == max(layers):
            raise _Scored

    with observe(read):
        try:
            yield found
        except _Scored:
            pass
    # Not inside the layer: a checkpointed layer is computed again without anybody watching, and must do the same.
    documents = batch.candidates.shape[1]
    found.update({layer: head_scores(call, batch.signals, documents) for layer, call in calls.items()})


def first_layer_scores(model: Any, batch: PromptBatch, layers: Sequence[int]) -> dict[int, Tensor]:
    """`captured_scores` of a pass that ends in the highest of `layers`.

    Raises ValueError when that layer does not run blockrank.

    Scores by layer, fp32 `[B, heads, documents]`.
    """
    with captured_scores(model, batch, layers, stop=True) as found:
        model(**batch.model_inputs, use_cache=False)
    if max(layers) not in found:
        raise ValueError(
            f"layer {max(layers)} never ran blockrank: the model has {model.config.num_hidden_layers} layers and uses "
            f"{model.config._attn_implementation!r}"
        )
    return found
