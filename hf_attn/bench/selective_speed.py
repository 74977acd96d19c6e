"""Speed of selective attention (Union of Experts), gathering included, against causal SDPA on all heads.

    python -m hf_attn.bench.selective_speed --lengths 2048 4096

Every token takes `top_k` of the KV heads, drawn evenly. Each case is checked first against attention under the mask of
the choice; a case that fails gets no speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import interleaved, machine_load, paired_ratio
from hf_attn.ops import selective_attention

FIGURES = ("speed-up",)


def run_case(length: int, top_k: int, args: argparse.Namespace) -> Row:
    """One line of the table."""
    generator = torch.Generator().manual_seed(length + top_k)
    sizes = (args.heads, args.kv_heads, args.kv_heads)
    query, key, value = (torch.randn(1, n, length, args.head_dim, generator=generator) for n in sizes)
    ranks = torch.rand(1, args.kv_heads, length, generator=generator).argsort(1).argsort(1)
    selected = ranks < top_k
    chosen = selected.repeat_interleave(args.heads // args.kv_heads, 1)

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def selective() -> torch.Tensor:
        return selective_attention(query, key, value, selected)

    with torch.no_grad():
        seen = chosen[:, :, None] & torch.ones(length, length, dtype=torch.bool).tril()
        want = scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
        error = float((selective() - want)[chosen].abs().max())
        if not error < 1e-5:
            line = f"| {length} | {top_k} of {args.kv_heads} | error {error:.1e}: no speed for a wrong result | | |"
            return Row(f"{length} {top_k} of {args.kv_heads}", line, problem=f"check failed: error {error:.1e}")
        times = interleaved({"dense": dense, "selective": selective}, repeats=args.repeats, warmup=2)
    milliseconds = [times[name].median * 1e3 for name in ("dense", "selective")]
    ratio = paired_ratio(times["dense"], times["selective"])
    line = f"| {length} | {top_k} of {args.kv_heads} | {milliseconds[0]:.1f} | {milliseconds[1]:.1f} | {ratio:.2f} |"
    return Row(f"{length} {top_k} of {args.kv_heads}", line, {"speed-up": ratio}, times["dense"].spread)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--top-k", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, float32, {args.threads} thread(s), median of {args.repeats}; {machine_load()}")
    print("| tokens | experts | SDPA ms | selective ms | speed-up |\n|---|---|---|---|---|")
    return [show(run_case(length, top_k, args)) for length in args.lengths for top_k in args.top_k]


if __name__ == "__main__":
    main()
