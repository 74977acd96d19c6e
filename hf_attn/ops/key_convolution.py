"""key_convolution: a short causal convolution over the keys of a sequence, before anything reads them."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_attn.call import TokenLayout


@overload
def key_convolution(
    key: Tensor, weight: Tensor, *, initial_state: Tensor | None = ..., return_state: Literal[False] = ...,
    sequence_ids: Tensor | None = ..., cu_seqlens: Tensor | None = ..., key_start: Tensor | int | None = ...,
    key_length: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def key_convolution(
    key: Tensor, weight: Tensor, *, initial_state: Tensor | None = ..., return_state: Literal[True], sequence_ids:
    Tensor | None = ..., cu_seqlens: Tensor | None = ..., key_start: Tensor | int | None = ..., key_length: Tensor |
    None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def key_convolution(
    key: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    sequence_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | int | None = None,
    key_length: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`k'[t] = k[t] + SiLU(sum_l w_l * k[t - l])`, depthwise and causal (FlashMoBA, arXiv 2511.11571, appendix C).

    Args:
        key: `[B, Hkv, N, D]`, before any position encoding.
        weight: `[Hkv * D, W]` or `[Hkv * D, 1, W]`, W >= 1, channel `head * D + dim`, in cross-correlation order as
            `nn.Conv1d` stores it: the tap on the token itself is the last.
        initial_state: keys before the first one, `[B, Hkv, S, D]` with S >= W - 1, the latest last; `None` means that
            sequences begin here.
        return_state: also return the state to continue with.
        sequence_ids: int `[B | 1, N]`, equal for tokens of one sequence, -1 for padding (wherever it stands). The
            initial state belongs to the sequence of a row's first real token.
        cu_seqlens: int `[sequences + 1]`, sequences packed into one row (B = 1).
        key_start, key_length: int `[B]`, real tokens of every row.

    Returns:
        `[B, Hkv, N, D]`, or (that, state). No tap reaches into another sequence or into padding; padded rows give 0 and
        are never read, whatever they hold. The state has the shape of `initial_state` (S = W - 1 without one): the last
        real keys of every row's last sequence, zeros where there are fewer. Sums are fp32 (fp64 for fp64). Elementwise
        torch on every device, whatever HF_ATTN_BACKEND says; differentiable in key, weight and initial state.

    Raises:
        ValueError: shapes that do not fit, naming the argument.
    """
    width = _check(key, weight, initial_state)
    ids, padded = _sequences(key, sequence_ids, cu_seqlens, key_start, key_length)
    rows = width - 1 if initial_state is None else initial_state.shape[2]
    if initial_state is None:
        initial_state = key.new_zeros(key.shape[0], key.shape[1], rows, key.shape[3])
    if key.shape[2] == 0:
        return (key, initial_state) if return_state else key
    if padded and ids is not None:
        # Real tokens first: then the taps of a token are simply the rows before it, wherever the padding stood.
        order = torch.argsort((ids < 0).to(torch.int8), dim=1, stable=True)
        ids = ids.gather(1, order)
        spread = order[:, None, :, None].expand_as(key)
        key = torch.where((ids >= 0)[:, None, :, None], key.gather(2, spread), 0)
    past = torch.cat([initial_state.to(key.dtype), key], 2)
    if ids is not None:
        ids = torch.cat([ids[:, :1].expand(-1, rows), ids], 1)
    out = _convolve(past, weight.reshape(key.shape[1], 1, key.shape[3], width), ids, rows)
    if padded and ids is not None:
        out = torch.where((ids[:, rows:] >= 0)[:, None, :, None], out, 0)
        out = torch.empty_like(out).scatter(2, spread, out)
    if not return_state:
        return out
    return out, _last_rows(past, ids, rows, padded)


