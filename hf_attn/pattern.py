"""BlockPattern: which key blocks each query block reads."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from hf_attn.checks import require_int


@dataclass(frozen=True)
class BlockPattern:
    """A block-sparse selection, as padded lists of key blocks.

    Args:
        indices: int32 `[B | 1, Hq | Hkv | 1, nq, M]`: key blocks that each of the `nq = ceil(q_len / block_q)` query
            blocks reads, -1 padded, ascending, no block twice.
        block_q, block_k: tokens per query and key block, >= 1.
        q_len, k_len: tokens. With `q_len != k_len` queries are the last tokens (bottom-right alignment).

    Build one with `from_dense`, `from_indices`, or a named builder (`causal_blocks`, `window`, ...); combine with
    `|`, `&`, `-`, `^` and `~`.
    """

    indices: Tensor
    block_q: int
    block_k: int
    q_len: int
    k_len: int

    # -- construction ------------------------------------------------------------------------------------------------

    @classmethod
    def from_dense(cls, mask: Tensor, *, block_q: int, block_k: int, q_len: int, k_len: int) -> BlockPattern:
        """From a block mask, bool `[B | 1, Hq | Hkv | 1, ceil(q_len / block_q), ceil(k_len / block_k)]`.

        Raises ValueError for a mask of another shape or dtype.
        """
        num_q, num_k = _check_sizes(block_q, block_k, q_len, k_len)
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2:] != (num_q, num_k):
            raise ValueError(
                f"mask must be bool [batch, heads, {num_q}, {num_k}] for q_len={q_len}, k_len={k_len}, "
                f"block_q={block_q}, block_k={block_k}; got {mask.dtype} {tuple(mask.shape)}"
            )
        blocks = torch.arange(num_k, device=mask.device, dtype=torch.int32)
        listed = torch.where(mask, blocks, num_k).sort(-1).values
        longest = max(int(mask.sum(-1).max()) if mask.numel() else 0, 1)
        if num_k == 0:
            listed = blocks.new_full((*mask.shape[:3], 1), 0)
        listed = listed[..., :longest]
        return cls(torch.where(listed == num_k, -1, listed).to(torch.int32), block_q, block_k, q_len, k_len)

    @classmethod
    def from_indices(cls, indices: Tensor, *, block_q: int, block_k: int, q_len: int, k_len: int) -> BlockPattern:
        """From lists of key blocks, int `[B | 1, Hq | Hkv | 1, ceil(q_len / block_q), M]`, -1 padded, any order.

        Raises ValueError for lists of another shape or dtype, and blocks that do not exist.
        """
        num_q, num_k = _check_sizes(block_q, block_k, q_len, k_len)
        if indices.dim() != 4 or indices.shape[2] != num_q or indices.is_floating_point() or indices.shape[3] == 0:
            raise ValueError(
                f"indices must be an integer tensor [batch, heads, {num_q}, max_selected >= 1], got {indices.dtype} "
                f"{tuple(indices.shape)}"
            )
        if indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < num_k:
            raise ValueError(
                f"indices must lie in -1 (unused) to {num_k - 1}, got {int(indices.min())} to {int(indices.max())}"
            )
        ordered = torch.where(indices < 0, num_k, indices).sort(-1).values
        repeated = torch.zeros_like(ordered, dtype=torch.bool)
        repeated[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
        ordered = torch.where(repeated, num_k, ordered).sort(-1).values
        return cls(torch.where(ordered == num_k, -1, ordered).to(torch.int32), block_q, block_k, q_len, k_len)

    @classmethod
    def full(cls, *, block_q: int, block_k: int, q_len: int, k_len: int, device: str = "cpu") -> BlockPattern:
        """Every key block for every query block."""
        return cls._from_rule(lambda q, k: torch.ones_like(q < k), block_q, block_k, q_len, k_len, device)

    @classmethod
    def causal_blocks(cls, *, block_q: int, block_k: int, q_len: int, k_len: int, device: str = "cpu") -> BlockPattern:
        """Every key block that holds a key at or before the last query of the query block."""
        offset = k_len - q_len

        def rule(first_q: Tensor, first_k: Tensor) -> Tensor:
            last_q = (first_q + block_q - 1).clamp(max=q_len - 1) + offset
            return first_k <= last_q

        return cls._from_rule(rule, block_q, block_k, q_len, k_len, device)

    @classmethod
    def window(
        cls, window: int, *, block_q: int, block_k: int, q_len: int, k_len: int, device: str = "cpu"
    ) -> BlockPattern:
        """Blocks that hold a key among the last `window` ones of some query of the query block, itself included."""
        offset = k_len - q_len

        def rule(first_q: Tensor, first_k: Tensor) -> Tensor:
            first, last = first_q + offset, (first_q + block_q - 1).clamp(max=q_len - 1) + offset
            return (first_k <= last) & (first_k + block_k - 1 >= first - window + 1)

        return cls._from_rule(rule, block_q, block_k, q_len, k_len, device)

    @classmethod
    def prefix(
        cls, tokens: int, *, block_q: int, block_k: int, q_len: int, k_len: int, device: str = "cpu"
    ) -> BlockPattern:
        """Blocks that hold one of the first `tokens` keys (attention sinks, global prefix)."""
        return cls._from_rule(
            lambda q, k: (k < tokens) & torch.ones_like(q, dtype=torch.bool), block_q, block_k, q_len, k_len, device
        )

    @classmethod
    def _from_rule(cls, rule, block_q: int, block_k: int, q_len: int, k_len: int, device: str) -> BlockPattern:
        num_q, num_k = _check_sizes(block_q, block_k, q_len, k_len)
        first_q = torch.arange(num_q, device=device)[:, None] * block_q
        first_k = torch.arange(num_k, device=device)[None] * block_k
        mask = rule(first_q, first_k).expand(num_q, num_k)
        return cls.from_dense(mask[None, None], block_q=block_q, block_k=block_k, q_len=q_len, k_len=k_len)

    # -- views -------------------------------------------------------------------------------------------------------

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def num_k_blocks(self) -> int:
        return -(-self.k_len // self.block_k)

    def to_dense(self) -> Tensor:
        """The block mask, bool `[B | 1, H | 1, nq, nk]`."""
        num_k = self.num_k_blocks
        mask = torch.zeros(*self.indices.shape[:3], num_k + 1, dtype=torch.bool, device=self.indices.device)
        mask.scatter_(3, torch.where(self.indices < 0, num_k, self.indices).long(), True)
        return mask[..., :num_k]

    def to_token_mask(self, *, causal: bool = False) -> Tensor:
        """The (query, key) pairs that are computed and allowed, bool `[B | 1, H | 1, q_len, k_len]` (quadratic)."""
        mask = self.to_dense().repeat_interleave(self.block_q, 2)[:, :, : self.q_len]
        mask = mask.repeat_interleave(self.block_k, 3)[..., : self.k_len]
        if causal:
            rows = torch.arange(self.k_len - self.q_len, self.k_len, device=mask.device)[:, None]
            mask = mask & (torch.arange(self.k_len, device=mask.device) <= rows)
        return mask

    def pairs(self, *, causal: bool = False) -> tuple[int, int]:
        """Allowed pairs inside the selected blocks, and allowed pairs of dense attention, over all rows and heads."""
        allowed = self._allowed_pairs(causal)
        mask = self.to_dense()
        rows = mask.shape[0] * mask.shape[1]
        return int((mask * allowed).sum()), int(allowed.sum()) * rows

    def density(self, *, causal: bool = False) -> float:
        """Share of the visible (query, key) pairs that is computed, in [0, 1] (causal: of the causal pairs)."""
        computed, visible = self.pairs(causal=causal)
        return computed / visible if visible else 0.0

    def _allowed_pairs(self, causal: bool) -> Tensor:
        """Number of allowed (query, key) pairs in every block, int64 `[nq, nk]`."""
        device = self.indices.device
        first_k = torch.arange(self.num_k_blocks, device=device) * self.block_k
        width = (self.k_len - first_k).clamp(max=self.block_k)
        position = torch.arange(self.q_len, device=device)[:, None] + (self.k_len - self.q_len)
        reach = torch.full_like(position, self.k_len) if not causal else position + 1
        per_row = torch.minimum((reach - first_k).clamp(min=0), width)
        pairs = torch.zeros(self.num_q_blocks, self.num_k_blocks, dtype=torch.int64, device=device)
        return pairs.index_add_(0, torch.arange(self.q_len, device=device) // self.block_q, per_row)

    # -- set algebra -------------------------------------------------------------------------------------------------

    def __or__(self, other: BlockPattern) -> BlockPattern:
        return self._combine(other, torch.logical_or)

    def __and__(self, other: BlockPattern) -> BlockPattern:
        return self._combine(other, torch.logical_and)

    def __sub__(self, other: BlockPattern) -> BlockPattern:
        return self._combine(other, lambda a, b: a & ~b)

    def __xor__(self, other: BlockPattern) -> BlockPattern:
        return self._combine(other, torch.logical_xor)

    def __invert__(self) -> BlockPattern:
        return self._like(~self.to_dense())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockPattern):
            return NotImplemented
        return self._geometry() == other._geometry() and torch.equal(self.to_dense(), other.to_dense())

    __hash__ = None  # type: ignore[assignment]  # the way Python spells an unhashable class

    def _combine(self, other: BlockPattern, operation) -> BlockPattern:
        if not isinstance(other, BlockPattern):
            return NotImplemented
        if self._geometry() != other._geometry():
            raise ValueError(
                "patterns combine only with the same (block_q, block_k, q_len, k_len), got "
                f"{self._geometry()} and {other._geometry()}"
            )
        return self._like(operation(self.to_dense(), other.to_dense().to(self.indices.device)))

    def _like(self, mask: Tensor) -> BlockPattern:
        return BlockPattern.from_dense(
            mask, block_q=self.block_q, block_k=self.block_k, q_len=self.q_len, k_len=self.k_len
        )

    def _geometry(self) -> tuple[int, int, int, int]:
        return self.block_q, self.block_k, self.q_len, self.k_len

    # -- picture -----------------------------------------------------------------------------------------------------

    def plot(self, path: str | PathLike, *, causal: bool = False, title: str | None = None) -> None:
        """Write a PNG: one panel a head (at most 12), dark where a query block reads a key block.

        With `causal`, blocks that lie wholly in the future are grey. Needs matplotlib; raises ImportError with the
        install line when it is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('a picture needs matplotlib: pip install "hf-attn[bench]"') from error
        picture = self.to_dense()[0].float().cpu()
        heads = min(picture.shape[0], 12)
        if causal:
            hidden = self._allowed_pairs(True).cpu() == 0
            picture = picture.masked_fill(hidden & (picture == 0), 0.15)
        columns = min(heads, 4)
        rows = -(-heads // columns)
        figure = Figure(figsize=(3.0 * columns + 0.4, 3.0 * rows + 0.7), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for number, panel in enumerate(panels):
            if number >= heads:
                panel.set_axis_off()
                continue
            panel.imshow(picture[number].numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
            panel.set_title(f"head {number}" if heads > 1 else "all heads", fontsize=8)
            panel.set_xlabel(f"key block ({self.block_k} tokens)", fontsize=7)
            panel.set_ylabel(f"query block ({self.block_q} tokens)", fontsize=7)
            panel.tick_params(labelsize=6)
        figure.suptitle(title or f"density {self.density(causal=causal):.1%}", fontsize=10)
        figure.savefig(path, dpi=120)


def _check_sizes(block_q: int, block_k: int, q_len: int, k_len: int) -> tuple[int, int]:
    """Numbers of query and key blocks; raises ValueError naming the bad size."""
    require_int("block_q", block_q, 1)
    require_int("block_k", block_k, 1)
    require_int("q_len", q_len, 0)
    require_int("k_len", k_len, 0)
    return -(-q_len // block_q), -(-k_len // block_k)
