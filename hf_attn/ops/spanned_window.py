"""spanned_window_attention: attention inside windows of neighbours, of far-apart tokens, or of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.checks import require_int
from hf_attn.ops.backend import autocast

Mode = Literal["close", "remote", "hybrid"]
MODES = ("close", "remote", "hybrid")


def spanned_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    mode: Mode = "hybrid",
    *,
    num_heads: int,
    scale: float | None = None,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Window attention over an image that spans the map twice (arXiv 2412.06674, the attention of i2RMB).

    With n = size / window windows along an axis, "close" windows hold `window` neighbouring rows and columns, "remote"
    windows the rows and columns n apart: row r belongs to window r mod n. "hybrid" is the sum of both outputs.

    Args:
        query, key: `[B, C, H, W]`; head i is the i-th block of C / num_heads channels.
        value: `[B, Cv, H, W]`, Cv may differ from C.
        window: rows and columns of a window, H and W are multiples of it; 0 or less means one window, the whole map.
        mode: "close", "remote" or "hybrid".
        num_heads: divides C and Cv.
        scale: factor on the scores, default (C / num_heads) ** -0.5.
        attend: attention of `[windows, heads, tokens, dim]` tensors, default torch's SDPA with `scale`.

    Returns:
        `[B, Cv, H, W]` in the dtype of the values. With one window both branches are equal: "hybrid" is twice it.

    Raises:
        ValueError: shapes or options that do not fit, naming the argument.
    """
    query, key, value = autocast(query, key, value)
    _check(query, key, value, window, mode, num_heads)
    height, width = query.shape[2:]
    sizes = (window, window) if window > 0 else (height, width)
    attend = partial(scaled_dot_product_attention, scale=scale) if attend is None else attend
    batch, one_window = query.shape[0], sizes == (height, width)
    modes = ("close", "remote") if mode == "hybrid" and not one_window else ("close" if one_window else mode,)
    # One call for both branches: their windows are independent rows of a batch.
    query, key, value = (torch.cat([_windows(x, num_heads, sizes, m) for m in modes]) for x in (query, key, value))
    outs = attend(query, key, value).unflatten(0, (len(modes), -1))
    maps = [_unwindow(out, batch, (height, width), sizes, m) for out, m in zip(outs, modes, strict=True)]
    out = maps[0] if len(maps) == 1 else maps[0] + maps[1]
    return 2 * out if mode == "hybrid" and one_window else out


def _check(query: Tensor, key: Tensor, value: Tensor, window: int, mode: str, num_heads: int) -> None:
    if query.dim() != 4 or query.shape != key.shape:
        raise ValueError(f"query and key must be [B, C, H, W] alike, got {tuple(query.shape)} and {tuple(key.shape)}")
    if value.dim() != 4 or (value.shape[0], *value.shape[2:]) != (query.shape[0], *query.shape[2:]):
        raise ValueError(f"value must be [B, Cv, H, W] of the query's map, got {tuple(value.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; allowed: {', '.join(MODES)}")
    require_int("num_heads", num_heads, 1)
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[1] % num_heads:
            raise ValueError(f"{name} has {tensor.shape[1]} channels, not a multiple of num_heads={num_heads}")
    if window > 0 and (query.shape[2] % window or query.shape[3] % window):
        raise ValueError(
            f"the map {query.shape[2]} x {query.shape[3]} is not a multiple of window={window}; pad it to one before "
            "the projections, or pass window=0 for attention over the whole map"
        )


def _windows(x: Tensor, heads: int, sizes: tuple[int, int], mode: str) -> Tensor:
    """`[B, C, H, W]` -> `[B n1 n2, heads, h1 w1, C / heads]`."""
    batch, channels, height, width = x.shape
    h1, w1 = sizes
    n1, n2 = height // h1, width // w1
    if mode == "close":
        x = x.view(batch, heads, channels // heads, n1, h1, n2, w1).permute(0, 3, 5, 1, 4, 6, 2)
    else:
        x = x.view(batch, heads, channels // heads, h1, n1, w1, n2).permute(0, 4, 6, 1, 3, 5, 2)
    return x.reshape(batch * n1 * n2, heads, h1 * w1, channels // heads)


def _unwindow(x: Tensor, batch: int, space: tuple[int, int], sizes: tuple[int, int], mode: str) -> Tensor:
    """The way back: `[B n1 n2, heads, h1 w1, D]` -> `[B, heads D, H, W]`."""
    (height, width), (h1, w1) = space, sizes
    heads, dim = x.shape[1], x.shape[3]
    x = x.view(batch, height // h1, width // w1, heads, h1, w1, dim)
    order = (0, 3, 6, 1, 4, 2, 5) if mode == "close" else (0, 3, 6, 4, 1, 5, 2)
    return x.permute(*order).reshape(batch, heads * dim, height, width)
