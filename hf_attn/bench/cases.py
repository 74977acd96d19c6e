"""What `hf-attn bench op` runs: a case of an op, its check against attention written out, and the table of all ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_attn.bench.kernel_calls import Shape
from hf_attn.bench.runner import Function, backend

# Query rows that a check looks at.
SAMPLED_ROWS = 64
# Errors allowed: this many times what the same rows err when written out in the same dtype.
SLACK = 3.0


@dataclass(frozen=True)
class Setting:
    """Sizes of a case.

    Args:
        shape: dtype, heads, tokens and device; a decoding step has one query, `shape.q_len == 1`.
        density: share of the visible pairs that is asked for, in (0, 1].
        block: tokens of a block, where the op has blocks.
    """

    shape: Shape
    density: float
    block: int = 128

    @property
    def length(self) -> int:
        return self.shape.k_len

    @property
    def decode(self) -> bool:
        return self.shape.q_len == 1

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.length)


@dataclass(frozen=True)
class Case:
    """An op on one set of inputs.

    Args:
        run: the op; takes the leaves.
        leaves: differentiable inputs.
        expected: `expected(rows, *leaves)`, the rows of the result written out in the dtype of the leaves.
        pick: those rows of the result of `run`; default the third dimension of `[B, H, N, D]`.
        rows: the rows to check; default `SAMPLED_ROWS` random ones.
        dense: query, key and value of the dense attention that does the same job, None where there is none.
        causal: of that attention.
        density: computed over visible pairs, None where the op has none (linear attention, scans).
        select: what chooses the blocks or routes, None where nothing is chosen.
        permute: what brings tokens into the op's order and back.
        tolerance: error in the Frobenius norm that the op has by design (quantised products); replaces `SLACK`.
        rivals: the same op by other back ends, name -> function of the leaves.
        builds: what builds the pattern of a variant, for its time.
    """

    run: Callable[..., Tensor]
    leaves: Sequence[Tensor]
    expected: Callable[..., Tensor]
    dense: tuple[Tensor, Tensor, Tensor] | None
    causal: bool = True
    density: float | None = None
    pick: Callable[[Tensor, Tensor], Tensor] = lambda out, rows: out[:, :, rows]
    rows: Tensor | None = None
    select: Function | None = None
    permute: Function | None = None
    tolerance: float | None = None
    rivals: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    builds: dict[str, Function] = field(default_factory=dict)

    def forward(self, run: Callable[..., Tensor] | None = None) -> Function:
        """A call without gradients."""
        run = run or self.run

        def call() -> Tensor:
            with torch.no_grad():
                return run(*self.leaves)

        return call

    def backward(self, run: Callable[..., Tensor] | None = None) -> Function:
        """A forward and a backward."""
        run = run or self.run
        leaves = [x.detach().requires_grad_() for x in self.leaves]
        with torch.no_grad():
            grad = torch.randn_like(run(*self.leaves))
        return lambda: torch.autograd.grad(run(*leaves), leaves, grad, allow_unused=True)


@dataclass(frozen=True)
class Checked:
    """The worst error of a check and what was allowed there, both over the largest magnitude of the exact values."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def check(case: Case, run: Callable[..., Tensor], path: str, *, backward: bool) -> Checked:
    """Sampled rows of a result, and with `backward` all gradients that these rows give, against fp64.

    Allowed is `SLACK` times what the same rows err when they are written out in the dtype itself, plus its resolution.
    """
    length = case.leaves[0].shape[2] if case.rows is None else 0
    rows = case.rows if case.rows is not None else sample_rows(length, case.leaves[0].device)
    exact = _results(lambda *leaves: case.expected(rows, *leaves), case.leaves, torch.float64, backward)
    with backend(path):
        got = _results(lambda *leaves: case.pick(run(*leaves), rows), case.leaves, None, backward)
    if case.tolerance is not None:
        return Checked(float((got[0] - exact[0]).norm() / exact[0].norm()), case.tolerance)
    eager = _results(lambda *leaves: case.expected(rows, *leaves), case.leaves, case.leaves[0].dtype, backward)
    worst = Checked(0.0, 1.0)
    eps = torch.finfo(case.leaves[0].dtype).eps
    for g, e, x in zip(got, eager, exact, strict=True):
        scale = float(x.abs().max()) or 1.0
        error = float((g - x).abs().nan_to_num(float("inf")).max()) / scale
        allowed = SLACK * (float((e - x).abs().max()) / scale + eps)
        if error * worst.allowed >= worst.error * allowed:
            worst = Checked(error, allowed)
    return worst


def sample_rows(length: int, device: torch.device | str) -> Tensor:
    """Different random rows, ascending, the first and the last among them."""
    rows = torch.randint(length, (SAMPLED_ROWS,), generator=torch.Generator().manual_seed(1))
    rows[0], rows[-1] = 0, length - 1
    return rows.unique().to(device)


def _results(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], dtype: torch.dtype | None, backward: bool
) -> list[Tensor]:
    """Result and gradients in fp64, computed in `dtype`; the gradient of the result is the same for every dtype."""
    given = [x.detach().to(dtype or x.dtype).requires_grad_(backward) for x in leaves]
    with torch.set_grad_enabled(backward):
        out = function(*given)
    if not backward:
        return [out.double()]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.device, leaves[0].dtype)
    found = torch.autograd.grad(out, given, grad.to(out.dtype), allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(given, found, strict=True)]
    return [x.detach().double() for x in (out, *found)]


def softmax_rows(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention of query rows `[B, Hq, R, D]` to the keys that `visible`, bool `[B | 1, Hq | 1, R, N]`, lets them see.

    Rows that see nothing give 0.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~visible, torch.finfo(query.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(value.dtype)
    return (weights * visible) @ value


def causal_rows(rows: Tensor, length: int) -> Tensor:
    """Which keys query rows see in causal attention, bool `[1, 1, R, N]`."""
    return (torch.arange(length, device=rows.device) <= rows[:, None])[None, None]


def reorder(tensors: Sequence[Tensor]) -> Function:
    """Bringing query, key and value into another order of the tokens and the result back."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(tensors[0].shape[2], generator=generator).to(tensors[0].device)
    back = order.argsort()

    def run() -> Tensor:
        moved = [x.index_select(2, order) for x in tensors]
        return moved[0].index_select(2, back)

    return run


@dataclass(frozen=True)
class Op:
    """An entry of the table.

    Args:
        build: makes a case of a setting.
        passes: of "forward", "backward" (forward and backward) and "decode" (one query).
        backends: values of the op's own `backend=` beyond its paths, with the package each of them needs.
        dense: whether `density` means anything to it.
    """

    build: Callable[[Setting], Case]
    passes: tuple[str, ...] = ("forward", "backward")
    backends: dict[str, str] = field(default_factory=dict)
    dense: bool = True


def ops_table() -> dict[str, Op]:
    """Every public op that computes a result of tokens, by its name in `hf_attn.ops`."""
    from hf_attn.bench.op_cases import OPS
    from hf_attn.bench.other_cases import OPS as OTHERS

    return OPS | OTHERS
