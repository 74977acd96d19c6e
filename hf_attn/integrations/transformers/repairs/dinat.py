"""DiNAT (transformers' `dinat`) without natten: same weights, neighbourhood attention by our op.

What keeps the host's classes from running, each shown by a test: they ask for natten's functions of 2022, which no
installable natten has; with any newer one even their import fails; and they lay queries out as [B, W, H, heads, d].
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from hf_attn import ops
from hf_attn.integrations.transformers.repairs import Undo, become, together

_MODULE = "transformers.models.dinat.modeling_dinat"


def load_host() -> ModuleType:
    """The host's module, also where an installed natten no longer has the functions that it imports."""
    try:
        return importlib.import_module(_MODULE)
    except ImportError:
        before = utils.is_natten_available
        utils.is_natten_available = lambda: False
        try:
            return importlib.import_module(_MODULE)
        finally:
            utils.is_natten_available = before


host: Any = load_host()


class MendedNeighborhoodAttention(host.NeighborhoodAttention):
    """The host's layer on `[B, H, W, heads, d]`, which is what its linear layers give.

    `config.na_backend` names the op's backend; default "auto".
    """

    def __init__(self, config: Any, *args: Any) -> None:
        super().__init__(config, *args)
        self.config = config

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
        """`[B, H, W, C]` -> (the same,) or (the same, weights `[B, heads, H, W, K * K]`).

        Weights, and dropout on them in training, take the unfused op.
        """
        query, key, value = (
            layer(hidden_states).unflatten(-1, (self.num_attention_heads, self.attention_head_size))
            for layer in (self.query, self.key, self.value)
        )
        window = {"kernel_size": self.kernel_size, "dilation": self.dilation, "rpb": self.rpb}
        rate = self.dropout.p if self.training else 0.0
        if not output_attentions and not rate:
            backend = getattr(self.config, "na_backend", "auto")
            return (ops.neighborhood_attention(query, key, value, **window, backend=backend).flatten(-2),)
        query, key, value = (x.permute(0, 3, 1, 2, 4) for x in (query, key, value))
        scores = ops.na_qk(query * self.attention_head_size**-0.5, key, **window)
        weights = dropout(scores.softmax(-1), rate, self.training)
        del window["rpb"]
        out = ops.na_av(weights, value, **window).permute(0, 2, 3, 1, 4).flatten(-2)
        return (out, weights) if output_attentions else (out,)


class MendedLayer(GradientCheckpointingLayer, host.DinatLayer):
    """The host's layer, which gradient checkpointing may recompute."""

    forward = host.DinatLayer.forward


class Mended:
    """What transformers asks a model class: any implementation is fine, neighbourhood attention is our op's."""

    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


MENDED: dict[type[nn.Module], type[nn.Module]] = {
    host.NeighborhoodAttention: MendedNeighborhoodAttention,
    host.DinatLayer: MendedLayer,
}


def mend(root: nn.Module, config: Any) -> Undo:
    """Give every DiNAT layer in `root` its mended class; returns what undoes it."""
    found = list(root.modules())
    hosts = [module for module in found if type(module) is host.NeighborhoodAttention]
    for module in hosts:
        module.config = config
    steps = [become([m for m in found if type(m) is original], mended) for original, mended in MENDED.items()]
    # A model that was built mended knows its config by itself.
    return together(*steps, _forget_config) if hosts else together(*steps)


def _forget_config(root: nn.Module) -> None:
    for module in root.modules():
        if isinstance(module, MendedNeighborhoodAttention):
            module.__dict__.pop("config", None)


def install(model: PreTrainedModel, **options: Any) -> Undo:
    """Mend the layers of a DiNAT model; there are no options. Returns what undoes it."""
    if options:
        raise ValueError(f"unknown options {', '.join(map(repr, options))}: the repair of DiNAT takes none")
    return mend(model, model.config)
