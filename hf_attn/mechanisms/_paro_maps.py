"""What PAROAttention (arXiv 2506.16054) measures on attention maps: scores of axis orders, block mass, kept blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_attn.grid import AXIS_ORDERS, TokenGrid, axis_permutation

# Rows of a map that are held at once.
_ROWS = 512
# At the published size, 17550 tokens, the published epsilon of 1e-3 is this many times the uniform weight.
_AUTO_EPSILON = 17.5


def distinct_orders(grid: TokenGrid) -> list[int]:
    """Ids of the orders that differ on this grid, the lowest of each; an axis of one token has no place in an order."""
    seen: dict[str, int] = {}
    for number, name in enumerate(AXIS_ORDERS):
        seen.setdefault("".join(axis for axis in name if grid.shape["FHW".index(axis)] > 1), number)
    return sorted(seen.values())


def block_mass(
    query: Tensor,
    key: Tensor,
    grid: TokenGrid,
    *,
    scale: float,
    block_size: int,
    orders: list[int],
    real: Tensor | None = None,
    row_sample: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Attention mass of every block of the whole sequence in each order, `[orders, H, nb, nb]`; rows sum to 1.

    mass[i, j] is the sum of softmax(scale * q k^T) over block (i, j) over the number of query rows of block row i; the
    mean over batch rows.

    Args:
        query, key: `[B, H, S, D]`.
        orders: ids of axis orders; text stays where it is.
        real: bool `[B, S]`, False hides padding (keys get no weight, rows are not counted).
        row_sample: share of the query rows to read, drawn with `seed`. A block row without any gets the mean row.

    Computes in fp32 (fp64 for fp64) on the device of `query`; holds S x 512 weights at a time.
    """
    batch, heads, length, _ = query.shape
    grid.check_length(length)
    blocks = -(-length // block_size)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    device = query.device
    places = [axis_permutation(grid, order) for order in orders]
    forward = [place.forward.to(device) for place in places]
    row_block = [place.inverse.to(device) // block_size for place in places]
    rows = torch.arange(length, device=device)
    if row_sample < 1:
        generator = torch.Generator().manual_seed(seed)
        count = max(round(row_sample * length), 1)
        rows = torch.randperm(length, generator=generator)[:count].sort().values.to(device)
    mass = torch.zeros(len(orders), heads, blocks, blocks, dtype=dtype, device=device)
    padding = blocks * block_size - length
    for b in range(batch):
        mine = rows if real is None else rows[real[b, rows]]
        counts = [torch.bincount(place[mine], minlength=blocks) for place in row_block]
        for h in range(heads):
            keys = key[b, h].to(dtype)
            total = torch.zeros(len(orders), blocks, blocks, dtype=dtype, device=device)
            for part in mine.split(_ROWS):
                scores = keys @ query[b, h, part].to(dtype).mT * scale
                if real is not None:
                    scores.masked_fill_(~real[b, :, None], float("-inf"))
                weights = scores.softmax(0)  # [S, rows]
                for number, order in enumerate(forward):
                    moved = weights[order]
                    if padding:
                        moved = torch.nn.functional.pad(moved, (0, 0, 0, padding))
                    summed = moved.unflatten(0, (blocks, block_size)).sum(1)
                    total[number].index_add_(0, row_block[number][part], summed.mT)
            for number, sizes in enumerate(counts):
                found = total[number] / sizes.clamp(min=1)[:, None]
                empty = sizes == 0
                if bool(empty.any()):
                    found[empty] = found[~empty].mean(0)
                mass[number, h] += found / batch
    return mass


def order_scores(
    query: Tensor,
    key: Tensor,
    grid: TokenGrid,
    *,
    scale: float,
    block_size: int,
    epsilon: float | str = "auto",
    sigma: float = 0.9,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """M_sparse and M_quant of the paper, `[H, 6]` each, means over batch rows.

    Blocks are cut from the first lattice token; the trailing partial block row and column are left out. M_sparse is the
    share of blocks in which at least a share `sigma` of the weights is below `epsilon` ("auto": 17.5 / lattice tokens),
    M_quant the mean over blocks of max / mean (1 for an all-zero block). Both are 0 on lattices below one block.
    """
    batch, heads, length, _ = query.shape
    grid.check_length(length)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    epsilon = _AUTO_EPSILON / grid.tokens if epsilon == "auto" else float(epsilon)
    blocks, size = grid.tokens // block_size, block_size
    sparse, quant = torch.zeros(2, heads, len(AXIS_ORDERS), dtype=dtype, device=query.device)
    if not blocks:
        return sparse, quant
    least = math.ceil(sigma * size * size - 1e-9)
    for number in range(len(AXIS_ORDERS)):
        order = axis_permutation(grid, number, text="none").forward.to(query.device)[: blocks * size] + grid.text_before
        for b in range(batch):
            for h in range(heads):
                keys = key[b, h].to(dtype)
                for rows in order.split(max(_ROWS // size, 1) * size):
                    scores = query[b, h, rows].to(dtype) @ keys.mT * scale
                    if real is not None:
                        scores.masked_fill_(~real[b], float("-inf"))
                    parts = scores.softmax(1)[:, order].unflatten(1, (blocks, size)).unflatten(0, (-1, size))
                    sparse[h, number] += ((parts < epsilon).sum((1, 3)) >= least).sum()
                    mean = parts.mean((1, 3))
                    ratio = parts.amax((1, 3)) / torch.where(mean == 0, 1, mean)
                    quant[h, number] += torch.where(mean == 0, 1, ratio).sum()
    return sparse / (batch * blocks**2), quant / (batch * blocks**2)


def paper_score(sparse: Tensor, quant: Tensor, alpha: float = 0.5) -> Tensor:
    """alpha (1 - M_sparse) / sum + (1 - alpha) M_quant / sum over the orders, `[..., 6]`; the least one is chosen.

    The paper prints M_sparse in the first term, which would prefer the least sparse order.
    """

    def share(x: Tensor) -> Tensor:
        total = x.sum(-1, keepdim=True)
        return torch.where(total == 0, 0, x / torch.where(total == 0, 1, total))

    return alpha * share(1 - sparse) + (1 - alpha) * share(quant)


def forced_blocks(mass: Tensor, grid: TokenGrid, block_size: int) -> Tensor:
    """Blocks that are always kept, bool like `mass` `[..., nb, nb]`: rows and columns with text, the last row and
    column, and the heaviest block of every row (the first of equal ones)."""
    blocks = mass.shape[-1]
    first = torch.arange(blocks, device=mass.device) * block_size
    text = (first < grid.text_before) | (first + block_size > grid.lattice.stop) & (grid.text_after > 0)
    text = text & (first < grid.length)
    text[-1] = True
    heaviest = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.argmax(-1, keepdim=True), True)
    return heaviest | text | text[:, None]


def keep_blocks(mass: Tensor, forced: Tensor, density: float, *, budget: str = "total", groups: int = 1) -> Tensor:
    """The heaviest blocks and the forced ones, bool `[N, nb, nb]`.

    Args:
        mass, forced: `[N, nb, nb]`, N maps (heads) that share a budget in runs of N / `groups`.
        density: share of the blocks, in (0, 1].
        budget: "total" counts forced blocks in the share; "on_top" adds them to it (the published rule).

    Of equal masses the first block in row-major order wins.
    """
    ranked = mass if budget == "on_top" else mass.masked_fill(forced, float("inf"))
    flat = ranked.reshape(groups, -1)
    count = math.floor(density * flat.shape[1] + 0.5)
    best = flat.sort(stable=True, dim=-1, descending=True).indices[:, :count]
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True)
    return kept.view(mass.shape) | forced


def best_orders(mass: Tensor, grid: TokenGrid, block_size: int, density: float, *, budget: str = "total") -> Tensor:
    """For every head the order whose kept blocks retain most mass, the first of equal ones: places `[H]` in dim 0.

    Args:
        mass: `[orders, H, nb, nb]`, or `[G, orders, H, nb, nb]` to sum over G groups of steps.
    """
    mass = mass[None] if mass.dim() == 4 else mass
    groups, orders, heads, blocks = mass.shape[:4]
    retained = mass.new_zeros(orders, heads)
    for maps in mass:
        flat = maps.reshape(-1, blocks, blocks)
        kept = keep_blocks(flat, forced_blocks(flat, grid, block_size), density, budget=budget, groups=len(flat))
        retained += (flat * kept).sum((1, 2)).view(orders, heads)
    # Rounding must not move a head away from the first order.
    better = retained > retained[:1] * (1 + 1e-6)
    return torch.where(better, retained, torch.where(retained == retained[:1], retained, retained[:1] - 1)).argmax(0)


def pack_bits(mask: Tensor) -> Tensor:
    """Bool `[..., n]` -> uint8 `[..., ceil(n / 8)]`, little end first."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """Inverse of `pack_bits`: bool `[..., length]`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :length].bool()
