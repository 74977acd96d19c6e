"""TokenGrid: tokens that lie on a lattice (video, image), and cached orders and partitions as functions of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from hf_attn.checks import require_int, require_one_of

# Order id -> axes from slowest to fastest, as PAROAttention numbers them (arXiv 2506.16054).
AXIS_ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
TEXT_PLACES = ("keep", "last", "none")
_CACHED = 256  # orders kept; a model has one grid a resolution and a few orders of it

Block = int | float | tuple[int, int] | tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """A sequence of `text_before` tokens, then frames x height x width lattice tokens (W fastest), then `text_after`.

    Args:
        frames, height, width: lattice size in tokens, >= 1; an image has one frame.
        text_before, text_after: tokens before and after the lattice that are not on it (text, references), >= 0.
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            require_int(name, getattr(self, name), 1)
        for name in ("text_before", "text_after"):
            require_int(name, getattr(self, name), 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.frames, self.height, self.width

    @property
    def tokens(self) -> int:
        """Tokens on the lattice."""
        return self.frames * self.height * self.width

    @property
    def text(self) -> int:
        """Tokens beside the lattice."""
        return self.text_before + self.text_after

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.tokens + self.text

    @property
    def lattice(self) -> slice:
        """Where the lattice tokens sit in the sequence."""
        return slice(self.text_before, self.text_before + self.tokens)

    def check_length(self, length: int) -> None:
        """Raise ValueError unless the grid describes a sequence of `length` tokens."""
        if self.length != length:
            raise ValueError(
                f"grid {self.frames}x{self.height}x{self.width} with {self.text_before} tokens before and "
                f"{self.text_after} after describes {self.length} tokens, but the sequence has {length}"
            )


@dataclass(frozen=True, eq=False)
class Permutation:
    """A reordering of a token axis and its inverse; lives on the CPU, copies on other devices are kept.

    Args:
        forward: int64 `[N]`, `forward[new] = old`.
        inverse: int64 `[N]`, `inverse[old] = new`.
        is_identity: nothing moves.
    """

    forward: Tensor
    inverse: Tensor
    is_identity: bool
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, forward: Tensor) -> Permutation:
        """From `forward[new] = old`, int `[N]`."""
        # The result outlives this call: an inference tensor could not be used where gradients are wanted later.
        with torch.inference_mode(False):
            forward = forward.to("cpu", torch.int64, copy=True)
            positions = torch.arange(forward.numel())
            inverse = torch.empty_like(forward).scatter_(0, forward, positions)
            return cls(forward, inverse, bool((forward == positions).all()))

    def apply(self, x: Tensor, dim: int = -2) -> Tensor:
        """Tokens of x `[..., N, D]` (along `dim`) in the new order; x itself when nothing moves. Differentiable."""
        return x if self.is_identity else x.index_select(dim, self._on(x.device)[0])

    def undo(self, x: Tensor, dim: int = -2) -> Tensor:
        """The inverse of `apply`, of x `[..., N, D]`."""
        return x if self.is_identity else x.index_select(dim, self._on(x.device)[1])

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device.type == "cpu":
            return self.forward, self.inverse
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = self.forward.to(device), self.inverse.to(device)
        return self._copies[device]


@dataclass(frozen=True, eq=False)
class Partition:
    """Blocks of a lattice. After `permutation` every block is a run of consecutive tokens.

    Args:
        permutation: of the lattice tokens alone, row-major to block-major.
        block: the block as it was asked for.
        block_tokens: tokens per block; only the last block of a 1D partition may be shorter.
        counts: blocks along (frames, height, width); (n, 1, 1) for 1D.
        tokens: tokens of the lattice.
    """

    permutation: Permutation
    block: Block
    block_tokens: int
    counts: tuple[int, int, int]
    tokens: int

    @property
    def num_blocks(self) -> int:
        return math.prod(self.counts)

    def block_of(self) -> Tensor:
        """The block of every lattice token in row-major order, int64 `[N]` (CPU)."""
        return self.permutation.inverse.div(self.block_tokens, rounding_mode="floor")


