"""What type checkers see of the host's classes and of the fields of its configs.

Bases of mixins that are put before a class of the host: to a type checker the host's class, at run time nothing.
`Filled[X]` is a field of a config that may be left out, or None, and that `__post_init__` fills in: at run time
`X | None`, with `LATER` as the default; to a type checker, as to everybody who reads the field, an X.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

T = TypeVar("T")
LATER: Any = None  # of any type to a checker

if TYPE_CHECKING:
    from torch.nn import Module as HostModule
    from transformers import PreTrainedConfig as HostConfig
    from transformers import PreTrainedModel as HostModel
    from transformers.models.llama.modeling_llama import LlamaAttention as HostAttention

    Filled = Annotated[T, "None until __post_init__"]
else:
    HostAttention = HostConfig = HostModule = HostModel = object
    Filled = T | None

__all__ = ["LATER", "Filled", "HostAttention", "HostConfig", "HostModule", "HostModel"]
