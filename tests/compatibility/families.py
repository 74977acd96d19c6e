"""Rows of the compatibility table: tiny random models of every family, one builder each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 99
IMAGE_TOKEN = 98
VISION_START = 96
IMAGE_SLOTS = slice(5, 9)  # four image tokens in every prompt of a multimodal model

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
ALTERNATING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
}

ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "dropout_rate")
OTHER_DROPOUT = ("dropout", "hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "activation_dropout",
                 "hidden_dropout", "embedding_dropout", "mlp_dropout", "encoder_layerdrop", "decoder_layerdrop",
                 "layerdrop")  # fmt: skip

Inputs = Callable[[Tensor], dict[str, Any]]


def only_tokens(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        name: what the row is called.
        make: `() -> (model class, config)`, sizes so small that a cell takes milliseconds.
        layers: attention modules that must call our function in one forward.
        inputs: the inputs of a whole prompt, from its token ids `[B, N]` (models without tokens make their own).
        targets: sub-configs that get the mechanism; `None` for a plain string, which goes to all of them.
        reference: what transformers compares with: "sdpa", or "eager" where it refuses SDPA.
        bidirectional: has layers that are not causal, so that moba's `decode="moba"` is not allowed.
    """

    name: str
    make: Callable[[], tuple[type[PreTrainedModel], PreTrainedConfig]]
    layers: int = 2
    inputs: Inputs = only_tokens
    targets: tuple[str, ...] | None = None
    reference: str = "sdpa"
    bidirectional: bool = False

    def __str__(self) -> str:
        return self.name.replace(" ", "_")

    @property
    def multimodal(self) -> bool:
        return "pixel_values" in self.inputs(torch.zeros(1, 14, dtype=torch.long)) and self.inputs is not image

    def called(self, text_only: bool) -> int:
        """Attention modules that must call our function."""
        return 2 if text_only and self.multimodal else self.layers

    def implementation(self, name: str) -> str | dict[str, str]:
        return name if self.targets is None else {"": self.reference, **dict.fromkeys(self.targets, name)}

    def build(self, implementation: str | dict[str, str], dropout: float = 0.0) -> PreTrainedModel:
        """The model in eval mode; the same weights every time, spread so that a wrong mask shows."""
        cls, config = self.make()
        for part in [config, *(getattr(config, name) for name in config.sub_configs)]:
            for option in ATTENTION_DROPOUT + OTHER_DROPOUT:
                if hasattr(part, option):
                    setattr(part, option, dropout if option in ATTENTION_DROPOUT else 0.0)
        torch.manual_seed(0)
        model = cls._from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.6 if "embed" in name else 0.25)
        if model.can_generate():
            model.generation_config.eos_token_id = None
        return model


@dataclass(frozen=True)
class Host:
    """What transformers itself offers for a model: a cell is "not a mode" only where this says so."""

    arguments: frozenset[str]
    generates: bool
    checkpoints: bool
    tokens: str = field(default="input_ids")

    @classmethod
    def of(cls, model: PreTrainedModel) -> Host:
        arguments = frozenset(inspect.signature(type(model).forward).parameters)
        tokens = "decoder_input_ids" if "decoder_input_ids" in arguments else "input_ids"
        return cls(arguments, model.can_generate(), bool(model.supports_gradient_checkpointing), tokens)

    def _decoder(self, name: str) -> str | None:
        found = [key for key in (f"decoder_{name}", name) if key in self.arguments]
        if self.tokens == "decoder_input_ids":
            found = [key for key in found if key.startswith("decoder_")]
        return found[0] if found else None

    @property
    def mask(self) -> str | None:
        """Name of the padding mask of the tokens."""
        return self._decoder("attention_mask")

    @property
    def positions(self) -> str | None:
        return self._decoder("position_ids")

    @property
    def cache(self) -> str | None:
        return next((key for key in ("cache", "past_key_values") if key in self.arguments), None)


def text(kind: str, head: str = "ForCausalLM", **options: Any):
    """Builder of a text model: `kind` is the prefix of its classes."""

    def make():
        config = getattr(transformers, f"{kind}Config")(**options)
        return getattr(transformers, kind.removesuffix("Text") + head), config

    return make


def sized(kind: str, head: str, **options: Any):
    """As `text`, for a config class whose name is the whole prefix of the model class."""

    def make():
        return getattr(transformers, kind + head), getattr(transformers, f"{kind}Config")(**options)

    return make


def encoder_tokens(ids: Tensor) -> dict[str, Any]:
    """A source of unequal lengths for the encoder, and the tokens for the decoder."""
    source = (ids * 7 + 3) % (VOCAB - 3) + 3
    mask = torch.ones_like(source)
    mask[0, -2:] = 0
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": ids}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def speech(ids: Tensor) -> dict[str, Any]:
    return {"input_features": noise(ids.shape[0], 8, 24), "decoder_input_ids": ids}


def image(ids: Tensor) -> dict[str, Any]:
    return {"pixel_values": noise(ids.shape[0], 3, 16, 16)}


def _with_image(ids: Tensor) -> Tensor:
    ids = ids.clone()
    ids[:, IMAGE_SLOTS] = IMAGE_TOKEN
    return ids


