"""OneFormer (transformers' `oneformer`) repaired in place; docs/oneformer.md lists the host's faults."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.oneformer import modeling_oneformer as host

from hf_attn.checks import did_you_mean
from hf_attn.integrations.transformers.repairs import Undo, become, dinat, together
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


def mend(root: nn.Module, config: Any) -> Undo:
    """Give the modules inside a OneFormer (its backbone aside) their mended classes; returns what undoes it."""
    found = [m for name, m in root.named_modules() if m is not root and "pixel_level_module.encoder" not in name]
    steps: list[Undo] = []
    for original, mended in MENDED.items():
        modules = [module for module in found if type(module) is original]
        steps.append(become(modules, mended))
        if modules and ("config" in mended.__annotations__ or issubclass(mended, attention.Routed)):
            for module in modules:
                module.config = config
            steps.append(partial(_forget_config, mended))
    if any([decoder.register_projections(m) for m in found if isinstance(m, host.OneFormerTransformerModule)]):
        steps.append(decoder.unregister_projections)
    return together(*steps)


def install(target: PreTrainedModel, **options: Any) -> Undo:
    """Mend a OneFormer model in place; returns what undoes it.

    options: `text_attention` ("causal", as the official code; "bidirectional", as transformers) and
    `deformable_attn_implementation` ("auto", "grid_sample", "torch"); they are written into the config.
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

    restore = partial(_restore_options, tuple(options), before)
    try:
        model.check_options(config)
    except ValueError:
        restore(target)
        raise
    steps: list[Undo] = [restore, mend(target, config), become([target], MENDED.get(type(target), type(target)))]
    if config.backbone_config.model_type in ("dinat", "nat"):
        steps.append(dinat.mend(target, config.backbone_config))
    return together(*steps)


def _restore_options(names: tuple[str, ...], before: dict[str, Any], target: PreTrainedModel) -> None:
    for name in names:
        if name in before:
            setattr(target.config, name, before[name])
        else:
            delattr(target.config, name)


def _forget_config(mended: type[nn.Module], root: nn.Module) -> None:
    """Modules of a mended class know the model's config; those of the host do not."""
    for module in root.modules():
        if type(module) is mended:
            module.__dict__.pop("config", None)
