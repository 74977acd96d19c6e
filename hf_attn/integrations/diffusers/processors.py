"""What stands at a self-attention site: the stock processor, with its attention call led to the mechanism."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from hf_attn.integrations.diffusers.attend import attend
from hf_attn.integrations.diffusers.state import PipelineState, Site


class _Frame(threading.local):
    """Which site is running in this thread."""

    def __init__(self) -> None:
        # Not a class attribute: compilers guard on where an attribute is found, and writing it would move it.
        self.site: SiteProcessor | None = None


FRAME = _Frame()


class SiteProcessor:
    """Mixed into a stock processor class by `site_class`.

    It names its site in `FRAME` and runs the stock code; the attention call inside then arrives at `site_call`, through
    the dispatcher of diffusers (`dispatched` classes) or from torch's SDPA function. Attributes of ours:

        handle: int64 `[2]` on the CPU, slot of the state and number of the site. No buffer: `.to()` must leave it.
        numbers: int64 `[5]` on the CPU, the grid of the running forward; shared by the sites of a model.
        state, site, stock: the pipeline's state, this site's record, the processor that stood here before.
    """

    dispatched: bool
    _parallel_config: Any = None
    handle: Tensor
    numbers: Tensor
    state: PipelineState
    site: Site
    stock: Any

    @property
    def _attention_backend(self) -> Any:
        """What `dispatch_attention_fn` is to use: always us. Setting it chooses the backend of the dense calls."""
        from hf_attn.integrations.diffusers.backends import HIDDEN

        return HIDDEN

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.site.backend = backend

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteProcessor:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            # The record is the pipeline's; tensors are copied so that `numbers` stays that of the copy's own hook.
            vars(twin)[name] = value if name in ("site", "state") else copy.deepcopy(value, memo)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled model must load where this package is not installed: as the stock processor.
        return copy.copy, (self.stock,)


class RedirectSDPA(TorchFunctionMode):
    """Leads torch's scaled_dot_product_attention to a site while an old processor runs."""

    def __init__(self, site: SiteProcessor) -> None:
        super().__init__()
        self.site = site

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return _sdpa(self.site, *args, **kwargs)
        return func(*args, **kwargs)


def _sdpa(site, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """SDPA's own signature; what is not self-attention of the site goes on to SDPA."""
    if not is_self_attention(query, key, is_causal):
        return scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
    return site_call(site, query, key, value, attn_mask, dropout_p, scale)


def is_self_attention(query: Tensor, key: Tensor, is_causal: bool) -> bool:
    """Whether queries and keys `[B, H, S, D]` can be the same tokens."""
    return query.shape[2] == key.shape[2] and not is_causal


def site_call(
    site: SiteProcessor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    rank: int = 0,
    ranks: int = 1,
) -> Tensor:
    """Self-attention of a site, `[B, H, S, D]`: an opaque op inside compiled graphs, the function itself elsewhere."""
    if dropout:
        raise ValueError(f"hf_attn does not support attention dropout, got dropout_p={dropout}; set it to 0")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if not torch.compiler.is_compiling():
        return attend(query, key, value, mask, site.handle, site.numbers, scale, rank, ranks)
    if torch.is_autocast_enabled(query.device.type):
        # SDPA has a rule for autocast; an op of ours sees the tensors as they are.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    from hf_attn.integrations.diffusers.op import site_attention

    return site_attention(query, key, value, mask, site.handle, site.numbers, scale, rank, ranks)


@functools.cache
def site_class(base: Any) -> Any:
    """The subclass of a stock processor class that stands at sites."""

    @functools.wraps(base.__call__)  # Attention.forward drops arguments that are not in the signature
    def __call__(self, *args, **kwargs):
        previous, FRAME.site = FRAME.site, self
        try:
            if self.dispatched:
                return base.__call__(self, *args, **kwargs)
            with RedirectSDPA(self):
                return base.__call__(self, *args, **kwargs)
        finally:
            FRAME.site = previous

    members = {"__call__": __call__, "__module__": __name__, "dispatched": hasattr(base, "_attention_backend")}
    made = type(f"HfAttn{base.__name__}", (SiteProcessor, base), members)
    _tell_guiders(base, made)
    return made


def can_stand_in(base: type) -> bool:
    """Whether the attention call of a stock processor class can be led to a mechanism."""
    code = getattr(inspect.unwrap(base.__call__), "__code__", None)
    return hasattr(base, "_attention_backend") or (
        code is not None and scaled_dot_product_attention.__name__ in code.co_names
    )


def site_processor(stock: Any, state: PipelineState, site: Site, numbers: Tensor) -> SiteProcessor:
    """A processor for `site` that does what `stock` does."""
    kind: Any = type(stock)
    made: Any = object.__new__(site_class(kind))
    attributes = dict(vars(stock))
    site.backend = attributes.pop("_attention_backend", None)
    vars(made).update(attributes)
    handle = torch.tensor([state.slot, state.sites.index(site)])
    vars(made).update(state=state, site=site, stock=stock, numbers=numbers, handle=handle)
    return made


def set_processor(attention: nn.Module, processor: Any) -> None:
    """Put a processor into an attention module of diffusers."""
    if hasattr(attention, "set_processor"):
        attention.set_processor(processor)
    else:
        attention.processor = processor


def _tell_guiders(base: type, made: type) -> None:
    """Guiders look an attention processor up by its exact class: ours counts as its base."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(base)
    except ValueError:
        return  # diffusers does not know the base either
    AttentionProcessorRegistry.register(made, metadata)
