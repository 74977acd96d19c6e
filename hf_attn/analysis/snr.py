"""How to choose block size and top-k for MoBA: the signal-to-noise model of FlashMoBA (arXiv 2511.11571, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from hf_attn.checks import require_int

_NORMAL = NormalDist()


def routing_snr(dmu_eff: float, head_dim: int, block_size: int) -> float:
    """SNR = dmu_eff * sqrt(d / (2 B)): score gap of the signal block over the noise of one other block.

    Args:
        dmu_eff: effective affinity gap of unit-norm keys, dmu + (m - 1)(mu_cluster - mu_noise).
        head_dim: d. block_size: B.
    """
    return dmu_eff * math.sqrt(head_dim / (2 * block_size))


def failure_probability(snr: float) -> float:
    """Phi(-SNR): probability that one given noise block outranks the signal block."""
    return _NORMAL.cdf(-snr)


def required_snr(num_blocks: int, top_k: int) -> float:
    """Phi^-1(1 - k / n): SNR above which the signal block is reliably among the top k of n; -inf when k >= n."""
    require_int("num_blocks", num_blocks, 1)
    require_int("top_k", top_k, 1)
    return -math.inf if top_k >= num_blocks else _NORMAL.inv_cdf(1 - top_k / num_blocks)


@dataclass(frozen=True)
class BlockChoice:
    """One row of `recommend`: a block size at the given budget.

    `snr` and `p_fail` are `None` when no `dmu_eff` was given; `dmu_eff_min` is the gap this choice needs.
    """

    block_size: int
    top_k: int
    num_blocks: int
    density: float
    snr: float | None
    p_fail: float | None
    dmu_eff_min: float


@dataclass(frozen=True)
class Recommendation:
    """All candidate block sizes, smallest first, and the one to use."""

    choices: tuple[BlockChoice, ...]
    best: BlockChoice

    def __str__(self) -> str:
        lines = ["block_size  top_k  blocks  density    SNR  p_fail  dmu_eff_min"]
        for c in self.choices:
            snr = "     -" if c.snr is None else f"{c.snr:6.2f}"
            fail = "     -" if c.p_fail is None else f"{c.p_fail:6.3f}"
            mark = "  <-" if c == self.best else ""
            row = f"{c.block_size:10d} {c.top_k:6d} {c.num_blocks:7d} {c.density:8.1%} {snr}  {fail}"
            lines.append(f"{row} {c.dmu_eff_min:12.2f}{mark}")
        return "\n".join(lines)


def recommend(
    seq_len: int,
    head_dim: int,
    *,
    token_budget: int | None = None,
    sparsity: float | None = None,
    block_sizes: tuple[int, ...] = (32, 64, 128, 256, 512),
    smallest_fast_block: int = 128,
    dmu_eff: float | None = None,
) -> Recommendation:
    """Table of block sizes at one token budget, and the smallest one the kernels run well.

    At a fixed budget C = k B a smaller block needs a smaller affinity gap, `dmu_eff_min = Phi^-1(1 - C / N) *
    sqrt(2 B / d)`: quality asks for small blocks, speed for large ones.

    Args:
        seq_len: tokens N, >= 1. head_dim: d, >= 1.
        token_budget: keys a query reads, or sparsity: share of the keys it does not read, in [0, 1). One of the two.
        block_sizes: candidates, each >= 1; those above the budget are left out.
        smallest_fast_block: block size below which the fast paths lose their speed.
        dmu_eff: affinity gap of your model if known; adds SNR and failure probability.

    Raises:
        ValueError: neither or both budgets, values out of range, or no candidate within the budget.
    """
    require_int("seq_len", seq_len, 1)
    require_int("head_dim", head_dim, 1)
    if token_budget is None and sparsity is not None:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
        token_budget = max(round(seq_len * (1 - sparsity)), 1)
    elif token_budget is None or sparsity is not None:
        raise ValueError("give token_budget or sparsity, exactly one of them")
    require_int("token_budget", token_budget, 1)
    for size in block_sizes:
        require_int("block_sizes", size, 1)
    choices = tuple(
        _choice(seq_len, head_dim, token_budget, size, dmu_eff) for size in sorted(block_sizes) if size <= token_budget
    )
    if not choices:
        raise ValueError(f"every candidate of block_sizes={block_sizes} exceeds the budget of {token_budget} tokens")
    fast = [c for c in choices if c.block_size >= smallest_fast_block]
    return Recommendation(choices, fast[0] if fast else choices[-1])


def _choice(seq_len: int, head_dim: int, budget: int, block_size: int, dmu_eff: float | None) -> BlockChoice:
    top_k = budget // block_size
    num_blocks = -(-seq_len // block_size)
    need = required_snr(num_blocks, top_k)
    snr = None if dmu_eff is None else routing_snr(dmu_eff, head_dim, block_size)
    return BlockChoice(
        block_size=block_size,
        top_k=top_k,
        num_blocks=num_blocks,
        density=min(top_k / num_blocks, 1.0),
        snr=snr,
        p_fail=None if snr is None else failure_probability(snr),
        dmu_eff_min=max(need, 0.0) * math.sqrt(2 * block_size / head_dim),
    )
