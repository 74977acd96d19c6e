"""Where a position of a BiFormer looks: the attention weights of one layer, on the map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_attn.models.biformer.layers import FULL_HEADS, BilevelRoutingAttention, FullAttention
from hf_attn.ops.bilevel import region_mask, select_regions


@torch.no_grad()
def attention_map(
    model: nn.Module, pixel_values: Tensor, *, stage: int, block: int, position: tuple[int, int]
) -> Tensor:
    """Weights with which one position reads all others, mean over the heads.

    Args:
        model: any BiFormer class.
        pixel_values: `[B, C, H, W]`.
        stage, block: the layer, both from 1.
        position: row and column on the stage's map (height and width of the image over 4, 8, 16, 32).

    Returns:
        `[B, rows, columns]` on the stage's map; sums to 1 where no weight lies on padding.

    Raises ValueError for layers and positions that do not exist, and for the refactored layout.
    """
    stages = model.base_model.stages
    if not 1 <= stage <= len(stages) or not 1 <= block <= len(stages[stage - 1]):
        depths = [len(blocks) for blocks in stages]
        raise ValueError(
            f"stage={stage}, block={block} does not exist; the stages have {depths} blocks, counted from 1"
        )
    layer, seen = stages[stage - 1][block - 1].attn, []
    if type(layer) not in (BilevelRoutingAttention, FullAttention):
        raise ValueError(f"stage {stage} has no attention that can be drawn: {type(layer).__name__}")
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model.base_model.feature_maps(pixel_values)
    finally:
        handle.remove()
    maps = seen[0]
    rows, columns = maps.shape[1:3]
    row, column = position
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(f"position={tuple(position)} is outside the {rows} x {columns} map of stage {stage}")
    weights = (_routed if isinstance(layer, BilevelRoutingAttention) else _full)(layer, maps, row, column)
    return weights[:, :rows, :columns]


def _routed(layer: BilevelRoutingAttention, maps: Tensor, row: int, column: int) -> Tensor:
    padded, region = layer.to_whole_regions(maps)
    query, key, _ = (t.unflatten(-1, (layer.num_heads, -1)) for t in layer.qkv(padded))
    routes = select_regions(query, key, region_size=region, top_k=layer.top_k)
    mask = region_mask(routes, padded.shape[1:3], region)[:, row * padded.shape[2] + column]
    return _weights(query[:, row, column], key, layer.scale, mask)


def _full(layer: FullAttention, maps: Tensor, row: int, column: int) -> Tensor:
    query, key, _ = layer.qkv(maps).unflatten(-1, (3, FULL_HEADS, -1)).unbind(3)
    return _weights(query[:, row, column], key, layer.scale, None)


def _weights(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Of queries `[B, H, D]` over keys `[B, rows, columns, H, D]`; mask bool `[B, N]`."""
    scores = torch.einsum("bhd,bnhd->bhn", query, key.flatten(1, 2)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return scores.softmax(-1).mean(1).unflatten(-1, key.shape[1:3])
