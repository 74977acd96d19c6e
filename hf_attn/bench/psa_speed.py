"""Speed of PSA's attention on the CPU against dense attention of the same run (psa.md 8.8).

    python -m hf_attn.bench.psa_speed --dtype fp32 bf16 --density 0.25 0.2 0.125 --length 8192

Everything that PSA adds is counted: Hilbert reordering and the way back, importance, fitting to the density, pooling.
`--clock thread` counts the processor time of this thread instead of wall time, for machines that are busy.
Each result is first checked against the reference on sampled query blocks; a case that fails shows no speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn import ops
from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import interleaved, machine_load, paired_ratio
from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.grid import TokenGrid
from hf_attn.mechanisms.psa import MECHANISM, PSAConfig, choose_levels
from hf_attn.ops.hfattn_sparse.pyramid import reference

FIGURES = ("speed-up", "limit")
HEADS, DIM = 4, 64
GRIDS = {
    length: TokenGrid(*shape)
    for length, shape in {
        1024: (4, 16, 16), 2048: (8, 16, 16), 3072: (12, 16, 16), 4096: (16, 16, 16), 6144: (12, 16, 32),
        8192: (16, 16, 32), 16384: (16, 32, 32),
    }.items()
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def call_of(length: int, dtype: torch.dtype, causal: bool) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, length, DIM, generator=generator).to(dtype) for _ in range(3))
    tokens = TokenLayout(1, length, length, grid=None if causal else GRIDS[length])
    return AttentionCall(query, key, value, DIM**-0.5, causal, tokens)


def realised(call: AttentionCall, config: PSAConfig) -> float:
    seen: dict = {}
    layer = LayerContext(record=lambda **facts: seen.update(facts))
    MECHANISM(replace(call, layer=layer), config)
    return 1.0 if seen["path"] == "dense" else float(seen["computed"] / seen["visible"])


def check(call: AttentionCall, config: PSAConfig) -> bool:
    """Three query blocks against the fp64 reference: twice the error of the reference in the dtype, or of attention."""
    plain = replace(call, tokens=TokenLayout.full(1, call.q_len))
    levels = choose_levels(plain, config)
    sizes = {"block_q": config.block_size, "block_k": config.keys_per_block, "causal": call.causal}
    out = ops.pyramid_attention(call.query, call.key, call.value, levels, **sizes)
    for block in {0, levels.shape[2] // 2, levels.shape[2] - 1}:
        rows = slice(block * config.block_size, min((block + 1) * config.block_size, call.q_len))
        one = levels[:, :, block : block + 1]
        exact, eager = (_reference_rows(call, one, rows, sizes, dtype) for dtype in (torch.float64, out.dtype))
        full = torch.ones_like(one)
        exact_full = _reference_rows(call, full, rows, sizes, torch.float64)
        dense = scaled_dot_product_attention(call.query, call.key, call.value, is_causal=call.causal)[:, :, rows]
        plain_error = max(float((x.double() - y).abs().max()) for x, y in ((eager, exact), (dense, exact_full)))
        allowed = 2 * (plain_error + torch.finfo(out.dtype).eps * float(exact.abs().max()))
        if float((out[:, :, rows].double() - exact).abs().max()) > allowed:
            return False
    return True


def _reference_rows(call: AttentionCall, levels: Tensor, rows: slice, sizes: dict, dtype: torch.dtype) -> Tensor:
    query, key, value = (x.to(dtype) for x in (call.query[:, :, rows], call.key, call.value))
    if call.causal:  # bottom-right alignment: the keys end with the rows
        key, value = key[:, :, : rows.stop], value[:, :, : rows.stop]
        levels = levels[..., : -(-rows.stop // sizes["block_k"])]
    return reference.forward(query, key, value, levels, scale=call.scale, tail="replicate", **sizes)[0]


def measure(dtype: str, density: float | None, args: argparse.Namespace) -> Row:
    """One line of the table."""
    call = call_of(args.length, DTYPES[dtype], args.causal)
    options = {"min_tokens": 0, "text_length": 0, "block_size": args.block, "similarity": None}
    config = PSAConfig(density=density, **options)
    share = realised(call, config)
    asked = "default" if density is None else str(density)
    name, case = f"{dtype:5}{asked:>9}{share:10.3f}", f"{dtype} {asked}"
    if not check(call, config):
        return Row(case, f"{name}   check FAILED: no speed shown", problem="check failed")
    plain = replace(call, tokens=TokenLayout.full(1, args.length))
    functions = {
        "dense": partial(scaled_dot_product_attention, call.query, call.key, call.value, is_causal=call.causal),
        "psa": partial(MECHANISM, call, config),
        "levels": partial(choose_levels, plain, config),
    }
    times = interleaved(functions, repeats=args.repeats)
    ratio = paired_ratio(times["dense"], times["psa"])
    line = (
        f"{name}{times['dense'].median * 1e3:10.1f}{times['psa'].median * 1e3:10.1f}"
        f"{times['levels'].median * 1e3:10.1f}{ratio:10.2f}{ratio * share:10.1%}"
    )
    return Row(case, line, {"speed-up": ratio, "limit": ratio * share}, times["dense"].spread)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--density", nargs="+", type=float, default=[0.25, 0.2, 0.125])
    parser.add_argument("--default", action="store_true", help="no density: the options a user gets who gives none")
    parser.add_argument("--length", type=int, choices=GRIDS, default=8192)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--causal", action="store_true", help="the prefill variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.clock == "thread":
        if args.threads != 1:
            parser.error("--clock thread counts one thread; use --threads 1")
        time.perf_counter = time.thread_time
    kind = "causal" if args.causal else "bidirectional"
    print(f"{kind}, {HEADS} heads x {DIM}, {args.length} tokens, blocks of {args.block}, {args.clock} time in ms")
    print(f"torch {torch.__version__}, {args.threads} thread(s), {machine_load()}; limit = speed-up x density")
    names = "".join(f"{name:>10}" for name in ("realised", "dense", "psa", "levels", "speed-up", "limit"))
    print(f"{'dtype':5}{'density':>9}{names}")
    densities = [None] if args.default else args.density
    return [show(measure(dtype, density, args)) for dtype in args.dtype for density in densities]


if __name__ == "__main__":
    main()
