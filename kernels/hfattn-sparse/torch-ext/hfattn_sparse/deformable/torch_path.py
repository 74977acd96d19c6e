"""Multi-scale deformable attention as weighted sums of rows of a table: nothing is laid out channel by channel.

A sample is four rows of `[S * h, d]` with coefficients (bilinear share times attention weight), so a query and head is
one bag of 4 * L * P rows. Queries go in parts that keep indices and coefficients small.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Rows of the table that one part looks up: its indices, coefficients and samples stay within tens of megabytes.
_LOOKUPS = 1 << 20


def forward(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """`[B, Q, h * d]`; arguments as in the reference."""
    batch, _, heads, dim = value.shape
    table = _wide(value).reshape(-1, dim)
    geometry = _Geometry(value, shapes)
    out = table.new_empty(batch, locations.shape[1], heads * dim)
    for part in _parts(locations):
        corners = geometry.corners(_wide(locations[:, part]))
        coefficients = corners.share(_wide(weights[:, part])).flatten(3).flatten(0, 2)
        rows = corners.rows.flatten(3).flatten(0, 2)
        bags = embedding_bag(rows, table, per_sample_weights=coefficients, mode="sum")
        out[:, part] = bags.view(batch, corners.x.shape[1], heads * dim)
    return out.to(value.dtype)


def backward(
    grad_out: Tensor, value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; that of a location is the slope inside its cell."""
    batch, _, heads, dim = value.shape
    table = _wide(value).reshape(-1, dim)
    grad_table = torch.zeros_like(table)
    grad_locations = locations.new_empty(locations.shape, dtype=table.dtype)
    grad_weights = weights.new_empty(weights.shape, dtype=table.dtype)
    geometry = _Geometry(value, shapes)
    for part in _parts(locations):
        corners = geometry.corners(_wide(locations[:, part]))
        factor = _wide(weights[:, part])
        upstream = _wide(grad_out[:, part]).reshape(-1, dim)  # [B * q * h, d]
        rows = corners.rows.flatten(3).flatten(0, 2)  # [B * q * h, L * P * 4]
        grad_table += _scatter(upstream, rows, corners.share(factor).view(rows.shape), table.shape[0])
        by_corner = _products(upstream, table, rows).view(*factor.shape, 2, 2)
        by_line = (by_corner * corners.x[..., None, :]).sum(-1)
        by_column = (by_corner * corners.y[..., :, None]).sum(-2)
        grad_weights[:, part] = (by_line * corners.y).sum(-1)
        slopes = (by_column * corners.slope_x).sum(-1), (by_line * corners.slope_y).sum(-1)
        grad_locations[:, part] = torch.stack(slopes, -1) * (factor[..., None] * geometry.sizes)
    return (
        grad_table.view(value.shape).to(value.dtype),
        grad_locations.to(locations.dtype),
        grad_weights.to(weights.dtype),
    )


class _Corners:
    """The four pixels around every location, as lines (top, bottom) by columns (left, right).

    rows: int `[B, q, h, L, P, 2, 2]` of the table; x, y: `[B, q, h, L, P, 2]`, the bilinear shares of the two columns
    and of the two lines, 0 outside of the map; slope_x, slope_y: their derivatives by the location in pixels.
    """

    def __init__(self, x: Tensor, y: Tensor, geometry: _Geometry) -> None:
        self.x, columns, self.slope_x = _pair(x, geometry.widths)
        self.y, lines, self.slope_y = _pair(y, geometry.heights)
        columns = columns * geometry.heads + geometry.first
        self.rows = (lines * geometry.line)[..., :, None] + columns[..., None, :]

    def share(self, factor: Tensor) -> Tensor:
        """Shares of the four pixels times `factor` `[B, q, h, L, P]`."""
        return (self.y * factor[..., None])[..., :, None] * self.x[..., None, :]


def _pair(place: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares, indices (inside the map) and slopes of the two pixels on one axis around every place."""
    # One pixel outside is as far as any further away, and keeps the integers in range.
    place = torch.minimum(place.clamp(min=-2), sizes + 1.0)
    lower = place.floor()
    share = place - lower
    pixels = torch.stack([lower, lower + 1], -1).to(sizes.dtype)
    last = sizes[..., None] - 1
    inside = (pixels >= 0) & (pixels <= last)
    slopes = place.new_tensor([-1.0, 1.0]) * inside
    return torch.stack([1 - share, share], -1) * inside, torch.minimum(pixels.clamp(min=0), last), slopes


class _Geometry:
    """Where each level starts in the table `[B * S * h, d]`; pixels are h rows apart."""

    def __init__(self, value: Tensor, shapes: list[tuple[int, int]]) -> None:
        batch, total, self.heads, _ = value.shape
        device = value.device
        index = torch.int32 if batch * total * self.heads < 2**31 else torch.int64
        high, wide = (torch.tensor(sizes, device=device, dtype=index) for sizes in zip(*shapes, strict=True))
        self.heights, self.widths = high[:, None], wide[:, None]  # [L, 1], against [B, q, h, L, P]
        self.sizes = torch.stack([wide, high], -1)[:, None].to(_wide(value[:0]).dtype)  # [L, 1, 2]
        self.line = (wide * self.heads)[:, None, None]
        starts = torch.cat([high.new_zeros(1), (high * wide).cumsum(0)[:-1]]).to(index)
        batches = torch.arange(batch, device=device, dtype=index)[:, None, None, None, None, None]
        heads = torch.arange(self.heads, device=device, dtype=index)[:, None, None, None]
        self.first = (batches * total + starts[:, None, None]) * self.heads + heads

    def corners(self, locations: Tensor) -> _Corners:
        pixel = locations * self.sizes - 0.5
        return _Corners(pixel[..., 0], pixel[..., 1], self)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _products(upstream: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """`upstream[i] . table[rows[i, j]]`, `[n, m]`; the sampled rows are never laid out."""
    starts = torch.arange(0, rows.numel(), rows.shape[1], device=rows.device, dtype=rows.dtype)
    bags = torch.arange(rows.shape[0], device=rows.device, dtype=rows.dtype).repeat_interleave(rows.shape[1])
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return products(upstream, table, rows.flatten(), starts, bags, 0).view(rows.shape)


def _scatter(upstream: Tensor, rows: Tensor, coefficients: Tensor, size: int) -> Tensor:
    """Sum of `coefficients[i, j] * upstream[i]` over all (i, j) with `rows[i, j] == r`, for each r: `[size, d]`.

    The transposed bags: the same sums as `index_add_`, in a fixed order and in half the time on a CPU.
    """
    _, order = torch.sort(rows.flatten(), stable=True)
    counts = torch.bincount(rows.flatten(), minlength=size)
    starts = (counts.cumsum(0) - counts).to(rows.dtype)
    bags = (order // rows.shape[1]).to(rows.dtype)
    return embedding_bag(bags, upstream, starts, per_sample_weights=coefficients.flatten()[order], mode="sum")


def _parts(locations: Tensor) -> Iterator[slice]:
    """Runs of queries whose lookups are bounded."""
    batch, queries, heads, levels, points, _ = locations.shape
    step = max(1, _LOOKUPS // max(1, batch * heads * levels * points * 4))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))
