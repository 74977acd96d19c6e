"""Work of a video transformer with VMoBA: the model that reproduces the paper's table (arXiv 2506.23858, table 1)."""

from __future__ import annotations

from dataclasses import dataclass

from hf_attn.checks import require_int, require_share
from hf_attn.grid import TokenGrid


@dataclass(frozen=True)
class Width:
    """Sizes of a transformer; the default is Wan 2.1 1.3B.

    Args:
        layers: number of blocks, each with self-attention, cross-attention to the text and a feed-forward.
        hidden: width; feed_forward: width inside the feed-forward.
        text: tokens of the text.
    """

    layers: int = 30
    hidden: int = 1536
    feed_forward: int = 8960
    text: int = 300


def vmoba_flops(
    grid: TokenGrid,
    *,
    density: float | None = None,
    blocks: tuple[int, int, int] | None = None,
    width: Width | None = None,
) -> float:
    """FLOPs of one forward pass, multiplications and additions each counted.

    Args:
        grid: the latent lattice.
        density: share of the pairs that self-attention computes; `None` with `blocks=None` is dense attention.
        blocks: blocks of the 1D, 2D and 3D partition, of which each has a third of the layers; scoring them costs
            2 * tokens * hidden FLOPs a block.
        width: sizes of the model.

    Raises ValueError when one of density and blocks is given without the other.
    """
    width = width or Width()
    if (density is None) != (blocks is None):
        raise ValueError(f"give density and blocks, or neither for dense attention; got {density!r} and {blocks!r}")
    tokens, hidden = grid.tokens, width.hidden
    projections = 8 * tokens * hidden**2
    cross = 4 * tokens * hidden**2 + 4 * width.text * hidden**2 + 4 * tokens * width.text * hidden
    feed_forward = 4 * tokens * hidden * width.feed_forward
    if density is None or blocks is None:
        attention = 4.0 * tokens**2 * hidden
    else:
        require_share("density", density)
        for number, count in enumerate(blocks):
            require_int(f"blocks[{number}]", count, 1)
        attention = 2 * tokens * hidden * sum(blocks) / 3 + 4 * tokens**2 * density * hidden
    return width.layers * (projections + cross + feed_forward + attention)
