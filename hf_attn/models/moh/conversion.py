"""Conversion "moh": Mixture-of-Head attention with shared heads that calibration finds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from hf_attn.models.conversion import Conversion, carried_over
from hf_attn.models.moh.calibration import attentions, fit_router, largest_heads, measure_heads
from hf_attn.models.moh.configuration_moh import layer_heads
from hf_attn.ops.head_routed import check_heads

_MODULE, _VIT = "hf_attn.models.moh.modeling_moh", "hf_attn.models.moh.modeling_moh_vit"
# Options that go into the config under another name.
_FIELDS = ("router", "top_k", "aux_coef", "router_scaling", "aux_form", "ste", "router_granularity")
CALIBRATION_ROWS, CALIBRATION_LENGTH = 8, 256


def configure_dit(base: Mapping[str, Any], model_class: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the converted DiT: the same shared heads (the first ones) and `top_k` in every layer.

    Raises ValueError for unknown options and numbers of heads that do not fit.
    """
    known = inspect.signature(model_class.__init__).parameters
    given = {key: value for key, value in base.items() if key in known}
    heads = given.get("num_attention_heads", known["num_attention_heads"].default)
    layers = given.get("num_layers", known["num_layers"].default)
    shared, top_k = options.get("shared_heads", heads // 2), options.get("top_k")
    unknown = set(options) - {"shared_heads", "top_k", "router_scaling"}
    if unknown:
        raise ValueError(
            f"convert(<DiT>, 'moh') has no option {sorted(unknown)[0]!r}; options: shared_heads, top_k, router_scaling"
        )
    if isinstance(shared, bool) or not isinstance(shared, int) or not 0 <= shared <= heads:
        raise ValueError(f"shared_heads must be a number from 0 to {heads} for a DiT (the first heads), got {shared!r}")
    top_k = (heads - shared) // 2 if top_k is None else top_k
    check_heads(list(range(shared)), top_k, heads, router="learned")
    fields = {"moh_layers": [[heads, shared, top_k]] * layers}
    if "router_scaling" in options:
        fields["moh_router_scaling"] = options["router_scaling"]
    return {**given, **fields}


def prepare(load: Callable[[], nn.Module], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Replace a number of shared heads by those that contribute most, and fit a learned router to the rest.

    Raises ValueError for shared heads and calibration inputs that do not fit the model.
    """
    options = dict(options)
    rows, pixels = options.pop("tokens", None), options.pop("pixels", None)
    shared, learned = options.get("shared_heads"), options.get("router") == "learned"
    fit = learned and options.get("router_scaling", "quantized") == "quantized"
    if isinstance(shared, list) and not fit:
        return options, {}
    model = load()
    if not hasattr(model.config, "num_hidden_layers"):  # a DiT: nothing to calibrate
        return options, {}
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    count = heads // 2 if shared is None else shared
    if not isinstance(shared, list) and (
        isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= heads
    ):
        raise ValueError(f"shared_heads must be a number from 0 to {heads} or a list of head indices, got {shared!r}")
    if model.main_input_name == "pixel_values":
        rows = _pixels(pixels, rows)
    elif pixels is None:
        rows = _rows(model, rows)
    else:
        raise ValueError(f"pixels is for a ViT; a {type(model).__name__} takes tokens=<token ids [rows, length]>")
    moments = measure_heads(model, rows, features=fit)
    if not isinstance(shared, list):
        options["shared_heads"] = [largest_heads(found, count) for found in moments]
    if not fit:
        return options, {}
    per_layer = options["shared_heads"]
    per_layer = per_layer if per_layer and isinstance(per_layer[0], list) else [per_layer] * layers
    weights: dict[str, Tensor] = {}
    for attention, found, of_layer in zip(attentions(model), moments, per_layer, strict=True):
        routed = [head for head in range(heads) if head not in set(of_layer)]
        if routed and options.get("top_k") != 0:
            name = f"{attention}.router.wg"
            weights[f"{name}.weight"], weights[f"{name}.bias"] = fit_router(found, routed)
    return options, weights


def _rows(model: nn.Module, rows: Any) -> Tensor:
    """Token ids `[rows, N]` to calibrate on: the caller's, or text that Python ships, by the model's own tokenizer."""
    if isinstance(rows, Tensor):
        if rows.dim() != 2 or rows.is_floating_point():
            raise ValueError(f"tokens must be token ids [rows, length], got {tuple(rows.shape)} {rows.dtype}")
        return rows
    if rows is not None:
        raise ValueError(f"tokens must be a tensor of token ids [rows, length], got {type(rows).__name__}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            "shared heads are found by calibration, which needs text, and this model has no tokenizer beside it "
            f"({model.name_or_path!r}); pass tokens=<token ids [rows, length]>, or shared_heads=[0, 1, 2]"
        ) from error
    count = CALIBRATION_ROWS * CALIBRATION_LENGTH
    # No tokenizer makes fewer than one token of 32 characters of prose.
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))[: 32 * count]
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:count]).view(-1, CALIBRATION_LENGTH)


def _pixels(pixels: Any, tokens: Any) -> Tensor:
    """Images to calibrate a ViT on."""
    if tokens is not None or not isinstance(pixels, Tensor) or pixels.dim() != 4 or not pixels.is_floating_point():
        raise ValueError(
            "a ViT is calibrated on images: pass pixels=<processed images [rows, channels, height, width]>, or the "
            "query-norm router with shared_heads=[0, 1], which needs none"
        )
    return pixels


def configure(
    base: PreTrainedConfig, config_class: type[PreTrainedConfig], options: dict[str, Any]
) -> PreTrainedConfig:
    """Config of the converted model; it runs on `hf_attn_moh`, which skips the heads that are not chosen.

    Raises ValueError for unknown options.
    """
    if isinstance(base, Mapping):
        return configure_dit(base, config_class, options)
    options = dict(options)
    skip = options.pop("skip", True)
    if options.get("router") == "learned":
        options.setdefault("router_scaling", "quantized")
    unknown = set(options) - {*_FIELDS, "shared_heads"}
    if unknown:
        raise ValueError(
            f"convert(..., 'moh') has no option {sorted(unknown)[0]!r}; options: shared_heads, "
            f"{', '.join(_FIELDS)}, tokens, pixels, skip"
        )
    config = config_class(**carried_over(base), **{f"moh_{name}": value for name, value in options.items()})
    layer_heads(config)
    if skip:
        config.hf_attn = {"mechanism": "moh"}
    return config


CONVERSION = Conversion(
    name="moh",
    families={
        "llama": (_MODULE, "MoHLlamaForCausalLM"),
        "qwen2": (_MODULE, "MoHQwen2ForCausalLM"),
        "qwen3": (_MODULE, "MoHQwen3ForCausalLM"),
        "mistral": (_MODULE, "MoHMistralForCausalLM"),
        "vit": [(_VIT, "MoHViTForImageClassification"), (_VIT, "MoHViTModel")],
        "DiTTransformer2DModel": ("hf_attn.models.moh_dit", "MoHDiTTransformer2DModel"),
    },
    configure=configure,
    prepare=prepare,
)
