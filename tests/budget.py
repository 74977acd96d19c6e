"""Error budgets from the data, not from a hand-picked number."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good_as_eager(
    got: Tensor, eager: Tensor, oracle: Tensor, *, slack: float = 2.0, floor: float = 0.0, what: str = ""
) -> None:
    """`got` may err against the fp64 oracle by at most `slack` times what plain code errs in the same dtype.

    One unit in the last place of the largest value is added, for cases in which plain code happens to be exact. In fp64
    the oracle is plain code itself, so 64 units stand for a different order of summation.

    Args:
        floor: absolute error allowed in any case, in units of the compared values.
    """
    assert got.dtype == eager.dtype, f"{what}: {got.dtype} instead of {eager.dtype}"
    if oracle.numel() == 0:
        return
    finite = oracle.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{what}: not finite where the oracle is"
    ulp = torch.finfo(got.dtype).eps * (64 if got.dtype == torch.float64 else 1)
    got, eager, oracle = (torch.where(finite, t.double(), 0) for t in (got, eager, oracle))
    scale = oracle.abs().max()
    allowed = slack * ((eager - oracle).abs().max() + ulp * scale) + floor
    worst = (got - oracle).abs().max()
    assert worst <= allowed, f"{what}: {worst:.2e} > {allowed:.2e} (largest value {scale:.2e})"
