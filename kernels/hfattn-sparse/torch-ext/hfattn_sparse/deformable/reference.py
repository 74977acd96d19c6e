"""Multi-scale deformable attention by grid_sample, level by level: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample


def forward(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Every query adds up L * P samples a head, each a bilinear mean of four pixels of one map.

        out[b, q, h] = sum over l, p of weights[b, q, h, l, p] * sample(value_l[b, :, h], locations[b, q, h, l, p])

    A location (x, y) counts in map sizes: pixel (i, j) of an H x W map has its centre at
    ((j + 0.5) / W, (i + 0.5) / H). What lies outside of the map is zero.

    Args:
        value: `[B, S, h, d]`, the maps row by row, one after the other.
        shapes: (H, W) of each level; the sum of H * W is S.
        locations: `[B, Q, h, L, P, 2]`; weights: `[B, Q, h, L, P]`.

    Returns `[B, Q, h * d]` in the dtype of `value`. Half precision is computed in fp32. The order of the sums is that
    of transformers' own function, whose results this one repeats bit for bit.
    """
    dtype = value.dtype if value.dtype == torch.float64 else torch.float32
    batch, _, heads, dim = value.shape
    queries = locations.shape[1]
    # A map size away is as far outside as infinity, which grid_sample would turn into NaN.
    grid = 2 * locations.to(dtype).clamp(-1, 2) - 1
    sampled = []
    for level, (part, (height, width)) in enumerate(
        zip(value.to(dtype).split([h * w for h, w in shapes], dim=1), shapes, strict=True)
    ):
        image = part.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        points = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B * h, Q, P, 2]
        sampled.append(grid_sample(image, points, mode="bilinear", padding_mode="zeros", align_corners=False))
    samples = torch.stack(sampled, dim=-2).flatten(-2)  # [B * h, d, Q, L * P]
    by_head = weights.to(dtype).transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (samples * by_head).sum(-1).view(batch, heads * dim, queries)
    return out.transpose(1, 2).contiguous().to(value.dtype)
