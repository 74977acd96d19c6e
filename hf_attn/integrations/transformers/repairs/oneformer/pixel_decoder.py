"""The deformable encoder of OneFormer's pixel decoder: `ms_deform_attn`, dropout in training, checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.oneformer import modeling_oneformer as host

from hf_attn import ops

OPTION = "deformable_attn_implementation"


def backend_of(config: Any) -> str:
    """What `config.deformable_attn_implementation` means: "auto" keeps the host's arithmetic in an eager model."""
    wanted = getattr(config, OPTION, "auto")
    return "grid_sample" if wanted == "auto" and config._attn_implementation == "eager" else wanted


class MendedDeformableAttention(host.OneFormerPixelDecoderEncoderMultiscaleDeformableAttention):
    """The host's layer through the op; sampling locations stay in fp32 whatever the weights are."""

    config: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor | None = None,
        output_attentions: bool = False,
        spatial_shapes_list: list[tuple[int, int]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`[B, S, width]` -> the same and the weights `[B, S, h, L, P]`; reference_points `[B, S, L, 2]`."""
        states = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            value = value.masked_fill(attention_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.n_heads, -1))
        points = (self.n_heads, self.n_levels, self.n_points)
        weights = self.attention_weights(states).unflatten(-1, (self.n_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, points[1:])
        offsets = self.sampling_offsets(states).unflatten(-1, (*points, 2))
        wide = torch.promote_types(offsets.dtype, torch.float32)
        if spatial_shapes_list is None:  # transformers 5.17 has the tensor alone
            spatial_shapes_list = [(int(h), int(w)) for h, w in spatial_shapes.tolist()]
        sizes = torch.tensor([(w, h) for h, w in spatial_shapes_list], dtype=wide, device=offsets.device)
        locations = reference_points[:, :, None, :, None].to(wide) + offsets.to(wide) / sizes[:, None]
        out = ops.ms_deform_attn(value, spatial_shapes_list, locations, weights, backend=backend_of(self.config))
        return self.output_proj(out), weights


class MendedEncoderLayer(GradientCheckpointingLayer, host.OneFormerPixelDecoderEncoderLayer):
    """The host's layer with dropout by `module.training`, not by `config.is_training`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        output_attentions: bool = False,
        spatial_shapes_list: list[tuple[int, int]] | None = None,
    ) -> tuple[Tensor, ...]:
        """`[B, S, width]` -> (the same,) or (the same, weights)."""
        # The host's mask says that no pixel is padding; padding is ignored, as in the official code.
        out, weights = self.self_attn(
            hidden_states,
            encoder_hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            reference_points=reference_points,
            spatial_shapes=spatial_shapes,
            spatial_shapes_list=spatial_shapes_list,
        )
        states = self.self_attn_layer_norm(hidden_states + dropout(out, self.dropout, self.training))
        inner = dropout(self.activation_fn(self.fc1(states)), self.activation_dropout, self.training)
        states = self.final_layer_norm(states + dropout(self.fc2(inner), self.dropout, self.training))
        if states.dtype == torch.float16:
            # A residual that overflows would be infinite from here on.
            limit = torch.finfo(states.dtype).max - 1000
            states = states.clamp(-limit, limit)
        return (states, weights) if output_attentions else (states,)
