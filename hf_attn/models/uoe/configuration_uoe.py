"""Configs of the families made of experts: the host's config and the fields of the gates."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from hf_attn.models.checkpoint import ThinFileConfig
from hf_attn.nn.experts import GATE_MODES


@strict
class UoeConfig(ThinFileConfig, PreTrainedConfig):
    """Fields of a union of experts. A block without `top_k` stays dense.

    Args:
        uoe_attn_experts: experts of an attention block, a divisor of the KV heads; None: one a KV head. With
            `uoe_kv_shared` a divisor of the query heads and a multiple of the KV heads; None: one a query head.
        uoe_attn_top_k: experts of a token in attention blocks, 1 to all; None leaves attention dense.
        uoe_mlp_experts: experts of an MLP block, a divisor of intermediate_size.
        uoe_mlp_top_k: experts of a token in MLP blocks; None leaves MLPs dense.
        uoe_layers: indices of the layers that are cut; None for all.
        uoe_patch_size: neighbouring tokens routed together, by the first of them; above 1 only without a cache.
        uoe_gate_mode: "ste", "none", "sum" or "scaled", see `hf_attn.nn.experts.gate_weights`.
        uoe_score_eps, uoe_score_scale: epsilon and kappa of the "sum" gate.
        uoe_always_select_first: first real tokens of a sequence that every expert takes (attention sinks).
        uoe_kv_shared: let the experts of one KV head share its keys and values, which are kept for the tokens of any.
        uoe_gate_bias: whether gates have a bias.
        uoe_balance: factor of the load-balance loss in the loss of the language model.
    """

    uoe_attn_experts: int | None = None
    uoe_attn_top_k: int | None = None
    uoe_mlp_experts: int = 4
    uoe_mlp_top_k: int | None = None
    uoe_layers: list[int] | None = None
    uoe_patch_size: int = 1
    uoe_gate_mode: str = "ste"
    uoe_score_eps: float = 1.0
    uoe_score_scale: float = 1.0
    uoe_always_select_first: int = 1
    uoe_kv_shared: bool = False
    uoe_gate_bias: bool = True
    uoe_balance: float = 0.01

    thin_module = "hf_attn.models.uoe"

    def attention_experts(self) -> int:
        """Experts of an attention block."""
        if self.uoe_attn_experts is not None:
            return self.uoe_attn_experts
        return self.num_attention_heads if self.uoe_kv_shared else self.num_key_value_heads

    def check_experts(self) -> None:
        """Raise ValueError for numbers that do not divide the block, and for unknown modes."""
        heads, experts, queries = self.num_key_value_heads, self.attention_experts(), self.num_attention_heads
        if not isinstance(self.uoe_kv_shared, bool):
            raise ValueError(f"uoe_kv_shared must be True or False, got {self.uoe_kv_shared!r}")
        if self.uoe_kv_shared:
            if experts < 1 or queries % experts or experts % heads:
                raise ValueError(
                    f"uoe_attn_experts must divide the {queries} query heads and be a multiple of the {heads} KV heads "
                    f"that they share (uoe_kv_shared), got {experts}"
                )
        elif experts < 1 or heads % experts:
            hint = "; kv_shared=True lets experts share a KV head" if experts > heads else ""
            raise ValueError(f"uoe_attn_experts must divide the {heads} KV heads, got {experts}{hint}")
        if self.uoe_mlp_experts < 1 or self.intermediate_size % self.uoe_mlp_experts:
            raise ValueError(
                f"uoe_mlp_experts must divide intermediate_size={self.intermediate_size}, got {self.uoe_mlp_experts}"
            )
        for name, top_k, count in (
            ("uoe_attn_top_k", self.uoe_attn_top_k, experts),
            ("uoe_mlp_top_k", self.uoe_mlp_top_k, self.uoe_mlp_experts),
        ):
            if top_k is not None and not 1 <= top_k <= count:
                raise ValueError(f"{name} must be 1 to {count}, the number of experts, or None (dense), got {top_k}")
        if self.uoe_attn_top_k is None and self.uoe_mlp_top_k is None:
            raise ValueError("nothing is cut: give attn_top_k (attention), mlp_top_k (MLPs), or both")
        if self.uoe_patch_size < 1 or self.uoe_always_select_first < 0:
            raise ValueError(
                f"uoe_patch_size must be >= 1 and uoe_always_select_first >= 0, got {self.uoe_patch_size} and "
                f"{self.uoe_always_select_first}"
            )
        if self.uoe_gate_mode not in GATE_MODES:
            raise ValueError(f"uoe_gate_mode must be one of {', '.join(GATE_MODES)}, got {self.uoe_gate_mode!r}")
        for index in self.uoe_layers or ():
            if not 0 <= index < self.num_hidden_layers:
                raise ValueError(f"uoe_layers names layer {index}, but there are {self.num_hidden_layers} layers")
        if getattr(self, "sliding_window", None) is not None and getattr(self, "use_sliding_window", True):
            raise ValueError(
                f"experts attend among all their tokens, but sliding_window={self.sliding_window}; convert with "
                "sliding_window=None if the model is used below that length"
            )


def _classes(host: str) -> dict[str, Any]:
    return {"AutoModel": f"Uoe{host}Model", "AutoModelForCausalLM": f"Uoe{host}ForCausalLM"}


@strict
class UoeLlamaConfig(UoeConfig, LlamaConfig):
    """Llama as a union of experts."""

    model_type = "uoe_llama"
    thin_classes = _classes("Llama")


@strict
class UoeQwen2Config(UoeConfig, Qwen2Config):
    """Qwen2 as a union of experts."""

    model_type = "uoe_qwen2"
    thin_classes = _classes("Qwen2")


@strict
class UoeQwen3Config(UoeConfig, Qwen3Config):
    """Qwen3 as a union of experts."""

    model_type = "uoe_qwen3"
    thin_classes = _classes("Qwen3")


@strict
class UoeMistralConfig(UoeConfig, MistralConfig):
    """Mistral as a union of experts."""

    model_type = "uoe_mistral"
    thin_classes = _classes("Mistral")
