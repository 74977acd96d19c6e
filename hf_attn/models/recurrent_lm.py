"""What language models with a state of their own share: whether a call makes a cache, and logits with their loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

# What transformers calls the cache in outputs and arguments: the name changed in 5.2x.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def wants_cache(decoder: PreTrainedModel, use_cache: bool | None) -> bool:
    """Whether a call without a cache makes one: by default outside training, and never under gradient checkpointing,
    where the second forward would add every token again."""
    wanted = decoder.config.use_cache and not decoder.training if use_cache is None else use_cache
    return bool(wanted) and not (decoder.gradient_checkpointing and decoder.training)


def language_model_output(
    model: PreTrainedModel,
    outputs: Any,
    labels: Tensor | None,
    logits_to_keep: int | Tensor,
    return_dict: bool | None,
    **kwargs: Any,
) -> CausalLMOutputWithPast | tuple:
    """Logits `[B, N, vocab_size]` of `model.lm_head` on the decoder's outputs, and with labels the next-token loss."""
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = model.lm_head(outputs.last_hidden_state[:, kept])
    loss = None
    if labels is not None:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=model.vocab_size, **kwargs)
    output = CausalLMOutputWithPast(
        loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
    )
    return output.to_tuple() if return_dict is False else output
