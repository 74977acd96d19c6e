"""Configs of models with Mixture-of-Head attention: the host's config and the fields of the routers."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config, ViTConfig

from hf_attn.models.checkpoint import ThinFileConfig
from hf_attn.nn.head_router import GRANULARITIES, SCALINGS, STE
from hf_attn.ops.head_routed import check_heads

ROUTERS = ("query_norm", "learned")


@strict
class HeadRouterConfig(ThinFileConfig, PreTrainedConfig):
    """Fields of the head routers.

    Args:
        moh_router: "query_norm" (no weights: the longest queries win) or "learned" (a linear map of the hidden state).
        moh_shared_heads: heads that every token computes: one list, or a list for each layer. None is the first half.
        moh_top_k: heads a token computes of the others: one number, or one for each layer. None is half of them.
        moh_aux_coef: factor on the load-balance loss that training adds.
        moh_router_scaling: gates of the learned router: "code", "paper" (MoH, eq. 5-6) or "quantized" (0 or 1).
        moh_aux_form: load-balance loss with the number of heads as a factor ("code") or without ("paper"). None is
            "code" for gates of the learned router that are weighted, else "paper".
        moh_ste: heads that the gradient of a 0/1 choice goes through, "selected" or "all".
        moh_router_granularity: what is chosen, "head" or "kv_group" (whole groups of the query-norm router; shared
            heads are then whole groups, and `moh_top_k` counts groups).
    """

    moh_router: str = "query_norm"
    moh_shared_heads: list[int] | list[list[int]] | None = None
    moh_top_k: int | list[int] | None = None
    moh_aux_coef: float = 0.01
    moh_router_scaling: str = "code"
    moh_aux_form: str | None = None
    moh_ste: str = "selected"
    moh_router_granularity: str = "head"

    thin_module = "hf_attn.models.moh"


def layer_heads(config: Any) -> list[tuple[list[int], int, int]]:
    """(shared heads, top_k, number of heads) of every layer, in groups with "kv_group"; ValueError names the field."""
    choices = {
        "moh_router": ROUTERS,
        "moh_router_scaling": SCALINGS,
        "moh_aux_form": (None, "code", "paper"),
        "moh_ste": STE,
        "moh_router_granularity": GRANULARITIES,
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(config, name)!r}")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    groups = config.moh_router_granularity == "kv_group"
    if groups and config.moh_router != "query_norm":
        raise ValueError("moh_router_granularity='kv_group' needs moh_router='query_norm', got 'learned'")
    shared, top_k = config.moh_shared_heads, config.moh_top_k
    if shared is None or not shared or not isinstance(shared[0], list):
        shared = [list(range(heads // 2)) if shared is None else shared] * layers
    if not isinstance(top_k, list):
        top_k = [top_k] * layers
    for name, values in (("moh_shared_heads", shared), ("moh_top_k", top_k)):
        if len(values) != layers:
            raise ValueError(f"{name} must have one entry for each of the {layers} layers, got {len(values)}")
    found = []
    for of_layer, k in zip(shared, top_k, strict=True):
        count = heads
        if groups:
            count = getattr(config, "num_key_value_heads", heads)
            of_layer = _whole_groups(of_layer, heads // count)
        k = (count - len(of_layer)) // 2 if k is None else k
        check_heads(of_layer, k, count, router=config.moh_router)
        found.append((sorted(of_layer), k, count))
    return found


def _whole_groups(shared: list[int], size: int) -> list[int]:
    groups = sorted({head // size for head in shared})
    if sorted(shared) != [group * size + member for group in groups for member in range(size)]:
        raise ValueError(
            f"moh_shared_heads must be whole KV groups of {size} heads with moh_router_granularity='kv_group', got "
            f"{shared}"
        )
    return groups


def activated_share(config: Any) -> float:
    """Heads that a token computes, over all heads of all layers."""
    layers = layer_heads(config)
    return sum(len(shared) + top_k for shared, top_k, _ in layers) / sum(count for _, _, count in layers)


@strict
class MoHLlamaConfig(HeadRouterConfig, LlamaConfig):
    """Llama with Mixture-of-Head attention."""

    model_type = "moh_llama"
    thin_classes = {"AutoModel": "MoHLlamaModel", "AutoModelForCausalLM": "MoHLlamaForCausalLM"}


@strict
class MoHQwen2Config(HeadRouterConfig, Qwen2Config):
    """Qwen2 with Mixture-of-Head attention."""

    model_type = "moh_qwen2"
    thin_classes = {"AutoModel": "MoHQwen2Model", "AutoModelForCausalLM": "MoHQwen2ForCausalLM"}


@strict
class MoHQwen3Config(HeadRouterConfig, Qwen3Config):
    """Qwen3 with Mixture-of-Head attention; its router reads the queries before q_norm."""

    model_type = "moh_qwen3"
    thin_classes = {"AutoModel": "MoHQwen3Model", "AutoModelForCausalLM": "MoHQwen3ForCausalLM"}


@strict
class MoHMistralConfig(HeadRouterConfig, MistralConfig):
    """Mistral with Mixture-of-Head attention."""

    model_type = "moh_mistral"
    thin_classes = {"AutoModel": "MoHMistralModel", "AutoModelForCausalLM": "MoHMistralForCausalLM"}


@strict
class MoHViTConfig(HeadRouterConfig, ViTConfig):
    """ViT with Mixture-of-Head attention."""

    model_type = "moh_vit"
    thin_classes = {"AutoModel": "MoHViTModel", "AutoModelForImageClassification": "MoHViTForImageClassification"}
