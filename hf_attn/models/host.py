"""Bases of mixins that are put before a class of the host: to a type checker the host's class, at run time nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module as HostModule
    from transformers import PreTrainedConfig as HostConfig
    from transformers import PreTrainedModel as HostModel
    from transformers.models.llama.modeling_llama import LlamaAttention as HostAttention
else:
    HostAttention = HostConfig = HostModule = HostModel = object

__all__ = ["HostAttention", "HostConfig", "HostModule", "HostModel"]
