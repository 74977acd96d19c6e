"""Config of the hybrid stack, and the sizes of the paper."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config

from hf_attn.models.moba import configuration_moba


@strict
class MobaHybridConfig(configuration_moba.KeyConvolutionConfig, Qwen2Config):
    """A decoder whose layers 1, 3, 5, ... (from 1) have a sliding window and rotary positions, the others neither.

    `attn_implementation="hf_attn_moba"` with `hf_attn={...}` runs MoBA in the layers without a window; any other
    implementation runs them dense.

    Args:
        sliding_window: tokens a windowed layer sees, its own included.
        layer_types: "sliding_attention" or "full_attention" by layer; `None` alternates, beginning with a window.
        global_positions: whether layers without a window get rotary positions too; the paper's have none.
        kconv_width: taps of the key convolution in the layers without a window, odd; 0 for none.
        kconv_layers: its layers; `None` for all without a window.
    """

    model_type = "moba_hybrid"
    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    use_sliding_window: bool = True
    sliding_window: int | None = 256
    global_positions: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    kconv_width: int = 0

    thin_module: ClassVar[str] = "hf_attn.models.moba_hybrid"
    thin_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "MobaHybridModel",
        "AutoModelForCausalLM": "MobaHybridForCausalLM",
    }

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            count = self.num_hidden_layers
            self.layer_types: list[str] = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.kconv_layers is None:
            self.kconv_layers = [i for i, kind in enumerate(self.layer_types) if kind == "full_attention"]
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MobaHybridConfig:
        """The paper's sizes: "340m" or "1b", with B=128 and k=8 (arXiv 2511.11571, section 5.1).

        `changes` replace single fields; `hf_attn=None` makes the dense counterpart.

        Raises ValueError for an unknown one.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
        mechanism = {"mechanism": "moba", "block_size": 128, "top_k": 8, "decode": "moba"}
        return cls(**{**PRESETS[name], "hf_attn": mechanism, **changes})


PRESETS = {
    "340m": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16},
    # 1.6 billion parameters without embeddings: the name is the paper's label.
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32},
}
