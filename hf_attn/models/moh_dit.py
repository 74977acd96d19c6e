"""DiT with Mixture-of-Head attention (MoH, arXiv 2410.11842, section 4.2): a model of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from hf_attn.nn.head_router import HeadRouting, LearnedRouter, load_balance
from hf_attn.ops import head_routed_attention

# (heads, shared heads, top_k) of every layer of the published models.
VARIANTS = {
    "XL/2-90": [(8, 8, 0)] * 9 + [(16, 16, 0)] * 10 + [(24, 16, 3)] * 9,
    "XL/2-75": [(8, 8, 0)] * 9 + [(16, 10, 2)] * 10 + [(24, 14, 2)] * 9,
    "L/2-90": [(8, 8, 0)] * 8 + [(16, 16, 0)] * 8 + [(24, 16, 3)] * 8,
    "L/2-75": [(8, 8, 0)] * 8 + [(16, 8, 4)] * 8 + [(24, 12, 4)] * 8,
    "B/2-90": [(12, 6, 4)] * 5 + [(12, 7, 4)] * 5 + [(12, 12, 0)] * 2,
    "B/2-75": [(12, 4, 2)] * 2 + [(12, 6, 3)] * 8 + [(12, 12, 0)] * 2,
    "S/2-90": [(6, 3, 2)] * 8 + [(6, 6, 0)] * 4,
    "S/2-75": [(6, 2, 1)] * 2 + [(6, 3, 1)] * 4 + [(6, 3, 2)] * 4 + [(6, 6, 0)] * 2,
}


class MoHDiTProcessor:
    """Self-attention whose heads a learned router gates; heads that a token did not choose are not computed.

    `routing` holds what the router said last, for the load-balance loss.
    """

    routing: HeadRouting | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states `[B, N, d]`; raises ValueError for masks and cross-attention."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("MoH-DiT has self-attention without a mask; got encoder_hidden_states or attention_mask")
        routing = self.routing = attn.router(hidden_states)
        maps = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (m(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for m in maps)
        heads = routing.heads.transpose(1, 2)
        out = head_routed_attention(query, key, value, heads, causal=False, scale=attn.scale).transpose(1, 2)
        out = (out * routing.gates[..., None].to(out.dtype)).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class MoHDiTTransformer2DModel(DiTTransformer2DModel):
    """DiT with a head router in every block; loads in `DiTPipeline` after `import hf_attn`.

    Args (besides those of `DiTTransformer2DModel`):
        moh_layers: (heads, shared heads, top_k) of every layer, as in `VARIANTS`; the first heads are shared. Head
            counts may differ between layers, at the same head size.
        moh_router_scaling: gates: "code", "paper" or "quantized", see `LearnedRouter`.

    Raises ValueError for values that do not fit, naming the field.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        moh_layers: list[list[int]] | None = None,
        moh_router_scaling: str = "code",
        hf_attn_conversion: dict[str, Any] | None = None,
    ):
        super().__init__(
            num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim, in_channels=in_channels,
            out_channels=out_channels, num_layers=num_layers, dropout=dropout, norm_num_groups=norm_num_groups,
            attention_bias=attention_bias, sample_size=sample_size, patch_size=patch_size, activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm, upcast_attention=upcast_attention, norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine, norm_eps=norm_eps,
        )  # fmt: skip
        layers = [[num_attention_heads, num_attention_heads, 0]] * num_layers if moh_layers is None else moh_layers
        if len(layers) != num_layers:
            raise ValueError(f"moh_layers must have one entry for each of the {num_layers} layers, got {len(layers)}")
        width = num_attention_heads * attention_head_dim
        for block, (heads, shared, top_k) in zip(self.transformer_blocks, layers, strict=True):
            if heads != num_attention_heads:
                block.attn1 = Attention(
                    query_dim=width, heads=heads, dim_head=attention_head_dim, dropout=dropout, bias=attention_bias
                )
            block.attn1.router = LearnedRouter(width, heads, list(range(shared)), top_k, scaling=moh_router_scaling)
            block.attn1.set_processor(MoHDiTProcessor())

    @property
    def activated_heads(self) -> float:
        """Share of the heads that a token computes."""
        return activated_share(self.config.moh_layers or [[1, 1, 0]])

    def load_balance_loss(self, form: str = "code") -> Tensor:
        """Mean load-balance loss of the last forward over the layers with routed heads; 0 without such layers.

        A scalar.
        """
        found = [block.attn1.processor.routing for block in self.transformer_blocks]
        terms = [load_balance(x.prob, x.chosen, form=form) for x in found if x is not None and x.prob is not None]
        return torch.stack(terms).mean() if terms else torch.zeros((), device=self.device)


def activated_share(layers: Any) -> float:
    """Computed heads over all heads, of a list of (heads, shared heads, top_k)."""
    return sum(shared + top_k for _, shared, top_k in layers) / sum(heads for heads, _, _ in layers)


# DiffusionPipeline writes a class's module into model_index.json and looks it up there when it loads.
MoHDiTTransformer2DModel.__module__ = "hf_attn"
