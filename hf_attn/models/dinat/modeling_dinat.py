"""DiNAT classes with transformers' config and weights, built and run without natten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import DinatConfig

from hf_attn.integrations.transformers.repairs.dinat import MENDED, Mended, host, mend
from hf_attn.models.dinat.configuration_nat import NatConfig


class DinatAttnModel(Mended, host.DinatModel):
    """The encoder; outputs as `DinatModel`. `output_attentions=True` gives one tensor a stage, of its last block.

    Args:
        config: DinatConfig or NatConfig.
        add_pooling_layer: average the last map.

    Raises ValueError when dilations, heads and depths of the config do not describe the same stages.
    """

    def __init__(self, config: DinatConfig, add_pooling_layer: bool = True) -> None:
        host.DinatPreTrainedModel.__init__(self, config)
        build_model(self, config, add_pooling_layer)
        self.post_init()


class DinatAttnForImageClassification(Mended, host.DinatForImageClassification):
    """The encoder with a linear head on the averaged last map."""

    def __init__(self, config: DinatConfig) -> None:
        host.DinatPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.dinat = DinatAttnModel(config)
        self.classifier = nn.Linear(self.dinat.num_features, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()


class DinatAttnBackbone(Mended, host.DinatBackbone):
    """Feature maps `[B, C, H, W]` of the stages in `config.out_features`, each with a LayerNorm of its own."""

    def __init__(self, config: DinatConfig) -> None:
        super(host.DinatBackbone, self).__init__(config)  # past the host's constructor, which asks for natten
        build_backbone(self, config)
        self.post_init()


class NatAttnModel(DinatAttnModel):
    """`DinatAttnModel` of a NatConfig; weights under the names of NAT checkpoints."""

    config: NatConfig
    base_model_prefix = "nat"


class NatAttnForImageClassification(DinatAttnForImageClassification):
    """`DinatAttnForImageClassification` of a NatConfig; weights under the names of NAT checkpoints."""

    config: NatConfig
    base_model_prefix = "nat"

    def __init__(self, config: NatConfig) -> None:
        host.DinatPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.nat = NatAttnModel(config)
        self.classifier = nn.Linear(self.nat.num_features, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @property
    def dinat(self) -> NatAttnModel:  # type: ignore[override]  # the host assigns it, in a constructor of its own
        """The encoder under the name that the host's forward uses."""
        return self.nat


class NatAttnBackbone(DinatAttnBackbone):
    """`DinatAttnBackbone` of a NatConfig."""

    config: NatConfig


def build_model(self: host.DinatModel, config: DinatConfig, add_pooling_layer: bool) -> None:
    """The modules of a DinatModel, under the host's names."""
    check_config(config)
    self.config = config
    self.num_levels = len(config.depths)
    self.num_features = int(config.embed_dim * 2 ** (self.num_levels - 1))
    self.embeddings = host.DinatEmbeddings(config)
    self.encoder = host.DinatEncoder(config)
    self.layernorm = nn.LayerNorm(self.num_features, eps=config.layer_norm_eps)
    self.pooler = nn.AdaptiveAvgPool1d(1) if add_pooling_layer else None
    mend(self, config)


def build_backbone(self: host.DinatBackbone, config: DinatConfig) -> None:
    """The modules of a DinatBackbone, under the host's names."""
    check_config(config)
    self.embeddings = host.DinatEmbeddings(config)
    self.encoder = host.DinatEncoder(config)
    self.num_features = [config.embed_dim] + [int(config.embed_dim * 2**i) for i in range(len(config.depths))]
    norms = {stage: nn.LayerNorm(width) for stage, width in zip(self.out_features, self.channels, strict=True)}
    self.hidden_states_norms = nn.ModuleDict(norms)
    mend(self, config)


def check_config(config: DinatConfig) -> None:
    """Raise ValueError unless depths, heads, dilations and kernel of a DinatConfig fit together."""
    depths, heads, dilations = list(config.depths), list(config.num_heads), config.dilations
    if len(heads) != len(depths) or [len(stage) for stage in dilations] != depths:
        raise ValueError(
            f"depths {depths}, num_heads {heads} and dilations {dilations} must describe the same stages: one "
            "number of heads a stage and one dilation a block"
        )
    if config.kernel_size < 3 or config.kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd and >= 3 (relative position biases need a centre), got {config.kernel_size}"
        )
    if min(min(stage) for stage in dilations) < 1:
        raise ValueError(f"dilations must be integers >= 1, got {dilations}")
    for stage, count in enumerate(heads):
        if (width := config.embed_dim * 2**stage) % count:
            raise ValueError(f"stage {stage + 1} has {width} channels, which num_heads={count} does not divide")


def patch_dinat() -> Callable[[], None]:
    """Let transformers' own DiNAT classes (and the Auto classes) build and run without natten; returns the undo."""
    names: dict[str, Any] = {original.__name__: mended for original, mended in MENDED.items()}
    names["requires_backends"] = _require_others
    before = {name: getattr(host, name) for name in names}
    flags = {name: value for name, value in vars(Mended).items() if not name.startswith("__")}
    owner = host.DinatPreTrainedModel
    kept = {name: vars(owner).get(name, _MISSING) for name in flags}
    for name, value in names.items():
        setattr(host, name, value)
    for name, value in flags.items():
        setattr(owner, name, value)

    def undo() -> None:
        for name, value in before.items():
            setattr(host, name, value)
        for name, value in kept.items():
            if value is not _MISSING:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)

    return undo


def _require_others(obj: Any, backends: list[str]) -> None:
    others = [backend for backend in backends if backend != "natten"]
    if others:
        _REQUIRES(obj, others)


_MISSING: Any = object()
_REQUIRES = host.requires_backends