def _convolve(past: Tensor, weight: Tensor, ids: Tensor | None, rows: int) -> Tensor:
    """Rows `rows:` of `past` `[B, H, rows + N, D]`, convolved; weight `[H, 1, D, W]`, ids `[B, rows + N]`."""
    accumulate = torch.promote_types(past.dtype, torch.float32)
    width, end = weight.shape[3], past.shape[2]
    weight = weight.to(accumulate)
    now = past[:, :, rows:].to(accumulate)
    total = now * weight[..., width - 1]
    for lag in range(1, width):
        tap = past[:, :, rows - lag : end - lag].to(accumulate)
        if ids is not None:
            same = ids[:, rows - lag : end - lag] == ids[:, rows:]
            tap = torch.where(same[:, None, :, None], tap, 0)
        total = total + tap * weight[..., width - 1 - lag]
    return (now + F.silu(total)).to(past.dtype)


def _last_rows(past: Tensor, ids: Tensor | None, rows: int, padded: bool) -> Tensor:
    """The last `rows` real rows of every batch row that belong to its last sequence."""
    length = past.shape[2]
    if ids is None:
        return past[:, :, length - rows :]
    batch = past.shape[0]
    if padded:
        first = (ids[:, rows:] >= 0).sum(1, keepdim=True)
    else:
        first = torch.full((batch, 1), length - rows, device=past.device)
    where = first + torch.arange(rows, device=past.device)
    ids = ids.expand(batch, -1)
    # A row without a real token keeps what it had: its ids are all -1.
    last = ids.gather(1, (first + rows - 1).clamp(min=0))
    kept = past.gather(2, where[:, None, :, None].expand(-1, past.shape[1], -1, past.shape[3]))
    return torch.where((ids.gather(1, where) == last)[:, None, :, None], kept, 0)


def _ids(tokens: TokenLayout, key: Tensor) -> Tensor | None:
    return None if tokens.index is None else tokens.index[:, 0, : key.shape[2]].to(key.device)


def _sequences(
    key: Tensor,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    key_start: Tensor | int | None,
    key_length: Tensor | None,
) -> tuple[Tensor | None, bool]:
    """Sequence ids `[B, N]` (None: every row is one sequence) and whether there may be padding."""
    given = [sequence_ids is not None, cu_seqlens is not None, key_length is not None or key_start is not None]
    if sum(given) > 1:
        raise ValueError("pass only one of sequence_ids, cu_seqlens and key_start / key_length")
    batch, length = key.shape[0], key.shape[2]
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens describes one packed row, got a batch of {batch}")
        return _ids(TokenLayout.packed(cu_seqlens, cu_seqlens, length, length), key), True
    if given[2]:
        if key_length is None:
            raise ValueError("key_start needs key_length as well")
        start = 0 if key_start is None else key_start
        return _ids(TokenLayout.padded(start, key_length, length, length), key), True
    if sequence_ids is None:
        return None, False
    fits = sequence_ids.dim() == 2 and sequence_ids.shape[0] in (1, batch) and sequence_ids.shape[1] == length
    if not fits or sequence_ids.is_floating_point():
        raise ValueError(
            f"sequence_ids must be an integer tensor [{batch} or 1, {length}], got {tuple(sequence_ids.shape)} "
            f"{sequence_ids.dtype}"
        )
    return sequence_ids.to(key.device).expand(batch, -1), True


def _check(key: Tensor, weight: Tensor, initial_state: Tensor | None) -> int:
    """The width W; raises ValueError for shapes that do not fit."""
    if key.dim() != 4 or not key.is_floating_point():
        raise ValueError(f"key must be a floating-point tensor [B, Hkv, N, D], got {tuple(key.shape)} {key.dtype}")
    batch, heads, _, dim = key.shape
    channels = heads * dim
    if weight.dim() not in (2, 3) or weight.shape[0] != channels or weight.dim() == 3 and weight.shape[1] != 1:
        raise ValueError(
            f"weight must be [Hkv * D, W] or [Hkv * D, 1, W] with {channels} channels ({heads} KV heads of {dim}), got "
            f"{tuple(weight.shape)}"
        )
    width = weight.shape[-1]
    if width < 1:
        raise ValueError("weight must have at least one tap, got width 0")
    if initial_state is not None:
        shape = tuple(initial_state.shape)
        if len(shape) != 4 or (*shape[:2], shape[3]) != (batch, heads, dim) or shape[2] < width - 1:
            raise ValueError(
                f"initial_state must be [{batch}, {heads}, at least {width - 1}, {dim}], the earlier keys, got {shape}"
            )
    return width
