"""The attention dispatcher of diffusers: the backend behind sites, context parallelism, and the public names.

Private names of diffusers that are touched here: `_AttentionBackendRegistry`, `_templated_context_parallel_attention`,
and how the Enum `AttentionBackendName` is built.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_device,
    _check_shape,
    _templated_context_parallel_attention,
)
from torch import Tensor

from hf_attn.integrations.diffusers.attend import gradients
from hf_attn.integrations.diffusers.dense import PREFIX, is_ours
from hf_attn.integrations.diffusers.geometry import row_of
from hf_attn.integrations.diffusers.processors import FRAME, is_self_attention, site_call
from hf_attn.mechanism import get_mechanism, mechanism_names


def _native(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    return _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE](query, key, value, **kwargs)


# Arguments that are missing in this signature would be dropped by the dispatcher without a word.
def backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Attention `[B, S, H, D]`: the running site's, native attention for everybody else."""
    site = FRAME.site
    rows = {"attn_mask": attn_mask, "dropout_p": dropout_p, "scale": scale}
    if site is None or not is_self_attention(query.transpose(1, 2), key.transpose(1, 2), is_causal):
        return _native(
            query, key, value, is_causal=is_causal, enable_gqa=enable_gqa, _parallel_config=_parallel_config, **rows
        )
    if _parallel_config is not None and _parallel_config.context_parallel_config is not None:
        check_parallel(_parallel_config)
        return _templated_context_parallel_attention(
            query, key, value, is_causal=is_causal, enable_gqa=enable_gqa, return_lse=False,
            forward_op=_parallel_forward, backward_op=_parallel_backward, _parallel_config=_parallel_config, **rows,
        )  # fmt: skip
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return site_call(site, query, key, value, attn_mask, dropout_p, scale).transpose(1, 2)


# -- context parallelism ---------------------------------------------------------------------------------------------


def check_parallel(config: Any) -> None:
    """Raise ValueError for the forms of context parallelism a block selection cannot work with."""
    parallel = config.context_parallel_config
    if parallel.ring_degree > 1:
        raise ValueError(
            f"hf_attn cannot run under ring attention (ring_degree={parallel.ring_degree}): a rank sees one chunk of "
            "keys at a time, and blocks are chosen among all of them. Use ContextParallelConfig(ulysses_degree=...)"
        )
    if getattr(parallel, "ulysses_anything", False):
        raise ValueError(
            "hf_attn does not support ulysses_anything=True (padded sequences and heads); use a ulysses_degree that "
            "divides the heads and the sequence"
        )


def _parallel_forward(
    ctx, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, _save_ctx=True,
    _parallel_config=None,
):  # fmt: skip
    """The whole sequence with this rank's heads, `[B, S, H / ranks, D]`."""
    parallel = _parallel_config.context_parallel_config
    rank, ranks = parallel._ulysses_mesh.get_local_rank(), parallel.ulysses_degree
    site = FRAME.site
    assert site is not None  # `dispatch` came here from a site
    if _save_ctx:
        ctx.save_for_backward(query, key, value, attn_mask)
        ctx.hf_attn = site.handle, site.numbers.clone(), scale, rank, ranks
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return site_call(site, query, key, value, attn_mask, dropout_p, scale, rank, ranks).transpose(1, 2)


def _parallel_backward(ctx, grad, *_args, **_kwargs):
    query, key, value, mask = ctx.saved_tensors
    handle, numbers, scale, rank, ranks = ctx.hf_attn
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key, value, grad = (x.transpose(1, 2) for x in (query, key, value, grad))
    found = gradients(query, key, value, mask, handle, numbers, grad, scale, rank, ranks)
    return tuple(x.transpose(1, 2) for x in found)


# -- members of the Enum ---------------------------------------------------------------------------------------------


def _member(value: str) -> Any:
    """A member of the closed Enum that its tables do not list."""
    made = str.__new__(AttentionBackendName, value)
    made._name_, made._value_ = value.upper(), value
    made.__objclass__ = AttentionBackendName
    return made


def _register(member: Any) -> None:
    constraints = [_check_device, _check_shape]
    _AttentionBackendRegistry.register(member, constraints=constraints, supports_context_parallel=True)(backend)


