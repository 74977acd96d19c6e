"""Orders and partitions of a token lattice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hf_attn.grid import (
    AXIS_ORDERS,
    TokenGrid,
    axis_permutation,
    divisors,
    hilbert_permutation,
    partition,
    suggest_blocks,
)

GRIDS = [(1, 1, 1), (1, 1, 7), (1, 6, 5), (3, 2, 5), (4, 6, 8), (5, 7, 9), (2, 13, 3), (7, 1, 4), (9, 4, 2)]


def cells(grid: TokenGrid, order: torch.Tensor) -> list[tuple[int, int, int]]:
    """Lattice coordinates of the tokens in `order`."""
    frames, height, width = grid.shape
    return [(t // (height * width), t // width % height, t % width) for t in order.tolist()]


def steps(grid: TokenGrid) -> torch.Tensor:
    """Coordinate changes between neighbours on the curve, `[N - 1, 3]`."""
    return torch.tensor(cells(grid, hilbert_permutation(grid).forward)).diff(dim=0).abs()


@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("text", ["keep", "last", "none"])
@pytest.mark.parametrize("order", [*AXIS_ORDERS, "hilbert"])
def test_every_order_is_a_permutation_with_its_inverse(shape, text, order):
    grid = TokenGrid(*shape, text_before=3, text_after=2)
    found = hilbert_permutation(grid, text=text) if order == "hilbert" else axis_permutation(grid, order, text=text)
    length = grid.tokens if text == "none" else grid.length
    assert torch.equal(found.forward.sort().values, torch.arange(length))
    x = torch.randn(2, 3, length, 4)
    moved = found.apply(x)
    assert torch.equal(moved, x[:, :, found.forward])
    assert torch.equal(found.undo(moved), x)
    if text == "keep":
        outside = [*range(3), *range(3 + grid.tokens, grid.length)]
        assert torch.equal(moved[:, :, outside], x[:, :, outside])
    if text == "last":
        assert found.forward[grid.tokens :].tolist() == [0, 1, 2, grid.length - 2, grid.length - 1]


@pytest.mark.parametrize("order", AXIS_ORDERS)
def test_axis_orders_sort_by_the_named_axes(order):
    grid = TokenGrid(3, 4, 5)
    listed = cells(grid, axis_permutation(grid, order).forward)
    assert listed == sorted(listed, key=lambda cell: [cell["FHW".index(axis)] for axis in order])
    assert torch.equal(axis_permutation(grid, AXIS_ORDERS.index(order)).forward, axis_permutation(grid, order).forward)
    assert axis_permutation(grid, order).is_identity == (order == "FHW")


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 6, 8), (8, 2, 4), (2, 10, 6), (6, 6, 6), (4, 4, 16), (12, 2, 2)])
def test_the_curve_moves_one_cell_at_a_time_where_all_sizes_are_even(shape):
    assert (steps(TokenGrid(*shape)).sum(1) == 1).all()


@pytest.mark.parametrize("shape", itertools.product([1, 2, 3, 5, 7], [1, 3, 4, 9], [2, 5, 6, 11]))
def test_the_curve_has_no_long_jump_on_odd_sizes(shape):
    grid = TokenGrid(*shape)
    if grid.tokens > 1:
        assert steps(grid).max() <= 3
        assert steps(grid).sum(1).max() <= 4
    assert sorted(hilbert_permutation(grid).forward.tolist()) == list(range(grid.tokens))


def test_a_line_is_walked_in_order_and_an_image_by_a_plane_curve():
    assert hilbert_permutation(TokenGrid(1, 1, 9)).is_identity
    assert (steps(TokenGrid(1, 8, 8)).sum(1) == 1).all()
    assert cells(TokenGrid(1, 2, 2), hilbert_permutation(TokenGrid(1, 2, 2)).forward) == [
        (0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1),
    ]  # fmt: skip


def test_partition_1d_counts_tokens_in_frames():
    grid = TokenGrid(5, 2, 3)
    uneven = partition(grid, 2)
    assert uneven.permutation.is_identity
    assert (uneven.block_tokens, uneven.counts) == (12, (3, 1, 1))
    assert uneven.block_of().bincount().tolist() == [12, 12, 6]
    assert partition(grid, 0.5).block_tokens == 3
    assert partition(grid, 100).num_blocks == 1


@pytest.mark.parametrize("block", [(2, 4), (6, 8), (1, 1), (2, 3, 4), (4, 6, 8), (1, 2, 2)])
def test_partition_2d_and_3d_boxes(block):
    grid = TokenGrid(4, 6, 8)
    found = partition(grid, block)
    t, h, w = block if len(block) == 3 else (4, *block)
    expected = [(f // t, y // h, x // w) for f, y, x in itertools.product(range(4), range(6), range(8))]
    numbers = {cell: i for i, cell in enumerate(sorted(set(expected)))}
    assert found.block_of().tolist() == [numbers[cell] for cell in expected]
    assert found.block_tokens == t * h * w
    assert found.num_blocks == len(numbers)
    inside = found.permutation.forward.view(-1, found.block_tokens)
    assert (inside.diff(dim=1) > 0).all()  # row-major inside every block


def test_blocks_that_do_not_divide_name_what_does():
    with pytest.raises(ValueError, match=r"height 6 % 4 = 2; sizes that divide height: 1, 2, 3, 6"):
        partition(TokenGrid(4, 6, 8), (4, 4))
    with pytest.raises(ValueError, match="holds no token"):
        partition(TokenGrid(4, 6, 8), 0.001)
    with pytest.raises(ValueError, match="block must be a number"):
        partition(TokenGrid(4, 6, 8), (1, 2, 3, 4))
    with pytest.raises(ValueError, match="block size along width must be an integer >= 1, got 0"):
        partition(TokenGrid(4, 6, 8), (2, 0))


@pytest.mark.parametrize("shape", [(21, 30, 52), (21, 45, 80), (24, 36, 64), (16, 16, 32), (13, 30, 45), (33, 45, 80)])
def test_suggested_blocks_divide_and_come_near_the_targets(shape):
    grid = TokenGrid(*shape)
    found = suggest_blocks(grid)
    assert not found.notes
    for block, count, target in zip(found.blocks, found.counts, (8, 48, 72), strict=True):
        assert partition(grid, block).num_blocks == count
        assert 0.5 <= count / target <= 2
    assert [len(block) for block in found.blocks[1:]] == [2, 3]


def test_a_prime_axis_takes_another_partition_and_says_so():
    found = suggest_blocks(TokenGrid(7, 11, 13))
    assert isinstance(found.blocks[1], float)
    assert "2D blocks that divide 7x11x13 give 143 blocks at best, 48 are wanted: 1D blocks of" in found.notes[0]
    assert 24 <= found.counts[1] <= 96


@pytest.mark.parametrize("shape", itertools.product([1, 2, 13], [1, 6, 23], [1, 4, 41]))
def test_suggestions_exist_for_every_grid(shape):
    grid = TokenGrid(*shape)
    found = suggest_blocks(grid)
    for block, count in zip(found.blocks, found.counts, strict=True):
        assert partition(grid, block).num_blocks == count
        assert 1 <= count <= 2 * max(grid.tokens // 16, 1)


def test_equal_grids_share_one_cached_order_and_its_copies():
    first, second = hilbert_permutation(TokenGrid(2, 4, 4)), hilbert_permutation(TokenGrid(2, 4, 4))
    assert first is second
    meta = torch.zeros(32, 1, device="meta")
    first.apply(meta)
    kept = dict(first._copies)
    first.apply(meta)
    assert all(first._copies[device][0] is pair[0] for device, pair in kept.items())
    assert len(kept) == 1


def test_orders_made_under_inference_mode_serve_training():
    with torch.inference_mode():
        order = axis_permutation(TokenGrid(3, 5, 2), "WHF")
    x = torch.randn(30, 2, requires_grad=True)
    order.undo(order.apply(x, dim=0) * 2, dim=0).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


def test_grid_refuses_bad_sizes_and_lengths():
    with pytest.raises(ValueError, match="height must be an integer >= 1, got 0"):
        TokenGrid(1, 0, 2)
    with pytest.raises(ValueError, match="text_after must be an integer >= 0, got -1"):
        TokenGrid(1, 1, 2, text_after=-1)
    grid = TokenGrid(2, 3, 4, text_before=5, text_after=1)
    assert (grid.length, grid.tokens, grid.text, grid.lattice) == (30, 24, 6, slice(5, 29))
    with pytest.raises(ValueError, match="describes 30 tokens, but the sequence has 31"):
        grid.check_length(31)
    with pytest.raises(ValueError, match="order must be one of 'FHW'"):
        axis_permutation(grid, "XYZ")
    with pytest.raises(ValueError, match="text must be one of"):
        hilbert_permutation(grid, text="first")


@pytest.mark.parametrize("n", [1, 2, 12, 13, 36, 97, 360])
def test_divisors(n):
    assert divisors(n) == [i for i in range(1, n + 1) if n % i == 0]
    assert math.prod(divisors(n)) ** 2 == n ** len(divisors(n))
