"""Speed of head-routed attention (query-norm routing included) against dense causal attention, in the same run.

    python -m hf_attn.bench.head_routed_speed --lengths 1024 2048 4096 --threads 1
    python -m hf_attn.bench.head_routed_speed --lengths 4096 --backward         # forward and backward together

Each case is checked first against dense attention; a case that fails gets no speed. HF_ATTN_BACKEND=torch times the
gathered form also where the op would run dense.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import interleaved, machine_load, paired_ratio
from hf_attn.nn.head_router import QueryNormRouter
from hf_attn.ops import head_routed_attention, path_counts, reset_path_counts

FIGURES = ("speed-up",)


def run_case(length: int, top_k: int, args: argparse.Namespace) -> Row:
    """One line of the table."""
    generator = torch.Generator().manual_seed(length)
    sizes = (args.heads, args.kv_heads, args.kv_heads)
    query, key, value = (torch.randn(1, n, length, args.head_dim, generator=generator) for n in sizes)
    router = QueryNormRouter(args.heads, list(range(args.shared)), top_k).eval()

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def choose() -> torch.Tensor:
        with torch.no_grad():
            return router(query.transpose(1, 2)).heads.transpose(1, 2)

    def routed() -> torch.Tensor:
        return head_routed_attention(query, key, value, choose())

    def step(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward().sum(), leaves)

    heads = choose()
    reset_path_counts()
    leaves = [x.requires_grad_(args.backward) for x in (query, key, value)]
    with torch.set_grad_enabled(args.backward):
        error = float((routed() - dense() * heads[..., None]).abs().max())
        form = next(iter(path_counts())).partition(" | ")[2]
        share = (args.shared + top_k) / args.heads
        case = f"{length} {args.shared + top_k}/{args.heads}"
        start = f"{length:>7} {args.shared + top_k}/{args.heads:<4} {form:>13} {error:>9.1e}"
        if not error < 1e-5:
            return Row(case, f"{start}  FAILED: no speed for a wrong result", problem="check failed")
        timed = {"dense": dense, "routed": routed}
        if args.backward:
            timed = {name: step(forward) for name, forward in timed.items()}
        times = interleaved(timed, repeats=args.repeats)
    ratio = paired_ratio(times["dense"], times["routed"])
    milliseconds = [times[name].median * 1e3 for name in ("dense", "routed")]
    line = f"{start} {milliseconds[0]:>9.1f} {milliseconds[1]:>9.1f} {ratio:>9.2f} {ratio * share:>9.2f}"
    return Row(case, line, {"speed-up": ratio}, times["dense"].spread)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--shared", type=int, default=3)
    parser.add_argument("--top-k", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, float32, {args.threads} thread(s), Hq={args.heads}, Hkv={args.kv_heads}, "
        f"D={args.head_dim}, median of {args.repeats}; {machine_load()}"
    )
    names = ("error", "dense ms", "routed ms", "x dense", "of limit")
    print(f"{'N':>7} {'heads':6} {'form':>13} " + " ".join(f"{name:>9}" for name in names))
    return [show(run_case(length, top_k, args)) for length in args.lengths for top_k in args.top_k]


if __name__ == "__main__":
    main()
