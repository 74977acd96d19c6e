"""The compiled CPU kernel checked against the torch path and timed beside it; `hf-attn build-cpu` runs this.

    python -m hf_attn.bench.cpu_kernel

A check that fails ends in one line and exit status 1, before anything is timed. The kernel has to be built.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn import ops
from hf_attn.bench.timing import backend, interleaved, paired_ratio
from hf_attn.ops.hfattn_sparse import native
from hf_attn.pattern import BlockPattern

DTYPES = (torch.float32, torch.bfloat16)
# batch, heads, KV heads, queries, keys, head dim, value dim, queries per block, keys per block, causal
CHECKS = (
    (1, 4, 4, 256, 256, 64, 64, 128, 128, True),
    (2, 6, 2, 77, 131, 128, 64, 32, 48, False),
    (1, 2, 1, 200, 200, 40, 24, 64, 64, True),
)
LENGTH, HEADS, HEAD_DIM, BLOCK = 2048, 8, 64, 128
# Of the blocks that the diagonal leaves; with it a third.
SHARE = 0.25
REPEATS = 7
# Against fp64, at most this much more than what the torch path errs, which forms calls this small in fp32 throughout;
# the kernel's exponentials for bfloat16 are right to 3e-6. What a wrong build errs is orders of magnitude more.
_SLACK = 4.0


@dataclass(frozen=True)
class Speed:
    """Median ratios over the rounds: how many times as fast the kernel is as the torch path and as dense attention.

    density: blocks of the call as a share of those that a causal call can see.
    """

    dtype: str
    density: float
    milliseconds: float
    over_torch: float
    over_dense: float


def worst(dtype: torch.dtype) -> float:
    """The largest error over all checks as a share of what is allowed: fine up to 1, NaN where results are not finite.

    Raises RuntimeError where the kernel is not built.
    """
    shares = []
    for batch, heads, kv_heads, q_len, k_len, dim, value_dim, block_q, block_k, causal in CHECKS:
        generator = torch.Generator().manual_seed(0)
        shapes = (batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, value_dim)
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        blocks = torch.rand(batch, heads, -(-q_len // block_q), -(-k_len // block_k), generator=generator) < 0.5
        pattern = BlockPattern.from_dense(blocks, block_q=block_q, block_k=block_k, q_len=q_len, k_len=k_len)
        routes = torch.rand(batch, heads, q_len, blocks.shape[3], generator=generator) < 0.5
        by_rows = {"routes": routes, "block_size": block_k, "causal": False}  # as every row chooses
        for call in (
            partial(ops.block_sparse_attention, pattern=pattern, causal=causal, return_lse=True),
            partial(ops.routed_block_attention, **by_rows, return_lse=True),
        ):
            oracle = _forced("reference", call, [x.double() for x in tensors])
            shares += map(error, _forced("native", call, tensors), _forced("torch", call, tensors), oracle)
    return torch.tensor(shares).max().item()  # which NaN gets through


@torch.no_grad()
def _forced(path: str, call: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    with backend(path):
        return call(*tensors)


def error(got: Tensor, plain: Tensor, oracle: Tensor) -> float:
    """Largest error of `got` as a share of what `plain` allows; NaN unless it is finite where `oracle` is."""
    finite = oracle.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return float("nan")
    unit = torch.finfo(got.dtype).eps
    got, plain, oracle = (torch.where(finite, x.double(), 0) for x in (got, plain, oracle))
    allowed = _SLACK * ((plain - oracle).abs().max() + unit * oracle.abs().max())
    return ((got - oracle).abs().max() / allowed).item()


def speed(dtype: torch.dtype) -> Speed:
    """A causal call in turn by the kernel, by the torch path, and dense."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, HEADS, LENGTH, HEAD_DIM, generator=generator).to(dtype) for _ in range(3)]
    count = LENGTH // BLOCK
    blocks = (torch.rand(1, HEADS, count, count, generator=generator) < SHARE) | torch.eye(count, dtype=torch.bool)
    blocks = blocks.tril()
    density = blocks.sum().item() / (HEADS * count * (count + 1) / 2)
    pattern = BlockPattern.from_dense(blocks, block_q=BLOCK, block_k=BLOCK, q_len=LENGTH, k_len=LENGTH)

    def sparse(path: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with backend(path), torch.no_grad():
                return ops.block_sparse_attention(*tensors, pattern, causal=True)

        return run

    def dense() -> Tensor:
        with torch.no_grad():
            return scaled_dot_product_attention(*tensors, is_causal=True)

    functions = {"native": sparse("native"), "torch": sparse("torch"), "dense": dense}
    times = interleaved(functions, repeats=REPEATS)
    ratios = [paired_ratio(times[name], times["native"]) for name in ("torch", "dense")]
    return Speed(str(dtype).removeprefix("torch."), density, times["native"].median * 1e3, *ratios)


def main(argv: Sequence[str] | None = None) -> list[Speed]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line for programs instead of a table")
    args = parser.parse_args(argv)
    _require_library()
    for dtype in DTYPES:
        share = worst(dtype)
        if not share <= 1:
            raise SystemExit(f"its {dtype} results err {share:.3g} times as much as the torch path's may")
    speeds = [speed(dtype) for dtype in DTYPES]
    call = (
        f"{LENGTH} tokens, {HEADS} heads of {HEAD_DIM}, causal, {speeds[0].density:.0%} of the blocks of {BLOCK}, "
        f"threads: {torch.get_num_threads()}"
    )
    if args.json:
        facts = {"matrix_tiles": native.has_matrix_tiles(), "call": call}
        print(json.dumps(facts | {"speeds": [asdict(one) for one in speeds]}))
    else:
        print(call, *map(told, speeds), sep="\n")
    return speeds


def _require_library() -> None:
    """End in one line unless the kernel is built and can be loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            if native.available():
                return
        except UserWarning as warning:
            raise SystemExit(str(warning)) from None
    raise SystemExit("the CPU kernel is not built: run hf-attn build-cpu")


def told(one: Speed) -> str:
    """One line about one dtype."""
    ratios = f"{one.over_torch:.2f}x the speed of the torch path, {one.over_dense:.2f}x dense attention"
    return f"{one.dtype}: {one.milliseconds:.1f} ms, {ratios}"


if __name__ == "__main__":
    main()
