"""Neighborhood attention by Triton kernels: tables of the tiles and launches. Nothing here waits for the device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..block_sparse.triton_common import LOG2E
from ..launch import config, interpreting, launch
from .geometry import Window
from .tiles import Tiling, tiling
from .triton_backward import backward_kernel
from .triton_forward import forward_kernel

# Queries of a tile along the axes of a grid: near cubes of 64 keep the halo small.
TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    windows: tuple[Window, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `reference.forward`; lse is fp32."""
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    given = _Given(query, key, value, rpb, key_mask, windows)
    # The addresses of a bias table take registers.
    name = "neighborhood_forward" if rpb is None else "neighborhood_forward_bias"
    given.launch(forward_kernel, name, (out, lse), (), scale * LOG2E.value)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    windows: tuple[Window, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and rpb; atomic adds, so not the same to the last bit every time."""
    grad_out = grad_out.contiguous()
    delta = (grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (key, value)]
    grad_bias = None if rpb is None else torch.zeros(rpb.shape, dtype=torch.float32, device=rpb.device)
    given = _Given(query, key, value, rpb, key_mask, windows)
    grads = (grad_query, *wide, grad_bias)
    given.launch(backward_kernel, "neighborhood_backward", (grad_out, delta.contiguous(), lse), grads, scale)
    return grad_query, *(x.to(query.dtype) for x in wide), None if rpb is None else grad_bias.to(rpb.dtype)


class _Given:
    """What both kernels take."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        key_mask: Tensor | None,
        windows: tuple[Window, ...],
    ) -> None:
        self.tensors = query, key, value
        self.bias = None if rpb is None else rpb.detach().float().contiguous()
        self.mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        # Three axes always: one of length 1 reads itself.
        self.windows = (Window(1, 1),) * (3 - len(windows)) + windows
        sizes = (1,) * (3 - len(windows)) + TILES[len(windows)]
        longest = [-(-w.length // w.dilation) for w in self.windows]
        self.tiles = tiling(self.windows, tuple(min(s, n) for s, n in zip(sizes, longest, strict=True)))

    def launch(
        self, kernel: Any, name: str, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], scale: float
    ) -> None:
        query, key, value = self.tensors
        batch, total, heads, dim = query.shape
        value_dim, tiles = value.shape[3], self.tiles
        widths = [max(16, triton.next_power_of_2(d)) for d in (dim, value_dim)]
        chosen = config(name, dtype=query.dtype, head_dim=max(widths), device=query.device)
        sizes, halos = [a.size for a in tiles.axes], [a.halo for a in tiles.axes]
        spans = [2 * w.kernel - 1 for w in self.windows]
        parts = -(-tiles.size // chosen["BLOCK_M"])
        launch(
            kernel, (tiles.count * parts, heads, batch),
            query, key, value, *outputs, self.bias, self.mask, *_tables(tiles, query.device), *grads,
            *query.stride(), *key.stride(), *value.stride(), heads, heads // key.shape[2], total, tiles.size,
            tiles.halo, key.shape[1] - total, *sizes, *halos[1:], *spans, max(sizes), scale,
            D=dim, DV=value_dim, WIDTH=widths[0], WIDTH_V=widths[1], HAS_BIAS=self.bias is not None,
            HAS_MASK=self.mask is not None, PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            UPCAST=interpreting() and query.dtype == torch.bfloat16, **chosen,
        )  # fmt: skip


@lru_cache(64)
def _tables(tiles: Tiling, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int32 queries [tiles, size] (-1: padding), keys [tiles, halo], kinds [tiles, 3], tables [kinds, 3, widest]."""
    with torch.inference_mode(False):
        every = slice(0, tiles.count)
        queries = tiles.query_tokens(every).masked_fill(~tiles.real(every), -1)
        widest = max(axis.size for axis in tiles.axes)
        rows, kinds, first = [], [], 0
        for dim, axis in enumerate(tiles.axes):
            table = torch.stack([axis.low, axis.high, axis.spot], 1)
            rows.append(torch.nn.functional.pad(table, (0, widest - axis.size)))
            kinds.append(torch.tensor(axis.kind)[tiles.picks[:, dim]] + first)
            first += len(table)
        tensors = queries, tiles.key_tokens(every), torch.stack(kinds, 1), torch.cat(rows)
        return tuple(x.to(device, torch.int32).contiguous() for x in tensors)