# -- orders ----------------------------------------------------------------------------------------------------------


@lru_cache(_CACHED)
def axis_permutation(grid: TokenGrid, order: int | str, *, text: str = "keep") -> Permutation:
    """Lattice tokens in one of the six axis orders, e.g. "HWF": height slowest, frames fastest.

    Args:
        order: a name of `AXIS_ORDERS` or its index there.
        text: "keep" covers the whole sequence, other tokens stay where they are; "last" moves them behind the lattice;
            "none" gives a permutation of the lattice tokens alone.
    """
    if isinstance(order, int) and not isinstance(order, bool) and 0 <= order < len(AXIS_ORDERS):
        order = AXIS_ORDERS[order]
    require_one_of("order", order, AXIS_ORDERS)
    index = torch.arange(grid.tokens).view(grid.shape).permute(["FHW".index(axis) for axis in str(order)])
    return _with_text(grid, index.reshape(-1), text)


@lru_cache(_CACHED)
def hilbert_permutation(grid: TokenGrid, *, text: str = "keep") -> Permutation:
    """Lattice tokens along a generalised Hilbert curve ("Gilbert" order), for boxes of any size.

    Neighbours on the curve are neighbours on the lattice where all sizes are even; odd sizes give a few longer steps.
    `text` as in `axis_permutation`.
    """
    frames, height, width = grid.shape
    # Axes as (frame, row, column) vectors; the curve travels along the longest one.
    f, h, w = (frames, 0, 0), (0, height, 0), (0, 0, width)
    if width >= max(height, frames):
        box = (w, h, f)
    elif height >= frames:
        box = (h, w, f)
    else:
        box = (f, w, h)
    cells: list[tuple[int, int, int]] = []
    _curve(cells, (0, 0, 0), *box)
    coordinates = torch.tensor(cells, dtype=torch.int64)
    index = (coordinates[:, 0] * height + coordinates[:, 1]) * width + coordinates[:, 2]
    return _with_text(grid, index, text)


