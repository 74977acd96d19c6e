"""The layer around `ops.key_convolution`: one filter per key channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_attn.checks import require_int, require_one_of
from hf_attn.ops import key_convolution

INITS = ("default", "zeros")


class KeyConvolution(nn.Module):
    """Depthwise causal convolution over the keys of a sequence, with SiLU and a residual; no bias.

    Args:
        channels: key channels, `Hkv * D`.
        width: taps W, odd and >= 3 (3 and 5 are the published ones).
        init: "default" draws as `nn.Conv1d` does (uniform in +- W^-0.5); "zeros" leaves keys unchanged, for models that
            were trained without it (its gradient is not zero there).
    """

    def __init__(self, channels: int, width: int = 3, init: str = "default") -> None:
        super().__init__()
        check_width(width)
        require_one_of("init", init, INITS)
        self.channels, self.width, self.init = channels, width, init
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight anew, as `init` says."""
        if self.init == "zeros":
            nn.init.zeros_(self.weight)
        else:
            bound = self.width**-0.5
            nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, key: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """`key` `[B, Hkv, N, D]`; options and result as in `hf_attn.ops.key_convolution`."""
        return key_convolution(key, self.weight, **options)

    def extra_repr(self) -> str:
        """As torch asks for it: what `print` shows."""
        return f"{self.channels}, width={self.width}, init={self.init!r}"


def check_width(width: Any) -> None:
    """Raise ValueError unless `width` is an odd integer >= 3."""
    require_int("kconv_width", width, 3)
    if width % 2 == 0:
        raise ValueError(f"kconv_width must be odd, got {width}; the published widths are 3 and 5")
