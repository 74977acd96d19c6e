"""What every path of `select_blocks` has to agree on: the rules, the width of the lists, the geometry of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RULES = ("top_k", "density", "threshold", "cumulative")
# Scores that are not finite count as these, so that infinity is left to mark forced and hidden blocks.
LARGEST = 3e38
# A density is a whole number of millionths: its share of the blocks is then the same integer on every path.
DENSITY_UNIT = 1_000_000


@dataclass(frozen=True)
class Rule:
    """How the blocks of one query block are chosen.

    All visible blocks are put in order: forced ones, then by score, on equal scores the later one first. The rule keeps
    the beginning of that order, never less than the forced blocks and, where a block is visible, never nothing.

    name: "top_k": `amount` blocks; "density": the share `amount` of the visible blocks, rounded up; "threshold": blocks
        whose softmax weight is at least `amount`; "cumulative": the fewest blocks whose weights sum to `amount`.
    sinks: the first blocks that are forced; local: the blocks with a query of the query block in them, and `local - 1`
        more before them (and behind them, unless causal), are forced; 0: none of these.
    """

    name: str
    amount: float
    sinks: int
    local: int
    causal: bool
    block_q: int
    block_k: int

    def width(self, k_len: int) -> int:
        """Most blocks that one query block can have among those of `k_len` keys; at least 1."""
        blocks = (k_len + self.block_k - 1) // self.block_k
        if self.name not in ("top_k", "density"):
            return torch.sym_max(blocks, 1)
        kept = int(self.amount) if self.name == "top_k" else self.density_count(blocks)
        return torch.sym_max(torch.sym_min(torch.sym_max(kept, self.most_forced), blocks), 1)

    @property
    def most_forced(self) -> int:
        """Upper bound of the number of forced blocks."""
        if not self.local:
            return self.sinks
        diagonal = (self.block_q + self.block_k - 2) // self.block_k + 1
        return self.sinks + diagonal + (self.local - 1) * (1 if self.causal else 2)

    @property
    def density_units(self) -> int:
        """The density in millionths."""
        return round(self.amount * DENSITY_UNIT)

    def density_count(self, visible: Tensor | int) -> Tensor | int:
        """Blocks that a density keeps of so many visible ones."""
        return (visible * self.density_units + DENSITY_UNIT - 1) // DENSITY_UNIT

    def visible_and_forced(self, q_len: int, k_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Bool `[nq, nk]` each: blocks that a query block may read, and those that it has to, of one sequence.

        A block is visible when one of its keys is visible to one of the queries.
        """
        row = torch.arange(-(-q_len // self.block_q), device=device)[:, None]
        block = torch.arange(-(-k_len // self.block_k), device=device)
        first = row * self.block_q + k_len - q_len
        last = (row * self.block_q + self.block_q).clamp(max=q_len) - 1 + k_len - q_len
        visible = (block * self.block_k <= last) if self.causal else (block >= 0).expand(row.shape[0], -1)
        forced = (block < self.sinks).expand_as(visible)
        if self.local:
            low = first.clamp(min=0) // self.block_k - (self.local - 1)
            high = last.clamp(min=0) // self.block_k + (0 if self.causal else self.local - 1)
            forced = forced | ((block >= low) & (block <= high))
        return visible, forced & visible


def listed(chosen: Tensor, width: int) -> Tensor:
    """Bool `[..., n]` -> int32 `[..., min(width, n)]`: the chosen blocks, ascending, -1 padded."""
    blocks = chosen.shape[-1]
    number = torch.arange(blocks, device=chosen.device, dtype=torch.int32)
    ids = torch.where(chosen, number, blocks).sort(-1).values[..., :width]
    return torch.where(ids == blocks, -1, ids)
