"""Config of Titans."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.checks import did_you_mean
from hf_attn.models.checkpoint import ThinFileConfig

VARIANTS = ("mag", "mac", "mal", "lmm")


@strict
class TitansConfig(ThinFileConfig, PreTrainedConfig):
    """A decoder whose layers hold a memory that is trained while the sequence is read (arXiv 2501.00663).

    Args:
        variant: how memory and attention meet: "mag" (memory as gate), "mac" (as context), "mal" (as a layer before
            attention) or "lmm" (memory alone).
        memory_depth: matrices of each memory, >= 1; 1 is linear.
        memory_expansion: width between them over the width of a memory head.
        memory_inner_size: that width itself; overrides `memory_expansion`.
        memory_num_heads: memories a layer; default one for 64 channels.
        memory_chunk_size: tokens whose inner gradients are taken at the same weights; 1 is exact.
        theta_max: largest inner step; keep theta_max * memory_chunk_size <= 16.
        max_inner_grad_norm: longer inner gradients of tokens are scaled down to it; off by default.
        num_persistent_tokens: learned vectors in front of the sequence in every layer; "lmm" has none.
        segment_size: tokens of a segment of "mac".
        window: tokens that the attention of "mag" and "mal" sees, the token itself included.
        conv_kernel: taps of the memory's convolutions; 0 for none.
        freeze_memory: read the memory, write nothing.
    """

    model_type = "titans"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    variant: str = "mag"
    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    memory_depth: int = 2
    memory_expansion: float = 4.0
    memory_inner_size: int | None = None
    memory_num_heads: int | None = None
    memory_chunk_size: int = 64
    theta_max: float = 0.1
    max_inner_grad_norm: float | None = None
    num_persistent_tokens: int = 4
    segment_size: int = 128
    window: int = 512
    conv_kernel: int = 4
    freeze_memory: bool = False
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    thin_module: ClassVar[str] = "hf_attn.models.titans"
    thin_classes: ClassVar[dict[str, str]] = {"AutoModel": "TitansModel", "AutoModelForCausalLM": "TitansForCausalLM"}

    def __post_init__(self, **kwargs: Any) -> None:
        # Not a `validate_...` method: those are wrapped in an error that is no ValueError.
        if self.memory_num_heads is None:
            self.memory_num_heads = max(self.hidden_size // 64, 1)
        if self.memory_inner_size is None:
            self.memory_inner_size = int(self.hidden_size // max(self.memory_num_heads, 1) * self.memory_expansion)
        super().__post_init__(**kwargs)
        self.check_architecture()

    def check_architecture(self) -> None:
        """Raise ValueError for fields that do not fit together."""
        if self.variant not in VARIANTS:
            raise ValueError(
                f"variant={self.variant!r} is unknown{did_you_mean(self.variant, list(VARIANTS))}; allowed: "
                f"{', '.join(VARIANTS)}"
            )
        for name in ("memory_depth", "memory_num_heads", "memory_inner_size", "memory_chunk_size", "segment_size"):
            _at_least(name, getattr(self, name), 1)
        _at_least("window", self.window, 1)
        _at_least("num_persistent_tokens", self.num_persistent_tokens, 0)
        _at_least("conv_kernel", self.conv_kernel, 0)
        if not self.theta_max > 0:
            raise ValueError(f"theta_max must be positive, got {self.theta_max}")
        for name in ("memory_num_heads", "num_attention_heads"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of {name}={getattr(self, name)}")
        if self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"rotary positions need an even head size, got {self.hidden_size} / {self.num_attention_heads}"
            )
        if self.variant == "mac" and self.segment_size < self.memory_chunk_size:
            raise ValueError(
                f"segment_size={self.segment_size} must be at least memory_chunk_size={self.memory_chunk_size}: chunks "
                "restart with every segment"
            )


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
