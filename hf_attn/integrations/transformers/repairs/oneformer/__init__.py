"""OneFormer (transformers' `oneformer`) repaired in place; docs/oneformer.md lists the host's faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.oneformer import modeling_oneformer as host

from hf_attn.checks import did_you_mean
from hf_attn.integrations.transformers.repairs import become, dinat
from hf_attn.integrations.transformers.repairs.oneformer import (
    attention,
    decoder,
    loss,
    model,
    pixel_decoder,
    text,
)

OPTIONS = (text.OPTION, pixel_decoder.OPTION)
# Host class -> subclass with the same weights. The first that fits a module is taken.
MENDED: dict[type[nn.Module], type[nn.Module]] = {
    host.OneFormerAttention: attention.RoutedAttention,
    nn.MultiheadAttention: attention.RoutedMultiheadAttention,
    host.OneFormerPixelDecoderEncoderMultiscaleDeformableAttention: pixel_decoder.MendedDeformableAttention,
    host.OneFormerPixelDecoderEncoderLayer: pixel_decoder.MendedEncoderLayer,
    host.OneFormerTransformerDecoderCrossAttentionLayer: decoder.MendedCrossAttentionLayer,
    host.OneFormerTransformerDecoderSelfAttentionLayer: decoder.MendedSelfAttentionLayer,
    host.OneFormerTransformerDecoderLayer: decoder.MendedDecoderLayer,
    host.OneFormerTransformerDecoder: decoder.MendedDecoder,
    host.OneFormerTextTransformerLayer: text.MendedTextLayer,
    host.OneFormerTextMapper: text.MendedTextMapper,
    host.OneFormerHungarianMatcher: loss.MendedMatcher,
    host.OneFormerLoss: loss.MendedLoss,
    host.OneFormerModel: model.MendedOneFormerModel,
    host.OneFormerForUniversalSegmentation: model.MendedSegmentation,
}


def mend(root: nn.Module, config: Any) -> Callable[[], None]:
    """Give the modules inside a OneFormer (its backbone aside) their mended classes; returns what undoes it."""
    found = [m for name, m in root.named_modules() if m is not root and "pixel_level_module.encoder" not in name]
    undo: list[Callable[[], None]] = []
    for original, mended in MENDED.items():
        modules = [module for module in found if type(module) is original]
        undo.append(become(modules, mended))
        if "config" in mended.__annotations__ or issubclass(mended, attention.Routed):
            undo += [_give(module, config) for module in modules]
    undo += [decoder.register_projections(m) for m in found if isinstance(m, host.OneFormerTransformerModule)]
    return lambda: [restore() for restore in reversed(undo)]


def install(target: PreTrainedModel, **options: Any) -> Callable[[], None]:
    """Mend a OneFormer model in place; returns what undoes it.

    options: `text_attention` ("causal", as the official code; "bidirectional", as transformers) and
    `deformable_attn_implementation` ("auto", "grid_sample", "torch", "triton"); they are written into the config.
    Raises ValueError, and changes nothing, for other names or values.
    """
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"unknown option {name!r} for OneFormer{did_you_mean(name, list(OPTIONS))}; allowed: "
                             f"{', '.join(OPTIONS)}")  # fmt: skip
    config = target.config
    before = {name: getattr(config, name) for name in options if hasattr(config, name)}
    for name, value in options.items():
        setattr(config, name, value)

    def restore_options() -> None:
        for name in options:
            setattr(config, name, before[name]) if name in before else delattr(config, name)

    try:
        model.check_options(config)
    except ValueError:
        restore_options()
        raise
    undo = [mend(target, config), become([target], MENDED.get(type(target), type(target)))]
    if config.backbone_config.model_type in ("dinat", "nat"):
        undo.append(dinat.mend(target, config.backbone_config))
    return lambda: [restore() for restore in (*reversed(undo), restore_options)]


def _give(module: nn.Module, config: Any) -> Callable[[], None]:
    """Let a module know the model's config."""
    module.config = config
    return lambda: module.__dict__.pop("config", None)
