"""The pyramid of a tensor: every key block at full resolution and pooled by 2, 4 and 8, and the way back.

A block of `b` tokens becomes `15 b / 8` rows: its tokens, then the pools of 2, of 4 and of 8. Counted in *units* of
`b / 8` rows, level r has `8 / r` of them, so a level of a block is a run of units.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = (1, 2, 4, 8)
UNITS = 15


def num_blocks(length: int, block: int) -> int:
    return -(-length // block)


def pad_tokens(x: Tensor, block: int, tail: str) -> Tensor:
    """[..., N, D] padded to whole blocks: by the last token ("replicate") or by zeros ("exact")."""
    missing = -x.shape[-2] % block
    if not missing:
        return x
    last = x[..., -1:, :] if tail == "replicate" else torch.zeros_like(x[..., -1:, :])
    return torch.cat([x, last.expand(*x.shape[:-2], missing, x.shape[-1])], -2)


def pool_sums(x: Tensor, block: int, tail: str) -> Tensor:
    """Sums over the members of every pool: [..., N, D] -> [..., n, 15 b / 8, D]; differentiable.

    With tail="replicate" the pools of the partial last block count its last token several times.
    """
    padded = pad_tokens(x, block, tail).unflatten(-2, (-1, block))
    levels = [padded]
    for _ in LEVELS[1:]:
        levels.append(levels[-1][..., 0::2, :] + levels[-1][..., 1::2, :])
    return torch.cat(levels, -2)


def write_pools(table: Tensor, x: Tensor, block: int, tail: str, members: Tensor | None) -> None:
    """`pool_sums` of x [..., N, D], divided by `members` [n, 15 b / 8] if given, into table [..., n, 15 b / 8, >= D].

    Sums are formed in fp32 (fp64). Writing in place spares the passes that joining and dividing whole tensors cost.
    """
    current, start, dim = pad_tokens(x, block, tail).unflatten(-2, (-1, block)), 0, x.shape[-1]
    for level in LEVELS:
        if level > 1:
            even, odd = current[..., 0::2, :], current[..., 1::2, :]
            current = even + odd if even.dtype in (torch.float32, torch.float64) else even.float() + odd.float()
        target = table[..., start : start + block // level, :dim]
        if members is None or level == 1:
            target.copy_(current)
        else:
            target.copy_(current * (1 / members[:, start : start + block // level, None].to(current.dtype)))
        start += block // level


def pool_counts(length: int, block: int, tail: str, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """What every pool weighs in the softmax, and how many members its sum has: int64 [n, 15 b / 8] each.

    Weights: r ("replicate"), or the number of real members ("exact"); 0 for padding at level 1 and for empty pools.
    """
    n = num_blocks(length, block)
    real = (torch.arange(n * block, device=device) < length).long().view(n, block)
    weights, members = [real], [torch.ones_like(real)]
    for level in LEVELS[1:]:
        count = real.unflatten(1, (-1, level)).sum(-1)
        if tail == "replicate":
            count = torch.full_like(count, level)
        weights.append(count)
        members.append(count.clamp(min=1))
    return torch.cat(weights, 1), torch.cat(members, 1)


def last_positions(length: int, block: int, tail: str, device: torch.device | str | None = None) -> Tensor:
    """Position of the last member of every pool, int64 [n, 15 b / 8]: a causal query before it must not see the pool.

    With tail="exact" that is the last *real* member.
    """
    n = num_blocks(length, block)
    first = torch.arange(n, device=device)[:, None] * block
    last = [first + torch.arange(1, block // level + 1, device=device) * level - 1 for level in LEVELS]
    joined = torch.cat(last, 1)
    return joined.clamp(max=length - 1) if tail == "exact" else joined


def unpool(grad: Tensor, length: int, block: int, tail: str) -> Tensor:
    """The adjoint of `pool_sums`: [..., n, 15 b / 8, D] -> [..., N, D]."""
    levels = grad.split([block // level for level in LEVELS], -2)
    total = levels[-1]
    for level in reversed(levels[:-1]):
        total = level + total.repeat_interleave(2, -2)
    total = total.flatten(-3, -2)
    if tail == "replicate" and total.shape[-2] > length:
        extra = total[..., length:, :].sum(-2, keepdim=True)
        total = torch.cat([total[..., : length - 1, :], total[..., length - 1 : length, :] + extra], -2)
    return total[..., :length, :]