# What the processors at our sites name; the public tables stay as they are.
HIDDEN = _member(PREFIX)
_register(HIDDEN)


def register_backends() -> list[str]:
    """Make `hf_attn_<mechanism>` a backend name of diffusers, for the rest of the process; returns the names.

    Afterwards `model.set_attention_backend("hf_attn_psa")` on a supported model does what `hf_attn.apply(model, "psa")`
    does, until another backend is set or the backend is reset; the process-wide backend stays as it is. The names also
    work in `attention_backend(...)`: models without our sites run native attention under them.
    Never called at import, harmless when repeated. Call it in every worker process that unpickles such a name.

    Raises ValueError when another package took a name.
    """
    names = [f"{PREFIX}_{name}" for name in mechanism_names() if get_mechanism(name).capabilities.diffusers]
    for name in names:
        if name in AttentionBackendName._value2member_map_:
            if _AttentionBackendRegistry._backends.get(AttentionBackendName(name)) is not backend:
                raise ValueError(f"diffusers already has an attention backend {name!r} that hf_attn did not add")
            continue
        member = _member(name)
        setattr(AttentionBackendName, member.name, member)  # before the tables: Enum refuses it afterwards
        AttentionBackendName._member_names_.append(member.name)
        AttentionBackendName._member_map_[member.name] = member
        AttentionBackendName._value2member_map_[name] = member
        hashable = getattr(AttentionBackendName, "_hashable_values_", None)  # Python 3.13
        if hashable is not None:
            hashable.append(name)
        _register(member)
    _listen_to_setter()
    return names


def unregister_backends() -> None:
    """Take back `register_backends`; the process-wide backend becomes native when it was one of ours."""
    from diffusers.models.modeling_utils import ModelMixin

    if is_ours(_AttentionBackendRegistry._active_backend):
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    for name in [name for name in AttentionBackendName._value2member_map_ if is_ours(name)]:
        member = AttentionBackendName._value2member_map_.pop(name)
        AttentionBackendName._member_names_.remove(member.name)
        del AttentionBackendName._member_map_[member.name]
        type.__delattr__(AttentionBackendName, member.name)
        hashable = getattr(AttentionBackendName, "_hashable_values_", [])
        if name in hashable:
            hashable.remove(name)
        for table in (_AttentionBackendRegistry._backends, _AttentionBackendRegistry._constraints):
            table.pop(member, None)
        _AttentionBackendRegistry._supported_arg_names.pop(member, None)
        _AttentionBackendRegistry._supports_context_parallel.discard(name)
    for method in ("set_attention_backend", "reset_attention_backend"):
        setattr(ModelMixin, method, getattr(getattr(ModelMixin, method), "__wrapped__", getattr(ModelMixin, method)))


def _listen_to_setter() -> None:
    """Old processors ignore a backend, and a dispatcher does not know its layer: the setter has to put sites in."""
    from diffusers.models.modeling_utils import ModelMixin

    from hf_attn.integrations.diffusers import model as verbs

    if hasattr(ModelMixin.set_attention_backend, "__wrapped__"):
        return
    setter, resetter = ModelMixin.set_attention_backend, ModelMixin.reset_attention_backend

    def take_out(model: torch.nn.Module) -> None:
        """A mechanism that came with a backend name goes with it."""
        if row_of(model) is not None:
            for _, root in verbs.installed_in(model).values():
                if root.state.by_backend:
                    verbs.remove(model)

    @functools.wraps(setter)
    def set_attention_backend(self: torch.nn.Module, backend: str) -> None:
        take_out(self)
        if not is_ours(backend.lower()):
            return setter(self, backend)
        verbs.apply(self, backend.lower().removeprefix(f"{PREFIX}_"))
        verbs.installed_in(self)[""][1].state.by_backend = True

    @functools.wraps(resetter)
    def reset_attention_backend(self: torch.nn.Module) -> None:
        take_out(self)
        return resetter(self)

    ModelMixin.set_attention_backend = set_attention_backend
    ModelMixin.reset_attention_backend = reset_attention_backend