@lru_cache(_CACHED)
def partition(grid: TokenGrid, block: Block) -> Partition:
    """Cut the lattice into blocks (VMoBA, arXiv 2506.23858, section 3.1).

    Args:
        block: a number s: 1D, runs of int(s * height * width) consecutive tokens (s frames), the last one may be
            shorter; (s_h, s_w): 2D, columns of s_h x s_w tokens through all frames; (s_t, s_h, s_w): 3D boxes, which is
            also the tile order of 3D windows.

    Raises ValueError for 2D and 3D blocks that do not divide the lattice, with the sizes that do.
    """
    if isinstance(block, int | float) and not isinstance(block, bool):
        return _partition_1d(grid, block)
    if not isinstance(block, tuple) or len(block) not in (2, 3):
        raise ValueError(f"block must be a number, (height, width) or (frames, height, width), got {block!r}")
    sizes = block if len(block) == 3 else (grid.frames, *block)
    for axis, size, length in zip(("frames", "height", "width"), sizes, grid.shape, strict=True):
        require_int(f"block size along {axis}", size, 1)
        if length % size:
            raise ValueError(
                f"block {block} does not divide the grid {'x'.join(map(str, grid.shape))}: {axis} {length} % {size} = "
                f"{length % size}; sizes that divide {axis}: {', '.join(map(str, divisors(length)))}"
            )
    frames, height, width = (length // size for length, size in zip(grid.shape, sizes, strict=True))
    counts = (frames, height, width)
    split = [part for pair in zip(counts, sizes, strict=True) for part in pair]
    index = torch.arange(grid.tokens).view(split).permute(0, 2, 4, 1, 3, 5)
    return Partition(Permutation.of(index.reshape(-1)), block, math.prod(sizes), counts, grid.tokens)


def _partition_1d(grid: TokenGrid, frames: int | float) -> Partition:
    size = int(frames * grid.height * grid.width)
    if size < 1:
        raise ValueError(f"block of {frames} frames holds no token of a {grid.height}x{grid.width} frame; use a larger")
    size = min(size, grid.tokens)
    order = Permutation.of(torch.arange(grid.tokens))
    return Partition(order, frames, size, (-(-grid.tokens // size), 1, 1), grid.tokens)


def _with_text(grid: TokenGrid, lattice: Tensor, text: str) -> Permutation:
    require_one_of("text", text, TEXT_PLACES)
    if text == "none" or not grid.text:
        return Permutation.of(lattice)
    before = torch.arange(grid.text_before)
    after = torch.arange(grid.text_before + grid.tokens, grid.length)
    lattice = lattice + grid.text_before
    parts = [before, lattice, after] if text == "keep" else [lattice, before, after]
    return Permutation.of(torch.cat(parts))


# -- the curve -------------------------------------------------------------------------------------------------------

Vector = tuple[int, int, int]


def _curve(cells: list[Vector], p: Vector, a: Vector, b: Vector, c: Vector) -> None:
    """Append the cells of the box at corner `p` with axis vectors `a` (direction of travel), `b`, `c`.

    Each vector has one non-zero component; a negative one walks backwards. Follows the published recursion for boxes
    of any size: halve (to an even part where possible), cross the halves in an order whose ends touch.
    """
    w, h, d = (abs(sum(axis)) for axis in (a, b, c))
    for axis, lengths in ((a, (h, d)), (b, (w, d)), (c, (w, h))):
        if lengths == (1, 1):
            _walk(cells, p, axis)
            return
    da, db, dc = _unit(a), _unit(b), _unit(c)
    half_a, half_b, half_c = _half(a, da, w), _half(b, db, h), _half(c, dc, d)
    if 2 * w > 3 * h and 2 * w > 3 * d:
        _curve(cells, p, half_a, b, c)
        _curve(cells, _add(p, half_a), _sub(a, half_a), b, c)
    elif 3 * h > 4 * d:
        _curve(cells, p, half_b, c, half_a)
        _curve(cells, _add(p, half_b), a, _sub(b, half_b), c)
        corner = _add(p, _sub(a, da), _sub(half_b, db))
        _curve(cells, corner, _neg(half_b), c, _neg(_sub(a, half_a)))
    elif 3 * d > 4 * h:
        _curve(cells, p, half_c, half_a, b)
        _curve(cells, _add(p, half_c), a, b, _sub(c, half_c))
        corner = _add(p, _sub(a, da), _sub(half_c, dc))
        _curve(cells, corner, _neg(half_c), _neg(_sub(a, half_a)), b)
    else:
        _curve(cells, p, half_b, half_c, half_a)
        _curve(cells, _add(p, half_b), c, half_a, _sub(b, half_b))
        corner = _add(p, _sub(half_b, db), _sub(c, dc))
        _curve(cells, corner, a, _neg(half_b), _neg(_sub(c, half_c)))
        corner = _add(p, _sub(a, da), half_b, _sub(c, dc))
        _curve(cells, corner, _neg(c), _neg(_sub(a, half_a)), _sub(b, half_b))
        corner = _add(p, _sub(a, da), _sub(half_b, db))
        _curve(cells, corner, _neg(half_b), half_c, _neg(_sub(a, half_a)))


def _walk(cells: list[Vector], p: Vector, axis: Vector) -> None:
    f, h, w = _unit(axis)
    cells += [(p[0] + i * f, p[1] + i * h, p[2] + i * w) for i in range(abs(sum(axis)))]


def _unit(v: Vector) -> Vector:
    f, h, w = ((x > 0) - (x < 0) for x in v)
    return f, h, w


def _half(v: Vector, unit: Vector, length: int) -> Vector:
    half = (v[0] // 2, v[1] // 2, v[2] // 2)
    return _add(half, unit) if abs(sum(half)) % 2 and length > 2 else half


def _add(*vectors: Vector) -> Vector:
    f, h, w = map(sum, zip(*vectors, strict=True))
    return f, h, w


def _sub(v: Vector, u: Vector) -> Vector:
    return v[0] - u[0], v[1] - u[1], v[2] - u[2]


def _neg(v: Vector) -> Vector:
    return -v[0], -v[1], -v[2]


# -- block sizes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockSuggestion:
    """Blocks of the three partitions, and what had to be chosen otherwise.

    Args:
        blocks: for `partition`, in the order 1D, 2D, 3D; where a lattice has no 2D or 3D blocks of a useful size the
            entry is a 1D block instead.
        counts: blocks that each gives.
        notes: one sentence for each such replacement.
    """

    blocks: tuple[Block, Block, Block]
    counts: tuple[int, int, int]
    notes: tuple[str, ...]


@lru_cache(_CACHED)
def suggest_blocks(
    grid: TokenGrid, *, targets: tuple[int, int, int] = (8, 48, 72), min_tokens: int = 16
) -> BlockSuggestion:
    """Block sizes that divide the lattice and give about `targets` blocks in the 1D, 2D and 3D partition.

    Args:
        targets: number of blocks wanted of each partition, >= 1.
        min_tokens: fewest tokens a block should hold; small lattices get fewer blocks.

    Among the sizes that divide, the count nearest to the target (as a ratio) wins, with a small preference for compact
    blocks. When it is off by more than a factor of two (an axis is prime or short) the 1D partition with the target's
    count takes its place, and `notes` says so.
    """
    require_int("min_tokens", min_tokens, 1)
    most = max(grid.tokens // min_tokens, 1)
    blocks: list[Block] = []
    notes: list[str] = []
    for dims, target in enumerate(targets, start=1):
        require_int(f"targets[{dims - 1}]", target, 1)
        target = min(target, most)
        if dims == 1:
            blocks.append(_frames_per_block(grid, target))
            continue
        block = _best_divisors(grid, dims, target)
        count = partition(grid, block).num_blocks
        if 0.5 <= count / target <= 2:
            blocks.append(block)
            continue
        blocks.append(_frames_per_block(grid, target))
        notes.append(
            f"{dims}D blocks that divide {'x'.join(map(str, grid.shape))} give {count} blocks at best, {target} are "
            f"wanted: 1D blocks of {partition(grid, blocks[-1]).block_tokens} tokens instead"
        )
    one, two, three = blocks
    counts = tuple(partition(grid, block).num_blocks for block in blocks)
    return BlockSuggestion((one, two, three), (counts[0], counts[1], counts[2]), tuple(notes))


def divisors(n: int) -> list[int]:
    """All divisors of n >= 1, ascending."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def _best_divisors(grid: TokenGrid, dims: int, target: int) -> Block:
    options: list[tuple[int, ...]] = [(s,) for s in divisors(grid.frames)] if dims == 3 else [()]
    found: list[tuple[float, tuple[int, ...]]] = []
    for rest in options:
        for s_h in divisors(grid.height):
            for s_w in divisors(grid.width):
                sizes = (*rest, s_h, s_w)
                count = grid.tokens // math.prod(sizes) // (grid.frames if dims == 2 else 1)
                thinness = math.log(max(sizes) / min(sizes))
                found.append((round(abs(math.log(count / target)) + 0.15 * thinness, 9), sizes))
    best = min(found)[1]
    return (best[0], best[1]) if dims == 2 else (best[0], best[1], best[2])


def _frames_per_block(grid: TokenGrid, target: int) -> int | float:
    """Whole frames a block where that comes near the target, else whole rows of tokens, else tokens."""
    frames = -(-grid.frames // target)
    dividing = [s for s in divisors(grid.frames) if 0.5 <= grid.frames / s / target <= 2]
    if dividing:
        return min(dividing, key=lambda s: (abs(math.log(grid.frames / s / target)), s))
    if -(-grid.frames // frames) * 2 > target:
        return frames
    size = -(-grid.tokens // target)
    if size >= grid.width:
        size = -(-size // grid.width) * grid.width
    share = size / (grid.height * grid.width)
    # The product below must not be rounded down to one token less.
    return share if int(share * grid.height * grid.width) == size else math.nextafter(share, math.inf)
