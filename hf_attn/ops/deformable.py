"""ms_deform_attn: multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_attn.checks import require_one_of
from hf_attn.ops.backend import choose_path

BACKENDS = ("auto", "grid_sample", "torch")


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Each query adds up a few bilinear samples of several maps: `sum over l, p of w * sample(value_l, location)`.

    Args:
        value: `[B, S, h, d]`: the maps of all levels, flattened row by row and concatenated.
        spatial_shapes: (H, W) of each level; H * W adds up to S. A tensor is read on the host.
        sampling_locations: `[B, Q, h, L, P, 2]`, (x, y) in units of the map: (0, 0) is its upper left corner, (1, 1)
            the lower right one, pixel centres at (i + 0.5) / size. Outside of the map values are 0. Keep them in fp32.
        attention_weights: `[B, Q, h, L, P]`, usually a softmax over L * P.
        backend: "grid_sample" (the reference, transformers' arithmetic bit for bit), "torch" (rows of a table, no
            intermediate of all samples), or "auto": "torch", or what HF_ATTN_BACKEND forces.

    Returns:
        `[B, Q, h * d]` in the dtype of `value`; sums are fp32 (fp64 in fp64). Differentiable in all three tensors.

    Raises:
        ValueError: shapes that do not fit, naming the argument. RuntimeError: a backend that cannot run here.
    """
    require_one_of("backend", backend, BACKENDS)
    shapes = _check(value, spatial_shapes, sampling_locations, attention_weights)
    path = choose_path("ms_deform_attn", value, value.shape[3]) if backend == "auto" else backend
    from hf_attn.ops.hfattn_sparse.deformable import op

    if path in ("reference", "grid_sample"):
        return op.run_reference(value, shapes, sampling_locations, attention_weights)
    heights, widths = ([size[axis] for size in shapes] for axis in (0, 1))
    return op.ms_deform_attn(value, heights, widths, sampling_locations, attention_weights)


def _check(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]] | Tensor, locations: Tensor, weights: Tensor
) -> list[tuple[int, int]]:
    """The level sizes as integers; raises ValueError when the tensors do not fit together."""
    if value.dim() != 4 or not value.is_floating_point():
        raise ValueError(f"value must be floating point [B, S, heads, dim], got {value.dtype} {tuple(value.shape)}")
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    shapes = [tuple(size) for size in spatial_shapes]
    if not shapes or any(len(size) != 2 or min(size) < 1 for size in shapes):
        raise ValueError(f"spatial_shapes must be one (height, width) >= 1 for each level, got {spatial_shapes!r}")
    total = sum(height * width for height, width in shapes)
    if total != value.shape[1]:
        raise ValueError(
            f"spatial_shapes {shapes} describe {total} positions, but value has {value.shape[1]}; give (height, width) "
            "of every level in the order in which the maps were concatenated"
        )
    batch, _, heads, _ = value.shape
    if locations.dim() != 6 or locations.shape[-1] != 2 or not locations.is_floating_point():
        raise ValueError(
            f"sampling_locations must be floating point [B, Q, heads, levels, points, 2], got {locations.dtype} "
            f"{tuple(locations.shape)}"
        )
    expected = (batch, locations.shape[1], heads, len(shapes), locations.shape[4])
    if locations.shape[:5] != expected:
        raise ValueError(
            f"sampling_locations has shape {tuple(locations.shape)}; with this value and {len(shapes)} levels it must "
            f"be {(*expected, 2)}"
        )
    if weights.shape != expected:
        raise ValueError(f"attention_weights must be {expected}, got {tuple(weights.shape)}")
    devices = {tensor.device for tensor in (value, locations, weights)}
    if len(devices) > 1:
        raise ValueError(f"value, sampling_locations and attention_weights are on different devices: {devices}")
    return shapes
