"""Tiny random models and an exact test mechanism: these tests are about the seam, not about a real mechanism."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_attn import Mechanism, MechanismConfig
from hf_attn.call import AttentionCall

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
# What differs from SIZES, by model type. Window 4 with alternating layers where the family has them.
EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": None, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0},
    "mistral": {"sliding_window": None},
    "cohere2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "moba_hybrid": {"sliding_window": 4, "kconv_width": 3},
    "moba_mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "starcoder2": {"sliding_window": None},
    "smollm3": {"use_sliding_window": False},
}


@dataclass
class ExactConfig(MechanismConfig):
    """Options without effect, to follow them through configs."""

    block_size: int = 4
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be >= 1, got {self.block_size}")
        super().__post_init__()


def exact_attention(call: AttentionCall, config: ExactConfig) -> torch.Tensor:
    """Dense attention from the TokenLayout alone; rows without a key give 0."""
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (call.key, call.value))
    visible = call.tokens.visible(call.causal, call.query.device)
    scores = (call.query @ key.transpose(2, 3)).float() * call.scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)
    pairs = visible.sum(dtype=torch.float32) * call.query.shape[1]
    call.layer.record(path="exact", computed=pairs / 2, visible=pairs)
    return weights.to(value.dtype) @ value


EXACT = Mechanism(
    name="exact",
    summary="dense attention for tests",
    source="none",
    config=ExactConfig,
    attend=exact_attention,
    describe=lambda config, q_len, k_len: {"density": 0.25, "block": config.block_size},
)


def build(model_type: str, implementation: str = "sdpa", seed: int = 0, **options: Any):
    """A tiny random model of a type, in eval mode; the same seed gives the same weights."""
    extra = {k: v for k, v in {**SIZES, **EXTRA.get(model_type, {}), **options}.items()}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **extra)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    # Tiny default inits make every output nearly equal; spread them so that a wrong mask shows.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.25 if "embed" not in name else 0.6)
    return model


def pair(model_type: str, **options: Any):
    """The same model twice: SDPA (eager where transformers refuses it) and hf_attn_exact."""
    dense = build(model_type, "eager" if model_type == "gemma2" else "sdpa", **options)
    ours = build(model_type, "hf_attn_exact", **options)
    ours.load_state_dict(dense.state_dict())
    return dense, ours


def cache_argument(model, cache) -> dict[str, Any]:
    """The cache under the name this version's forward has for it (`past_key_values` became `cache` in 5.2x)."""
    names = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: torch.Tensor, want: torch.Tensor, where: torch.Tensor | None = None) -> None:
    """Equal up to float32 rounding, at the positions `where` (bool `[B, N]`)."""
    if where is not None:
        got, want = got[where], want[where]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
