"""The work of VMoBA against the paper's table."""

from __future__ import annotations

import pytest

from hf_attn.analysis.vmoba_flops import vmoba_flops
from hf_attn.grid import TokenGrid


@pytest.mark.parametrize("shape, options, tera", [
    ((24, 36, 64), {}, 705.02), ((36, 30, 52), {}, 724.97), ((21, 45, 80), {}, 1246.78), ((21, 20, 32), {}, 67.73),
    ((36, 30, 52), {"density": 0.18, "blocks": (7, 24, 36)}, 248.39),
    ((24, 36, 64), {"density": 0.19, "blocks": (8, 48, 72)}, 248.68),
])  # fmt: skip
def test_the_papers_table(shape, options, tera):
    assert vmoba_flops(TokenGrid(*shape), **options) / 1e12 == pytest.approx(tera, rel=1e-3)


def test_bad_input():
    with pytest.raises(ValueError, match="give density and blocks, or neither"):
        vmoba_flops(TokenGrid(1, 2, 2), density=0.5)
    with pytest.raises(ValueError, match=r"density must be a number in \(0, 1\]"):
        vmoba_flops(TokenGrid(1, 2, 2), density=0, blocks=(1, 1, 1))
    with pytest.raises(ValueError, match=r"blocks\[1\] must be an integer >= 1, got 0"):
        vmoba_flops(TokenGrid(1, 2, 2), density=0.5, blocks=(1, 0, 1))
