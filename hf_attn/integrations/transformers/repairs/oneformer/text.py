"""OneFormer's text tower: the causal mask that the host builds and never passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.oneformer import modeling_oneformer as host

OPTION = "text_attention"
CHOICES = ("causal", "bidirectional")


class MendedTextLayer(host.OneFormerTextTransformerLayer):
    """The host's pre-norm layer, causal as the official code is, or bidirectional as transformers' is."""

    config: Any

    def forward(self, hidden_states: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """`[N, B, width]` -> the same."""
        states = self.layer_norm1(hidden_states)
        causal = getattr(self.config, OPTION, "causal") == "causal"
        out, _ = self.self_attn(states, states, states, key_padding_mask=key_padding_mask, is_causal=causal)
        hidden_states = hidden_states + out
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class MendedTextMapper(host.OneFormerTextMapper):
    """The host's mapper, which needs no text to predict."""

    def forward(self, inputs: Tensor | None) -> Tensor | None:
        """Token ids `[B, num_text, length]` -> `[B, num_text + contexts, hidden]`; None without text."""
        if inputs is None:
            return None
        longest = self.text_encoder.context_length
        if inputs.dim() not in (2, 3) or inputs.shape[-1] != longest or inputs.is_floating_point():
            raise ValueError(
                f"text_inputs must be token ids [batch, texts, {longest}] (config.text_encoder_context_length), got "
                f"{inputs.dtype} {tuple(inputs.shape)}; OneFormerProcessor makes them"
            )
        return self.encode_text(inputs)
