"""From the tensors of one site to an AttentionCall, or to dense attention with a reason."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.grid import TokenGrid
from hf_attn.integrations.diffusers.dense import dense_attention
from hf_attn.integrations.diffusers.geometry import resolve_grid
from hf_attn.integrations.diffusers.state import PipelineState, Site, state_of_slot
from hf_attn.integrations.diffusers.stats import CallRecord, count_reason
from hf_attn.mechanism import DiffusionConfig


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    handle: Tensor,
    numbers: Tensor,
    scale: float,
    rank: int = 0,
    ranks: int = 1,
) -> Tensor:
    """Self-attention of one site, `[B, H, S, D]`.

    Args:
        query, key, value: `[B, H, S, D]`; under context parallelism the whole sequence and this rank's heads.
        mask: as the host gives it: bool `[B, S]`, `[B, 1, 1, S]`, or another one, which runs dense.
        handle: int64 `[2]` on the CPU: slot of the pipeline's state, number of the site.
        numbers: int64 `[5]` on the CPU, as `geometry.ModelRow` says.
        scale: factor on the scores.
        rank, ranks: of the processes that share the heads (Ulysses).

    Raises ValueError when a call does not fit and the options say `strict=True`.
    """
    slot, number = handle.tolist()
    state = state_of_slot(slot)
    if state is None:
        return dense_attention(query, key, value, mask, scale)
    state.watch_scheduler()
    site = state.sites[number]
    step = state.step
    site.stats.begin(query.shape[2], step, state.branch)
    reason = _dense_reason(state, site, query, step)
    if reason is not None:
        count_reason(site.stats.dense, reason)
        return dense_attention(query, key, value, mask, scale, site.backend)
    grid = resolve_grid(numbers.tolist(), query.shape[2])
    real, problem = _real_keys(mask, query, site)
    problem = _grid_problem(numbers, query, site) if grid is None else problem
    if problem is not None:
        if site.options.strict:
            raise ValueError(f"{problem}; with strict=False such calls run dense")
        state.warn_once(f"{problem}; such calls run dense (strict=True raises instead)")
        count_reason(site.stats.fallbacks, problem)
        return dense_attention(query, key, value, mask, scale, site.backend)
    assert grid is not None  # else that is the problem
    options = site.options_at(site.options.density_at(step, state.num_steps))
    return _run(query, key, value, real, grid, state, site, options, scale, rank, ranks)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    handle: Tensor,
    numbers: Tensor,
    grad: Tensor,
    scale: float,
    rank: int = 0,
    ranks: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` in query, key and value for a gradient `[B, H, S, Dv]` of its output, by recomputation."""
    with torch.enable_grad():
        query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
        out = attend(query, key, value, mask, handle, numbers, scale, rank, ranks)
    of_query, of_key, of_value = torch.autograd.grad(out, (query, key, value), grad)
    return of_query, of_key, of_value


def _dense_reason(state: PipelineState, site: Site, query: Tensor, step: int | None) -> str | None:
    """Why the options leave this call dense, or None."""
    if site.options is None:
        return "layers: this layer is set to dense"
    num_steps = state.num_steps
    if site.options.needs_steps and not torch.is_grad_enabled():
        share = isinstance(site.options.dense_steps, float) and site.options.dense_steps > 0
        if step is None:
            state.warn_once(
                "the denoising step is unknown, so dense_steps and schedule do nothing; call the model inside "
                "`with model.cache_context(name, step_index=..., num_inference_steps=...)`, or set dense_steps=0"
            )
        elif num_steps is None and share:
            state.warn_once(
                "the number of denoising steps is unknown, so dense_steps as a share does nothing; give a whole number "
                "of steps, or call the model inside `with model.cache_context(name, num_inference_steps=...)`"
            )
    return site.options.dense_reason(query.shape[2], step, num_steps)


def _real_keys(mask: Tensor | None, query: Tensor, site: Site) -> tuple[Tensor | None, str | None]:
    """Which keys are real, bool `[B, S]` or None for all, and why the mask cannot be said that way."""
    if mask is None:
        return None, None
    batch, length = query.shape[0], query.shape[2]
    if mask.dtype == torch.bool:
        if mask.dim() == 4 and mask.shape[1:3] == (1, 1):
            mask = mask[:, 0, 0]
        elif mask.dim() == 4 and mask.shape[1] == 1 and site.row.mask_from_row is not None:
            mask = mask[:, 0, site.row.mask_from_row]
        if mask.dim() == 2 and mask.shape[1] == length:
            return mask.expand(batch, -1), None
    return None, (
        f"{site.name} has an attention mask {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)} that is more "
        "than padding of the keys"
    )


def _grid_problem(numbers: Tensor, query: Tensor, site: Site) -> str:
    frames, height, width, before, after = numbers.tolist()
    return (
        f"{site.name} attends over {query.shape[2]} tokens, but the model's arguments tell a grid of "
        f"{frames}x{height}x{width} with {before} tokens before and {after if after >= 0 else 'the rest'} after"
    )


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    grid: TokenGrid,
    state: PipelineState,
    site: Site,
    options: DiffusionConfig,
    scale: float,
    rank: int,
    ranks: int,
) -> Tensor:
    """The mechanism itself."""
    if ranks > 1 and grid.text_before:
        query, key, value = (_gather_text(x, grid.text_before, ranks, 2) for x in (query, key, value))
        real = None if real is None else _gather_text(real, grid.text_before, ranks, 1)
    batch, heads, length = query.shape[:3]
    record = CallRecord(site.stats, state.step)
    layer = LayerContext(
        index=site.index,
        count=site.count,
        number=site.number,
        step=state.step,
        num_steps=state.num_steps,
        timestep=state.timestep,
        head_offset=(rank or state.tensor_rank.get(site.component, 0)) * heads,
        training=torch.is_grad_enabled() and query.requires_grad,
        record=record,
    )
    tokens = TokenLayout(batch, length, length, None if real is None else _index(real), grid=grid)
    out = state.mechanism(AttentionCall(query, key, value, scale, False, tokens, layer), options)
    record.file()
    if ranks > 1 and grid.text_before:
        out = _scatter_text(out, grid.text_before, ranks)
    return out


def _index(real: Tensor) -> Tensor:
    """`TokenLayout.index` of rows whose queries and keys are the same tokens, some of them padding."""
    segment = torch.where(real, 0, -1).to(torch.int32).repeat(1, 2)
    position = torch.arange(real.shape[1], device=real.device, dtype=torch.int32).repeat(2)
    return torch.stack([segment, position.expand_as(segment)], 1)


def _gather_text(x: Tensor, text: int, ranks: int, dim: int) -> Tensor:
    """Context parallelism splits text and image apart, so a gathered sequence is [text 0, image 0, text 1, ...]."""
    local = x.unflatten(dim, (ranks, -1))
    parts = local.split([text // ranks, local.shape[dim + 1] - text // ranks], dim + 1)
    return torch.cat([part.flatten(dim, dim + 1) for part in parts], dim)


def _scatter_text(x: Tensor, text: int, ranks: int) -> Tensor:
    """The inverse of `_gather_text` along dimension 2."""
    parts = x.split([text, x.shape[2] - text], 2)
    return torch.cat([part.unflatten(2, (ranks, -1)) for part in parts], 3).flatten(2, 3)
