"""What choosing the blocks costs beside the attention over them, in the same run.

    python -m hf_attn.bench.selection_speed --lengths 4096 16384 --density 0.1
    python -m hf_attn.bench.selection_speed --device cuda --dtype bfloat16 --lengths 8192 65536 --cumulative 0.9

The selection is compared with the reference first (one KV head); where it differs no time is shown.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.bench.timing import Timing, interleaved, machine_load, paired_ratio
from hf_attn.ops.hfattn_sparse.selection.op import select_blocks_reference
from hf_attn.pattern import BlockPattern

# Lists that a last digit of a score may decide otherwise than the reference.
MAY_DIFFER = 1e-3


def make_inputs(length: int, args: argparse.Namespace) -> list[Tensor]:
    """Random query, key and value with a direction of its own for every run of tokens, so that scores differ."""
    generator = torch.Generator().manual_seed(length)
    topics = torch.randn(1, 1, -(-length // 256), args.head_dim, generator=generator).repeat_interleave(256, 2)
    heads = (args.heads, args.kv_heads, args.kv_heads)
    tensors = [torch.randn(1, h, length, args.head_dim, generator=generator) for h in heads]
    tensors = [tensors[0] + topics[:, :, :length], tensors[1] + topics[:, :, :length], tensors[2]]
    return [t.to(args.device, getattr(torch, args.dtype)) for t in tensors]


def agrees(query: Tensor, key: Tensor, pattern: BlockPattern, args: argparse.Namespace) -> bool:
    """Whether the lists of the first KV head are those of the reference."""
    group = query.shape[1] // key.shape[1]
    rule = ("density", args.density) if args.cumulative is None else ("cumulative", args.cumulative)
    options = (args.block, args.block, *rule, args.sinks, args.local, True, query.shape[3] ** -0.5, 1)
    expected = select_blocks_reference(query[:, :group], key[:, :1], None, *options)
    return bool(((expected != pattern.indices[:, :group]).any(-1)).float().mean() <= MAY_DIFFER)


def run_case(length: int, args: argparse.Namespace) -> str:
    """One line of the table."""
    query, key, value = make_inputs(length, args)
    rule = {"top_k": args.density} if args.cumulative is None else {"cumulative": args.cumulative}

    def select() -> BlockPattern:
        return ops.select_blocks(
            query, key, block_q=args.block, block_k=args.block, sinks=args.sinks, local=args.local, **rule
        )

    pattern = select()
    if not agrees(query, key, pattern, args):
        return f"{length:>8}  CHECK FAILED: the selection differs from the reference, no time"

    def attend() -> Tensor:
        return ops.block_sparse_attention(query, key, value, pattern, causal=True)

    wait = torch.cuda.synchronize if query.is_cuda else lambda: None
    times = interleaved({"select": select, "attend": attend}, repeats=args.repeats, synchronize=wait)
    pairs = zip(times["select"].samples, times["attend"].samples, strict=True)
    share = paired_ratio(times["select"], Timing(tuple(a + b for a, b in pairs)))
    return (
        f"{length:>8} {pattern.density(causal=True):>8.3f} {times['select'].median * 1e3:>11.2f} "
        f"{times['attend'].median * 1e3:>11.2f} {share:>7.1%}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.1, help="share of the visible blocks that is kept")
    parser.add_argument("--cumulative", type=float, help="this rule instead of a density")
    parser.add_argument("--sinks", type=int, default=1)
    parser.add_argument("--local", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{args.threads} thread(s)"
    rule = f"density {args.density}" if args.cumulative is None else f"cumulative {args.cumulative}"
    print(
        f"torch {torch.__version__}, {where}, {args.dtype}, Hq={args.heads}, Hkv={args.kv_heads}, D={args.head_dim}, "
        f"block {args.block}, {rule}, sinks {args.sinks}, local {args.local}, median of {args.repeats}; "
        f"{machine_load()}"
    )
    print(f"{'N':>8} {'density':>8} {'select ms':>11} {'attend ms':>11} {'share':>7}")
    for length in args.lengths:
        print(run_case(length, args), flush=True)


if __name__ == "__main__":
    main()
