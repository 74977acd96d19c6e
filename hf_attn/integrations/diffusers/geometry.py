"""The model table: self-attention sites of every supported class, and how a forward's arguments tell its token grid.

Every class flattens frames, height and width with width fastest, and applies position encoding before the attention
call. A new model is one row of `MODELS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn.grid import TokenGrid

# The other tokens are as many as the sequence has beyond the lattice (only their side is known).
REST = -1
Numbers = list[int] | Tensor  # frames, height, width, tokens before, tokens after
Get = Callable[[str], Any]


@dataclass(frozen=True)
class ModelRow:
    """One supported model class.

    Args:
        sites: regular expression of the self-attention modules' paths (whole path).
        geometry: `(config, get) -> [frames, height, width, before, after]`, `get(name)` being a forward argument; an
            int64 tensor `[5]` where the numbers are read from a tensor.
        grid_modules: class name of the submodules whose input tells the grid, instead of the model's own.
        mask_from_row: row of a `[B, 1, S, S]` mask that equals the mask of the keys (a lattice token's).
    """

    sites: str
    geometry: Callable[[Any, Get], Numbers]
    grid_modules: str | None = None
    mask_from_row: int | None = None


def _video(channels_first: bool = True, before: str | None = None, after: tuple[str, ...] | int = ()) -> Any:
    """Grid of a latent `[B, C, F, H, W]` (or `[B, F, C, H, W]`) over the config's patch sizes."""

    def geometry(config: Any, get: Get) -> list[int]:
        latent = get("hidden_states").shape
        frames = latent[2] if channels_first else latent[1]
        patch, patch_t = config.patch_size, getattr(config, "patch_size_t", None)
        if isinstance(patch, int):
            patch_t, patch_h, patch_w = patch_t or 1, patch, patch
        else:
            patch_t, patch_h, patch_w = patch
        text = after if isinstance(after, int) else sum(get(name).shape[1] for name in after)
        return [
            frames // patch_t, latent[3] // patch_h, latent[4] // patch_w, get(before).shape[1] if before else 0, text
        ]  # fmt: skip

    return geometry


def _image(after: str | None = None) -> Any:
    """Grid of a latent `[B, C, H, W]` over the config's patch size (none in U-Nets)."""

    def geometry(config: Any, get: Get) -> list[int]:
        height, width = get("hidden_states").shape[2:]
        patch = getattr(config, "patch_size", None) or 1
        return [1, height // patch, width // patch, 0, get(after).shape[1] if after else 0]

    return geometry


def _packed_video(config: Any, get: Get) -> list[int]:
    """Packed latents; the sizes are arguments."""
    return [get("num_frames"), get("height"), get("width"), 0, 0]


def _coordinates(row: int, column: int) -> Any:
    """Packed image latents with coordinates `img_ids`: the target image first, then reference images, if any."""

    def geometry(config: Any, get: Get) -> Tensor:
        ids = get("img_ids")
        ids = ids[0] if ids.dim() == 3 else ids
        target = ids[:, 0] == ids[0, 0]

        def extent(axis: int) -> Tensor:
            values = ids[:, axis].long()
            first = values[0]
            return torch.where(target, values, first).amax() - torch.where(target, values, first).amin() + 1

        text = get("encoder_hidden_states").shape[1]
        references = (~target).sum()
        numbers = [torch.ones_like(references), extent(row), extent(column), references * 0 + text, references]
        return torch.stack(numbers)

    return geometry


def _shapes(config: Any, get: Get) -> list[int]:
    """Packed image latents with `img_shapes`: per sample the target's (frames, height, width), then references."""
    shapes = get("img_shapes")
    shapes = shapes[0] if isinstance(shapes[0][0], list | tuple) else shapes
    (frames, height, width), references = shapes[0], shapes[1:]
    extra = sum(f * h * w for f, h, w in references)
    return [frames, height, width, get("encoder_hidden_states").shape[1], extra]


_FLUX_SITES = r"(single_)?transformer_blocks\.\d+\.attn"
_ATTN1 = r"transformer_blocks\.\d+\.attn1"

MODELS: dict[str, ModelRow] = {
    "WanTransformer3DModel": ModelRow(r"blocks\.\d+\.attn1", _video()),
    "CogVideoXTransformer3DModel": ModelRow(_ATTN1, _video(channels_first=False, before="encoder_hidden_states")),
    "HunyuanVideoTransformer3DModel": ModelRow(_FLUX_SITES, _video(after=("encoder_hidden_states",))),
    "HunyuanVideo15Transformer3DModel": ModelRow(
        r"transformer_blocks\.\d+\.attn",
        _video(after=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")),
        mask_from_row=0,
    ),
    "LTXVideoTransformer3DModel": ModelRow(_ATTN1, _packed_video),
    "LTX2VideoTransformer3DModel": ModelRow(_ATTN1, _packed_video),
    # Padding is removed sample by sample, so the number of text tokens differs from call to call.
    "MochiTransformer3DModel": ModelRow(_ATTN1, _video(after=REST)),
    "FluxTransformer2DModel": ModelRow(_FLUX_SITES, _coordinates(1, 2)),
    "Flux2Transformer2DModel": ModelRow(_FLUX_SITES, _coordinates(1, 2)),
    "SD3Transformer2DModel": ModelRow(r"transformer_blocks\.\d+\.attn2?", _image(after="encoder_hidden_states")),
    "QwenImageTransformer2DModel": ModelRow(r"transformer_blocks\.\d+\.attn", _shapes),
    "PixArtTransformer2DModel": ModelRow(_ATTN1, _image()),
    "DiTTransformer2DModel": ModelRow(_ATTN1, _image()),
    "UNet2DConditionModel": ModelRow(
        r".*transformer_blocks\.\d+\.attn1", _image(), grid_modules="Transformer2DModel"
    ),
}  # fmt: skip


def row_of(model: nn.Module) -> ModelRow | None:
    """The row of a model's class or of one it derives from, None when there is none."""
    return next((MODELS[base.__name__] for base in type(model).__mro__ if base.__name__ in MODELS), None)


def known_row(model: nn.Module) -> ModelRow:
    """`row_of` a supported model; TypeError for another one."""
    row = row_of(model)
    if row is None:
        raise TypeError(f"{type(model).__name__} is not of a supported class; supported: {', '.join(MODELS)}")
    return row


def site_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a supported model by path, in the order the model lists them."""
    row = known_row(model)
    return {name: module for name, module in model.named_modules() if re.fullmatch(row.sites, name)}


def grid_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a supported model whose inputs tell a grid, by path; "" is the model itself."""
    row = known_row(model)
    if row.grid_modules is None:
        return {"": model}
    return {name: module for name, module in model.named_modules() if type(module).__name__ == row.grid_modules}


def resolve_grid(numbers: list[int], length: int) -> TokenGrid | None:
    """The grid of a sequence of `length` tokens, given what the model said; None when they do not fit.

    A sequence of the lattice's own length has no other tokens (image-only attention in a model with text).
    """
    frames, height, width, before, after = numbers
    if min(frames, height, width) < 1:
        return None
    tokens = frames * height * width
    if tokens == length:
        return TokenGrid(frames, height, width)
    if after == REST and length > tokens + before:
        after = length - tokens - before
    if after < 0 or tokens + before + after != length:
        return None
    return TokenGrid(frames, height, width, before, after)
