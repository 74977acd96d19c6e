"""The highest scores of many columns, with an exact tie rule: on equal scores the later row wins.

`torch.topk` costs about 2 us for a row of 256 scores and promises nothing about ties. Here a score and its index are
packed into one integer, so that all keys differ and their order is the rule, and a sorting network made of
`torch.maximum` / `torch.minimum` runs over thousands of columns at a time.
"""

from __future__ import annotations

import torch

from .workspace import Workspace

# Callers that fill up their rows with -inf to a multiple of this leave all group sizes open.
GROUP_MULTIPLE = 16
_LOWEST = torch.iinfo(torch.int64).min
# Above this many winners, or below this many columns, the network has too many steps for what each of them does.
_NETWORK_MAX_COUNT = 16
_NETWORK_MIN_COLUMNS = 512


def top_rows(scores: torch.Tensor, count: int, work: Workspace) -> torch.Tensor:
    """Row numbers of the `count` highest scores of every column, in no particular order.

    Args:
        scores: [n, C] float32 or float64, -inf for rows that must not win (they may still fill up the result when
            there are fewer than `count` others).
        count: 1 .. n.
        work: scratch memory.

    Returns:
        int64 [count, C]; on equal scores the row with the larger number is taken.
    """
    if scores.dtype == torch.float64:  # no room for an index beside 64 bits of score
        flipped = scores.flip(0).sort(dim=0, descending=True, stable=True).indices[:count]
        return scores.shape[0] - 1 - flipped
    rows, columns = scores.shape
    if scores.device.type != "cpu" or count > _NETWORK_MAX_COUNT or columns < _NETWORK_MIN_COLUMNS:
        numbers = torch.arange(rows, device=scores.device)[:, None]
        return _row_number(_pack(scores, numbers, 1, work).topk(count, dim=0, sorted=False).values)
    return _top_rows_in_two_steps(scores, count, work)


def sort_rows(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sort every column of equally long 1-D tensors ascending, in place, with a sorting network."""
    spare = torch.empty_like(rows[0])
    for low, high in _batcher_comparators(len(rows)):
        rows[high], rows[low], spare = _exchange(rows[low], rows[high], spare)
    return rows


def _top_rows_in_two_steps(scores: torch.Tensor, count: int, work: Workspace) -> torch.Tensor:
    """Groups of neighbouring rows first, by their maximum; the winners can only be in the `count` best groups.

    The tie rule survives: a row outside the chosen groups loses to `count` group maxima, and where one of them is
    equal its group, hence its row, is the later one.
    """
    rows, columns = scores.shape
    group = GROUP_MULTIPLE
    while group > 1 and (rows % group or 2 * rows < count * group * group):  # fewest keys in both steps together
        group //= 2
    if group == 1:
        return _row_number(_keep_best(_pack(scores, torch.arange(rows)[:, None], count, work), count, work))
    grouped = scores.view(-1, group, columns)
    groups = grouped.shape[0]
    maxima = torch.amax(grouped, 1, out=work.take("maxima", (groups, columns), scores.dtype))
    best = _row_number(_keep_best(_pack(maxima, torch.arange(groups)[:, None], count, work), count, work))
    candidates = work.take("candidates", (count, group, columns), scores.dtype)
    for member in range(group):
        torch.gather(grouped[:, member], 0, best, out=candidates[:, member])
    keys = _pack(candidates.view(-1, columns), torch.arange(group).repeat(count)[:, None], count, work)
    keys[: count * group].view(count, group, columns).bitwise_or_((best * group)[:, None])
    return _row_number(_keep_best(keys, count, work))


def _pack(scores: torch.Tensor, numbers: torch.Tensor, count: int, work: Workspace) -> torch.Tensor:
    """[n, C] float32 and row numbers -> int64 keys: score in the high half (in integer order), number in the low.

    Rows of the lowest key are added up to a multiple of the width of the network.
    """
    rows, columns = scores.shape
    width = _network_width(count)
    keys = work.take("keys", (-(-rows // width) * width, columns), torch.int64)
    # + 0.0 makes -0.0 equal to 0.0; negative floats order backwards as integers, hence the flip.
    bits = torch.add(scores, 0.0, out=work.take("bits", (rows, columns), scores.dtype)).view(torch.int32)
    flip = torch.bitwise_right_shift(bits, 31, out=work.take("flip", (rows, columns), torch.int32))
    keys[:rows] = bits.bitwise_xor_(flip.bitwise_and_(0x7FFFFFFF))
    keys[:rows].bitwise_left_shift_(32).bitwise_or_(numbers)
    keys[rows:] = _LOWEST
    return keys


def _row_number(keys: torch.Tensor) -> torch.Tensor:
    return keys & 0xFFFFFFFF


def _network_width(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _keep_best(keys: torch.Tensor, count: int, work: Workspace) -> torch.Tensor:
    """[n, C] distinct int64 keys, n a multiple of the width -> [count, C], the largest of every column.

    Overwrites `keys`. Sorts lists of `width` keys, then merges the lists two by two.
    """
    width = _network_width(count)
    lists = keys.shape[0] // width
    slots = list(keys.view(width, lists, -1).unbind(0))
    spare = work.take("spare", tuple(slots[0].shape), torch.int64)
    for first, second in _batcher_comparators(width):
        slots[first], slots[second], spare = _exchange(slots[first], slots[second], spare)
    while lists > 1:
        half = lists // 2
        # Both lists are sorted, so the larger of slot i and slot w-1-i are the best w of the two, in bitonic order.
        for i in range(width):
            torch.maximum(slots[i][:half], slots[width - 1 - i][lists - half : lists], out=slots[i][:half])
        lists -= half
        slots = [slot[:lists] for slot in slots]  # with an odd number the middle list stays as it is
        if lists > 1 or count < width:
            spare = _sort_bitonic(slots, spare[:lists])
    return torch.cat(slots[:count], 0)


def _sort_bitonic(slots: list[torch.Tensor], spare: torch.Tensor) -> torch.Tensor:
    """Sort a bitonic sequence of a power-of-two length, largest first, in place in the list; returns the new spare."""
    step = len(slots) // 2
    while step:
        for start in range(0, len(slots), 2 * step):
            for i in range(start, start + step):
                slots[i], slots[i + step], spare = _exchange(slots[i], slots[i + step], spare)
        step //= 2
    return spare


def _exchange(
    first: torch.Tensor, second: torch.Tensor, spare: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One comparator: returns (larger, smaller, spare), the same three storages in new roles."""
    torch.maximum(first, second, out=spare)
    torch.minimum(first, second, out=second)
    return spare, second, first


def _batcher_comparators(length: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge sort: pairs (i, j), i < j, that sort any sequence of this length."""
    pairs = []
    span = 1
    while span < length:
        step = span
        while step:
            for start in range(step % span, length - step, 2 * step):
                for offset in range(min(step, length - start - step)):
                    first, second = start + offset, start + offset + step
                    if first // (2 * span) == second // (2 * span):
                        pairs.append((first, second))
            step //= 2
        span *= 2
    return pairs
