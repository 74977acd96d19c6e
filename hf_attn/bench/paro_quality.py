"""Error of PAROAttention's sparse output: chosen axis orders against FHW at the same budget (paroattention.md 8.5).

    python -m hf_attn.bench.paro_quality --seeds 20
    python -m hf_attn.bench.paro_quality --golden tests/golden/paroattention.safetensors

Structured inputs: per head q, k = 0.5 * noise + sum over the axes of w * E[coordinate] with |E| = sqrt(D), w a
permutation of (0.1, 0.9, 0.9). Both sides use the published rule for blocks: forced ones on top of the density.
"""

from __future__ import annotations

import argparse
import json
from itertools import permutations
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from torch import Tensor
from torch.linalg import vector_norm

from hf_attn import ops
from hf_attn.grid import TokenGrid
from hf_attn.mechanisms.paroattention import Reordering, best_orders, block_mass, forced_blocks, keep_blocks
from hf_attn.pattern import BlockPattern

GRIDS = ((4, 8, 8), (6, 8, 6), (3, 8, 12))
HEADS, DIM, BLOCK = 6, 16, 16


def structured(grid: TokenGrid, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value `[1, 6, S, 16]`, a head for each permutation of the weights; text is noise."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(1, HEADS, grid.length, DIM, generator=generator) for _ in range(3)]
    axes = torch.meshgrid(*(torch.arange(size) for size in grid.shape), indexing="ij")
    for head, weights in enumerate(permutations((0.1, 0.9, 0.9))):
        signal = 0
        for weight, size, axis in zip(weights, grid.shape, axes, strict=True):
            table = torch.randn(size, DIM, generator=generator)
            table = table / table.norm(dim=1, keepdim=True) * DIM**0.5
            signal = signal + weight * table[axis.flatten()]
        for x in tensors[:2]:
            x[0, head, grid.lattice] = 0.5 * x[0, head, grid.lattice] + signal
    return tuple(tensors)


def errors(query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid, density: float, block: int, scale: float):
    """Relative errors `[heads]` with the chosen orders and with FHW, and the realised density of both."""
    mass = block_mass(query, key, grid, scale=scale, block_size=block, orders=list(range(6)))
    sizes = {"block_q": block, "block_k": block, "q_len": grid.length, "k_len": grid.length}
    dense = ops.block_sparse_attention(query, key, value, BlockPattern.full(**sizes), scale=scale)
    found, densities = [], []
    chosen = best_orders(mass, grid, block, density, budget="on_top")
    for orders in (chosen, torch.zeros_like(chosen)):
        mine = mass[orders, torch.arange(len(orders))]
        mask = keep_blocks(mine, forced_blocks(mine, grid, block), density, budget="on_top", groups=len(mine))
        pattern = BlockPattern.from_dense(mask[None], **sizes)
        place = Reordering(grid, orders.tolist())
        moved = (place.apply(x) for x in (query, key, value))
        out = place.undo(ops.block_sparse_attention(*moved, pattern, scale=scale))
        found.append(vector_norm(out - dense, dim=(0, 2, 3)) / vector_norm(dense, dim=(0, 2, 3)))
        densities.append(pattern.density())
    return found, densities


def golden(path: Path) -> None:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        query, key, value, choice = (file.get_tensor(name) for name in ("q", "k", "v", "choice"))
        dense, sparse = (file.get_tensor(name) for name in ("out_dense", "out_sparse"))
    text = config["text_tokens"]
    grid = TokenGrid(*config["grid"], *((text, 0) if config["text_first"] else (0, text)))
    ours, plain = _whole(query, key, value, grid, config)
    print(f"orders of the paper {choice.tolist()}: relative error {(sparse - dense).norm() / dense.norm():.3f}")
    print(f"order FHW: {plain:.3f}; orders of our rule: {ours:.3f}")


def _whole(query, key, value, grid, config) -> tuple[float, float]:
    """Relative error over all heads with the chosen orders and with FHW."""
    options = (grid, config["density"], config["block"], config["softmax_scale"])
    (chosen, fhw), _ = errors(query, key, value, *options)
    sizes = {"block_q": config["block"], "block_k": config["block"], "q_len": grid.length, "k_len": grid.length}
    full = BlockPattern.full(**sizes)
    norms = vector_norm(ops.block_sparse_attention(query, key, value, full, scale=options[3]), dim=(0, 2, 3))
    return tuple(float((x * norms).norm() / norms.norm()) for x in (chosen, fhw))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--golden", type=Path, help="the golden file instead of structured inputs")
    args = parser.parse_args()
    if args.golden:
        golden(args.golden)
        return
    print(f"density {args.density}, {args.seeds} seeds x {len(GRIDS)} grids, blocks of {BLOCK}; reduction of the error")
    print(f"{'text':>6}{'median':>9}{'least':>9}{'realised density':>22}")
    for text, sides in (("none", (0, 0)), ("first", (10, 0)), ("last", (0, 10))):
        reductions, realised = [], []
        for size in GRIDS:
            grid = TokenGrid(*size, *sides)
            for seed in range(args.seeds):
                (chosen, fhw), densities = errors(*structured(grid, seed), grid, args.density, BLOCK, DIM**-0.5)
                reductions.append((1 - chosen.square().sum().sqrt() / fhw.square().sum().sqrt()).item())
                realised += densities
        print(f"{text:>6}{median(reductions):9.1%}{min(reductions):9.1%}{min(realised):13.3f} to {max(realised):.3f}")


if __name__ == "__main__":
    main()
