"""Model families with weights of their own, and the conversions to them. Importing this imports none of them."""

from __future__ import annotations

import importlib

from hf_attn.importing import when_imported
from hf_attn.integrations.transformers.auto import Family, register

_DINAT = "hf_attn.models.dinat"
_LANDMARK = "hf_attn.models.landmark"
_MOBA = "hf_attn.models.moba"
_MOH = "hf_attn.models.moh"
_TITANS_BRANCH = "hf_attn.models.titans_branch"
_UOE = "hf_attn.models.uoe"


def _vision(model_type: str, name: str) -> Family:
    """A vision backbone: its classes are named after one word."""
    heads = (("AutoModelForImageClassification", f"{name}ForImageClassification"), ("AutoBackbone", f"{name}Backbone"))
    return Family(
        model_type,
        f"hf_attn.models.{model_type}",
        f"{name}Config",
        f"{name}Model",
        heads=heads,
        image_processor="ConvNextImageProcessor",
    )


# What AutoModel and AutoModelForCausalLM find after `import hf_attn`; each module exports the three classes by name.
FAMILIES = (
    Family(
        "landmark_llama",
        _LANDMARK,
        "LandmarkLlamaConfig",
        "LandmarkLlamaModel",
        "LandmarkLlamaForCausalLM",
    ),
    Family(
        "landmark_qwen2",
        _LANDMARK,
        "LandmarkQwen2Config",
        "LandmarkQwen2Model",
        "LandmarkQwen2ForCausalLM",
    ),
    Family(
        "landmark_qwen3",
        _LANDMARK,
        "LandmarkQwen3Config",
        "LandmarkQwen3Model",
        "LandmarkQwen3ForCausalLM",
    ),
    Family(
        "landmark_mistral",
        _LANDMARK,
        "LandmarkMistralConfig",
        "LandmarkMistralModel",
        "LandmarkMistralForCausalLM",
    ),
    Family("moba_llama", _MOBA, "MobaLlamaConfig", "MobaLlamaModel", "MobaLlamaForCausalLM"),
    Family("moba_qwen2", _MOBA, "MobaQwen2Config", "MobaQwen2Model", "MobaQwen2ForCausalLM"),
    Family("moba_qwen3", _MOBA, "MobaQwen3Config", "MobaQwen3Model", "MobaQwen3ForCausalLM"),
    Family("moba_mistral", _MOBA, "MobaMistralConfig", "MobaMistralModel", "MobaMistralForCausalLM"),
    Family("moba_hybrid", "hf_attn.models.moba_hybrid", "MobaHybridConfig", "MobaHybridModel", "MobaHybridForCausalLM"),
    Family("uoe_llama", _UOE, "UoeLlamaConfig", "UoeLlamaModel", "UoeLlamaForCausalLM"),
    Family("uoe_qwen2", _UOE, "UoeQwen2Config", "UoeQwen2Model", "UoeQwen2ForCausalLM"),
    Family("uoe_qwen3", _UOE, "UoeQwen3Config", "UoeQwen3Model", "UoeQwen3ForCausalLM"),
    Family("uoe_mistral", _UOE, "UoeMistralConfig", "UoeMistralModel", "UoeMistralForCausalLM"),
    Family("tnl", "hf_attn.models.tnl", "TnlConfig", "TnlModel", "TnlForCausalLM"),
    Family("titans", "hf_attn.models.titans", "TitansConfig", "TitansModel", "TitansForCausalLM"),
    Family(
        "titans_llama",
        _TITANS_BRANCH,
        "TitansLlamaConfig",
        "TitansLlamaModel",
        "TitansLlamaForCausalLM",
    ),
    Family(
        "titans_qwen2",
        _TITANS_BRANCH,
        "TitansQwen2Config",
        "TitansQwen2Model",
        "TitansQwen2ForCausalLM",
    ),
    Family(
        "titans_qwen3",
        _TITANS_BRANCH,
        "TitansQwen3Config",
        "TitansQwen3Model",
        "TitansQwen3ForCausalLM",
    ),
    Family(
        "titans_mistral",
        _TITANS_BRANCH,
        "TitansMistralConfig",
        "TitansMistralModel",
        "TitansMistralForCausalLM",
    ),
    Family("moh_llama", _MOH, "MoHLlamaConfig", "MoHLlamaModel", "MoHLlamaForCausalLM"),
    Family("moh_qwen2", _MOH, "MoHQwen2Config", "MoHQwen2Model", "MoHQwen2ForCausalLM"),
    Family("moh_qwen3", _MOH, "MoHQwen3Config", "MoHQwen3Model", "MoHQwen3ForCausalLM"),
    Family("moh_mistral", _MOH, "MoHMistralConfig", "MoHMistralModel", "MoHMistralForCausalLM"),
    Family(
        "nat",
        _DINAT,
        "NatConfig",
        "NatAttnModel",
        heads=(
            ("AutoModelForImageClassification", "NatAttnForImageClassification"),
            ("AutoBackbone", "NatAttnBackbone"),
        ),
    ),
    _vision("biformer", "BiFormer"),
    _vision("emov2", "EMOv2"),
    _vision("overlock", "Overlock"),
    _vision("patnet", "PatNet"),
    Family(
        "moh_vit",
        _MOH,
        "MoHViTConfig",
        "MoHViTModel",
        heads=(("AutoModelForImageClassification", "MoHViTForImageClassification"),),
    ),
)

# Name for `hf_attn.convert` -> module with a `CONVERSION` (hf_attn.models.conversion.Conversion).
CONVERSIONS = {
    "landmark": "hf_attn.models.landmark.conversion",
    "moba": "hf_attn.models.moba.conversion",
    "moh": "hf_attn.models.moh.conversion",
    "titans": "hf_attn.models.titans_branch.conversion",
    "uoe": "hf_attn.models.uoe.conversion",
}


def install() -> None:
    """Register all families with the Auto classes, and let PEFT tell us of adapters; harmless when repeated."""
    for family in FAMILIES:
        register(family)
    when_imported("peft", lambda _: importlib.import_module("hf_attn.models.adapters").install())
