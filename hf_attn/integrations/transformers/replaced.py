"""A model that runs another mechanism for a while: for calibration and analysis, which must leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hf_attn import mechanism as registry
from hf_attn.integrations.transformers import registration
from hf_attn.integrations.transformers.config import target_config, target_names
from hf_attn.integrations.transformers.model import implementations, refuse_config, refuse_model
from hf_attn.integrations.transformers.stats import separate_stats
from hf_attn.mechanism import Mechanism


@contextmanager
def replaced_attention(model: PreTrainedModel, mechanism: Mechanism) -> Iterator[None]:
    """Let the attention layers of `model` run `mechanism` (default options) inside the `with` block, in eval mode.

    Afterwards implementation, `config.hf_attn`, statistics and training mode are what they were, and the mechanism's
    name is free again. Layers with a sliding window of their own run dense and do not reach the mechanism. Raises
    ValueError for models that would ignore a mechanism or that no mechanism can serve, as `hf_attn.apply`.
    """
    registration.check_name(mechanism.name)
    registry.register_mechanism(mechanism)
    training, before = model.training, implementations(model.config)
    try:
        refuse_model(model, mechanism.name)
        targets = target_names(model.config, model.config.hf_attn or {})
        for target in targets:
            refuse_config(target_config(model.config, target), mechanism.name)
        with separate_stats():
            # A name with options of its own: config.hf_attn may belong to another mechanism.
            model.set_attn_implementation(dict.fromkeys(targets, registration.spec(mechanism.name)))
            model.eval()
            yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)
        registration.unregister(mechanism.name)
        registry.unregister_mechanism(mechanism.name)


@torch.no_grad()
def run_rows(model: PreTrainedModel, rows: Tensor, batch_size: int) -> None:
    """Run the model without its head and without a cache over `rows` int64 `[n, length]`, `batch_size` at a time."""
    for batch in rows.split(batch_size):
        model.base_model(input_ids=batch.to(model.device), use_cache=False)
