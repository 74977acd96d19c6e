"""Error of PSA against plain keep/drop at equal density, on fields from white noise to very smooth.

    python -m hf_attn.bench.psa_quality --golden tests/golden/psa.safetensors

Both take the same importances. Error is the Frobenius norm of the difference to dense attention over that of dense
attention. A ratio below 1 means that spending the same work on pooled blocks is better than keeping fewer in full.
"""

from __future__ import annotations

import argparse
import json
import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn import ops
from hf_attn.call import TokenLayout
from hf_attn.grid import TokenGrid, hilbert_permutation
from hf_attn.mechanisms.psa import PSAConfig

GRID = TokenGrid(8, 16, 16)
HEADS, DIM, BLOCK = 4, 32, 32
WIDTHS = (0.0, 0.5, 1.0, 2.0, 4.0)
DENSITIES = (0.125, 0.175, 0.22, 0.235, 0.25, 0.35)
# Blur of fields that the tests call very smooth.
VERY_SMOOTH = 4.0


def smooth_field(width: float, seed: int, grid: TokenGrid = GRID, heads: int = HEADS, dim: int = DIM) -> list[Tensor]:
    """Query, key and value `[1, heads, tokens, dim]`: Gaussian noise on the grid, blurred by a Gaussian of `width`
    tokens in every direction (0 = white noise), each channel of mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, heads, dim, *grid.shape, generator=generator, dtype=torch.float64)
    axes = [torch.fft.fftfreq(size, dtype=torch.float64) for size in grid.shape]
    squared = sum(f**2 for f in torch.meshgrid(*axes, indexing="ij"))
    filtered = torch.fft.ifftn(
        torch.fft.fftn(noise, dim=(3, 4, 5)) * torch.exp(-2 * (math.pi * width) ** 2 * squared), dim=(3, 4, 5)
    ).real.flatten(3)
    filtered = (filtered - filtered.mean(-1, keepdim=True)) / filtered.std(-1, keepdim=True)
    return [x[None].mT.contiguous().float() for x in filtered]


def relative_error(query: Tensor, key: Tensor, value: Tensor, levels: Tensor, block_q: int, block_k: int) -> float:
    """Of pyramid attention with these levels."""
    dense = scaled_dot_product_attention(query, key, value)
    out = ops.pyramid_attention(query, key, value, levels, block_q=block_q, block_k=block_k)
    return float((out - dense).norm() / dense.norm())


def density(levels: Tensor, length: int, block_q: int, block_k: int) -> float:
    tokens = TokenLayout.full(levels.shape[0], length)
    computed, visible = ops.pyramid_pairs(levels, block_q=block_q, block_k=block_k, causal=False, tokens=tokens)
    return float(computed / visible)


def compare(tensors: list[Tensor], wanted: float, grid: TokenGrid = GRID, block: int = BLOCK) -> dict[str, float]:
    """Errors and realised densities of both; keep/drop takes whole blocks of every row, PSA meets its density."""
    order = hilbert_permutation(grid)
    query, key, value = (order.apply(x) for x in tensors)
    rule = {"block_q": block, "block_k": block, "seed": 0}
    blocks = -(-grid.length // block)
    share = round(wanted * blocks) / blocks
    dropped = ops.select_levels(query, key, mode="quantile", bounds=[share + 1e-9] * 4, **rule)
    kept = density(dropped, grid.length, block, block)
    mode, bounds, wanted = PSAConfig(density=kept).rule(causal=False)
    levels = ops.select_levels(query, key, mode=mode, bounds=bounds, density=wanted, **rule)
    return {
        "density": density(levels, grid.length, block, block),
        "keep/drop density": kept,
        "error": relative_error(query, key, value, levels, block, block),
        "keep/drop error": relative_error(query, key, value, dropped, block, block),
    }


def golden(path: str) -> dict[str, dict[str, float]]:
    """On a golden file: its own threshold levels, and ours at exactly the density of keep/drop (psa.md 8.7)."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        query, key, value = (file.get_tensor(name) for name in "qkv")
        offsets = file.get_tensor("sample_q"), file.get_tensor("sample_k")
    order = hilbert_permutation(TokenGrid(*config["grid"]))
    query, key, value = (order.apply(x) for x in (query, key, value))
    sizes = {"block_q": config["block_q"], "block_k": config["block_k"]}
    importance = ops.sampled_importance(query, key, *offsets, **sizes)
    bounds = [config["thresholds"][level] for level in ("1", "2", "4", "8")]
    levels = ops.assign_levels(importance, mode="threshold", bounds=bounds)
    share = config["density"]["threshold"]
    dropped = ops.assign_levels(importance, mode="quantile", bounds=[share] * 4)
    length, kept = query.shape[2], density(dropped, query.shape[2], **sizes)
    mode, ours, wanted = PSAConfig(density=kept).rule(causal=False)
    fitted = ops.select_levels(query, key, mode=mode, bounds=ours, density=wanted, **sizes)
    return {
        name: {
            "density": density(chosen, length, **sizes),
            "keep/drop density": kept,
            "error": relative_error(query, key, value, chosen, **sizes),
            "keep/drop error": relative_error(query, key, value, dropped, **sizes),
        }
        for name, chosen in (("golden file, its bounds", levels), ("golden file, fitted", fitted))
    }


def show(name: str, result: dict[str, float]) -> None:
    error, drop = result["error"], result["keep/drop error"]
    print(
        f"{name:34}{result['density']:9.3f}{result['keep/drop density']:11.3f}{error:9.3f}{drop:11.3f}"
        f"{error / drop:8.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", help="a golden file of PSA to measure as well")
    parser.add_argument("--seeds", type=int, default=5, help="fields of each kind")
    args = parser.parse_args()
    print(f"grid {'x'.join(map(str, GRID.shape))}, {HEADS} heads x {DIM}, blocks of {BLOCK}, Hilbert order")
    print(f"{'field':34}{'density':>9}{'keep/drop':>11}{'error':>9}{'keep/drop':>11}{'ratio':>8}")
    if args.golden:
        for name, result in golden(args.golden).items():
            show(name, result)
    for width in WIDTHS:
        for wanted in DENSITIES:
            results = [compare(smooth_field(width, seed), wanted) for seed in range(args.seeds)]
            worst = max(results, key=lambda r: r["error"] / r["keep/drop error"])
            show(f"blur {width:g} tokens, worst of {args.seeds}", worst)


if __name__ == "__main__":
    main()
