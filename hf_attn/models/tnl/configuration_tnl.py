"""Config of TransNormerLLM, the published sizes, and the reading of published configs."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.checks import did_you_mean
from hf_attn.models.checkpoint import ThinFileConfig
from hf_attn.models.host import LATER, Filled
from hf_attn.nn.decay import STYLES

_GATES = ("linear", "low_rank_sigmoid")
_NORMS = ("srmsnorm", "layernorm")
_VALUE_ACTIVATIONS = ("none", "silu")


@strict
class TnlConfig(ThinFileConfig, PreTrainedConfig):
    """A decoder of linear attention with a fixed decay a head and layer (arXiv 2405.17381).

    Args:
        intermediate_size: width of the gated channel mixer (`glu_dim`).
        scale_embedding: multiply embeddings by sqrt(hidden_size).
        lrpe_layers: indices of layers with linearised relative positions; the published models have layer 0.
        gate_type: "linear" (TNL, TNL2), or "low_rank_sigmoid" through `gate_dim` features (TNL3).
        v_act: "none" or "silu" on the values.
        attn_norm: "srmsnorm" or "layernorm" of the attention output.
        block_size: tokens whose pairs are computed at a time; changes speed and rounding only.
        slope_style: rule of the decays, see `hf_attn.nn.decay.layer_slopes`.
    """

    model_type = "tnl"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"glu_dim": "intermediate_size"}

    vocab_size: int = 64000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    scale_embedding: bool = True
    lrpe_layers: Filled[list[int]] = LATER
    gate_type: str = "linear"
    gate_dim: int = 16
    v_act: str = "none"
    attn_norm: str = "srmsnorm"
    block_size: int = 64
    slope_style: str = "tnl"
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    thin_module: ClassVar[str] = "hf_attn.models.tnl"
    thin_classes: ClassVar[dict[str, str]] = {"AutoModel": "TnlModel", "AutoModelForCausalLM": "TnlForCausalLM"}

    def __post_init__(self, **kwargs: Any) -> None:
        if self.lrpe_layers is None:
            self.lrpe_layers = [0]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError for fields that do not fit together."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        for name, allowed in (
            ("slope_style", STYLES),
            ("gate_type", _GATES),
            ("attn_norm", _NORMS),
            ("v_act", _VALUE_ACTIVATIONS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(allowed)}")
        outside = [layer for layer in self.lrpe_layers if not 0 <= layer < self.num_hidden_layers]
        if outside:
            raise ValueError(f"lrpe_layers names layer {outside[0]}, but there are {self.num_hidden_layers} layers")
        if self.block_size < 1 or self.gate_dim < 1:
            raise ValueError(f"block_size and gate_dim must be >= 1, got {self.block_size} and {self.gate_dim}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TnlConfig:
        """A published size: 385m, 1b, 2-1b, 2-3b, 7b or 15b; `changes` replace single fields.

        Raises ValueError for an unknown one.
        """
        if name not in PRESETS:
            raise ValueError(
                f"unknown preset {name!r}{did_you_mean(name, list(PRESETS))}; presets: {', '.join(PRESETS)}"
            )
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_published(cls, fields: dict[str, Any]) -> TnlConfig:
        """From the config.json of a published checkpoint (model_type "transnormer").

        Weights need no conversion: the names of parameters are the same. Raises ValueError for what those models can be
        and this class cannot.
        """
        width = fields["decoder_embed_dim"]
        expected = {"hidden_dim": width, "bias": False, "norm_type": "simplermsnorm"}
        for name, value in expected.items():
            if fields.get(name, value) != value:
                raise ValueError(f"published config has {name}={fields[name]!r}; only {value!r} is supported")
        if fields.get("linear_act_fun", "silu") not in ("silu", "swish"):
            raise ValueError(f"linear_act_fun={fields['linear_act_fun']!r} is not supported; only silu (swish) is")
        tokens = {name: fields[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in fields}
        flags = fields.get("linear_use_lrpe_list") or [1]
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=width,
            intermediate_size=fields["glu_dim"],
            num_hidden_layers=fields["decoder_layers"],
            num_attention_heads=fields["decoder_attention_heads"],
            scale_embedding=not fields.get("no_scale_embedding", False),
            lrpe_layers=[index for index, on in enumerate(flags) if on],
            tie_word_embeddings=True,
            **tokens,
        )


def _size(hidden: int, layers: int, heads: int, glu: int, scale: bool = False, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": glu,
        "scale_embedding": scale,
        **others,
    }


PRESETS = {
    "385m": _size(1024, 24, 8, 2816, True),
    "1b": _size(2048, 16, 16, 5632, True),
    "2-1b": _size(2048, 16, 16, 5632),
    "2-3b": _size(2560, 32, 20, 6912),
    "7b": _size(4096, 30, 32, 11008, max_position_embeddings=8192),
    "15b": _size(
        5120,
        42,
        40,
        15360,
        True,
        vocab_size=100280,
        gate_type="low_rank_sigmoid",
        pad_token_id=100262,
        bos_token_id=100261,
        eos_token_id=100257,
    ),
}
