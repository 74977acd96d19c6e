"""Decay of linear attention by head and layer: three published rules, which are different functions."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn.checks import did_you_mean, require_int

STYLES = ("tnl", "minimax", "paper")


def base_slopes(num_heads: int) -> Tensor:
    """Slopes of ALiBi (arXiv 2108.12409), `[num_heads]` fp32.

    2^(-8 (h + 1) / H) for a power of two; else those of the largest power of two below, and for the rest every second
    one of twice as many heads.
    """
    require_int("num_heads", num_heads, 1)
    power = 1 << (num_heads.bit_length() - 1)
    slopes = _powers(power)
    if power < num_heads:
        slopes = torch.cat([slopes, _powers(2 * power)[::2][: num_heads - power]])
    return slopes.float()


def layer_slopes(num_heads: int, layer: int, num_layers: int, style: str = "tnl") -> Tensor:
    """Log-decays >= 0 of the heads of one layer, `[num_heads]` fp32; the first layer decays fastest.

    Args:
        layer, num_layers: number of the layer from 0, and of all layers.
        style: "tnl": base_slopes times (1 - l / (L - 1) + 1e-5), the released code of TransNormerLLM and Lightning
            Attention; "minimax": as MiniMax in transformers, powers of two for any number of heads; "paper": (8 h / H)
            (1 - l / L), equation 10 of arXiv 2405.17381. Weights trained with one do not work with another.

    Raises ValueError for an unknown style or a layer outside 0 ... L - 1.
    """
    require_int("num_layers", num_layers, 1)
    require_int("layer", layer, 0)
    if layer >= num_layers:
        raise ValueError(f"layer must be below num_layers={num_layers}, got {layer}")
    if style == "tnl":
        return base_slopes(num_heads) * (1 - layer / max(num_layers - 1, 1) + 1e-5)
    if style == "minimax":
        require_int("num_heads", num_heads, 1)
        return (_powers(num_heads) * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)).float()
    if style == "paper":
        require_int("num_heads", num_heads, 1)
        heads = torch.arange(num_heads, dtype=torch.float64)
        return (8 * heads / num_heads * (1 - layer / num_layers)).float()
    raise ValueError(f"style={style!r} is unknown{did_you_mean(style, list(STYLES))}; allowed: {', '.join(STYLES)}")


def _powers(num_heads: int) -> Tensor:
    return 2.0 ** (-8 * torch.arange(1, num_heads + 1, dtype=torch.float64) / num_heads)