def llava_inputs(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": _with_image(ids), "pixel_values": noise(ids.shape[0], 3, 8, 8)}


def gemma3_inputs(ids: Tensor) -> dict[str, Any]:
    ids = _with_image(ids)
    return {**image(ids), "input_ids": ids, "token_type_ids": (ids == IMAGE_TOKEN).long()}


def qwen2_vl_inputs(ids: Tensor) -> dict[str, Any]:
    ids = _with_image(ids)
    ids[:, IMAGE_SLOTS.start - 1] = VISION_START  # generate counts the images of a row by it
    return {
        "input_ids": ids,
        "pixel_values": noise(16 * ids.shape[0], 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * ids.shape[0]),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
    }


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GROUPED).to_dict(),
        vision_config=transformers.CLIPVisionConfig(**{**IMAGES, "image_size": 8}).to_dict(),
        image_token_index=IMAGE_TOKEN,
    )
    return transformers.LlavaForConditionalGeneration, config


def gemma3_vl():
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**GROUPED, **ALTERNATING, query_pre_attn_scalar=8).to_dict(),
        vision_config=transformers.SiglipVisionConfig(**IMAGES).to_dict(),
        mm_tokens_per_image=4,
        image_token_id=IMAGE_TOKEN,
        boi_token_id=96,
        eoi_token_id=97,
    )
    return transformers.Gemma3ForConditionalGeneration, config


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=97,
        vision_start_token_id=VISION_START,
        vision_end_token_id=95,
    )
    return transformers.Qwen2VLForConditionalGeneration, config


MLA = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
ONLY_TEXT, EVERYWHERE = ("text_config",), None

FAMILIES = [
    Family("Llama", text("Llama", **GROUPED)),
    Family("Qwen2", text("Qwen2", **GROUPED)),
    Family("Qwen3", text("Qwen3", **GROUPED)),
    Family("Mistral", text("Mistral", **GROUPED, sliding_window=None)),
    Family("Mistral, sliding window", text("Mistral", **GROUPED, sliding_window=4)),
    Family("Phi-3", text("Phi3", **GROUPED)),
    Family("Gemma 2", text("Gemma2", **GROUPED, sliding_window=4, query_pre_attn_scalar=8), reference="eager"),
    Family("Gemma 3 text", text("Gemma3Text", **GROUPED, **ALTERNATING, query_pre_attn_scalar=8)),
    Family(
        "GPT-OSS",
        text("GptOss", **GROUPED, sliding_window=4, num_local_experts=2, num_experts_per_tok=1),
        reference="eager",
    ),
    Family("DeepSeek-V3 (MLA)", text("DeepseekV3", **TEXT, num_key_value_heads=4, **MLA)),
    Family("GPT-2", text("GPT2", "LMHeadModel", **GPT2, eos_token_id=None, pad_token_id=0)),
    Family(
        "GPT-2 with cross-attention",
        text("GPT2", "LMHeadModel", **GPT2, eos_token_id=None, pad_token_id=0, add_cross_attention=True),
        layers=4,
        inputs=lambda ids: {"input_ids": ids, "encoder_hidden_states": noise(ids.shape[0], 6, 32)},
    ),
    Family("OPT", text("OPT", **{**TEXT, "word_embed_proj_dim": 32, "ffn_dim": 48})),
    Family("GPT-NeoX", text("GPTNeoX", **TEXT)),
    Family("BERT", text("Bert", "ForMaskedLM", **TEXT), bidirectional=True),
    Family(
        "ModernBERT",
        text(
            "ModernBert",
            "ForMaskedLM",
            **TEXT,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=8,
            layer_types=["full_attention", "sliding_attention"],
        ),
        bidirectional=True,
    ),
    Family("ViT", text("ViT", "ForImageClassification", **IMAGES), inputs=image, bidirectional=True),
    Family(
        "CLIP text",
        sized("CLIPText", "ModelWithProjection", **{**TEXT, "projection_dim": 16, "eos_token_id": 2}),
    ),
    Family(
        "CLIP vision",
        sized("CLIPVision", "ModelWithProjection", **IMAGES, projection_dim=16),
        inputs=image,
        bidirectional=True,
    ),
    Family(
        "T5",
        text("T5", "ForConditionalGeneration", **T5, decoder_start_token_id=1),
        layers=6,
        inputs=encoder_tokens,
        bidirectional=True,
    ),
    Family(
        "BART",
        text("Bart", "ForConditionalGeneration", **SEQ2SEQ, max_position_embeddings=64, forced_eos_token_id=None),
        layers=6,
        inputs=encoder_tokens,
        bidirectional=True,
    ),
    Family(
        "Whisper",
        text(
            "Whisper",
            "ForConditionalGeneration",
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=64,
            begin_suppress_tokens=None,
        ),
        layers=6,
        inputs=speech,
        bidirectional=True,
    ),
    Family("LLaVA, text model", llava, inputs=llava_inputs, targets=ONLY_TEXT),
    Family("LLaVA, plain string", llava, layers=4, inputs=llava_inputs, targets=EVERYWHERE, bidirectional=True),
    Family("Gemma 3, text model", gemma3_vl, inputs=gemma3_inputs, targets=ONLY_TEXT),
    Family("Gemma 3, plain string", gemma3_vl, layers=4, inputs=gemma3_inputs, bidirectional=True),
    Family("Qwen2-VL, text model", qwen2_vl, inputs=qwen2_vl_inputs, targets=ONLY_TEXT),
    Family("Qwen2-VL, plain string", qwen2_vl, layers=4, inputs=qwen2_vl_inputs, bidirectional=True),
]
