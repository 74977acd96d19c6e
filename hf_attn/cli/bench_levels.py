"""`hf-attn bench op`, `mask` and `peer`."""

from __future__ import annotations

from pathlib import Path

import typer

from hf_attn.bench.levels import op_jobs, run_jobs
from hf_attn.bench.masks import mask_jobs
from hf_attn.bench.peers import PEERS, cpu_flex_jobs, peer_jobs
from hf_attn.bench.record import Store
from hf_attn.cli import bench_common as common
from hf_attn.cli.common import one_clear_line


def op(
    ops: list[str] = typer.Argument(None, metavar="[OPS...]", help="Names in hf_attn.ops; default: all of them."),
    lengths: str = common.LENGTHS,
    density: str = common.DENSITY,
    dtype: str = common.DTYPE,
    passes: str = common.PASS,
    path: str = common.PATH,
    device: str = common.DEVICE,
    heads: int = common.HEADS,
    kv_heads: int = common.KV_HEADS,
    head_dim: int = common.HEAD_DIM,
    block: int = common.BLOCK,
    threads: int = common.THREADS,
    repeats: int = common.REPEATS,
    graphs: bool = common.GRAPHS,
    output: Path = common.RESULTS,
    again: bool = common.AGAIN,
    run: str = common.RUN,
    report: Path = common.REPORT,
) -> None:
    """Time ops of hf_attn.ops on every path, beside the best dense attention of the same rounds.

    "backward" is a forward and a backward. Each case is checked first; one that is wrong has no speed.

    Example: `hf-attn bench op block_sparse_attention --lengths 4096 8192 --density 0.125 0.25`
    """
    with one_clear_line():
        store = Store(output, again=again)
        plan = common.make_plan(
            lengths=lengths, density=density, dtype=dtype, passes=passes, path=path, device=device, heads=heads,
            kv_heads=kv_heads, head_dim=head_dim, block=block, threads=threads, repeats=repeats, graphs=graphs, run=run,
        )  # fmt: skip
        jobs = op_jobs(ops or [], plan)
        common.carry_out("op", plan, store, lambda progress: run_jobs(jobs, plan, store, progress), report)


def mask(
    patterns: list[str] = typer.Argument(None, metavar="[PATTERNS...]", help="Names of patterns; default: all."),
    lengths: str = common.LENGTHS,
    density: str = common.DENSITY,
    dtype: str = common.DTYPE,
    passes: str = common.PASS,
    path: str = common.PATH,
    device: str = common.DEVICE,
    heads: int = common.HEADS,
    kv_heads: int = common.KV_HEADS,
    head_dim: int = common.HEAD_DIM,
    block: int = common.BLOCK,
    threads: int = common.THREADS,
    repeats: int = common.REPEATS,
    graphs: bool = common.GRAPHS,
    output: Path = common.RESULTS,
    again: bool = common.AGAIN,
    run: str = common.RUN,
    report: Path = common.REPORT,
) -> None:
    """Time block-sparse attention on patterns: fixed ones, and ones that are chosen from the data ("select").

    causal, window, sinks+window, strided, documents, random, shared-random, bidirectional; top-k, threshold,
    cumulative.

    Example: `hf-attn bench mask window strided top-k --lengths 8192 --density 0.125`
    """
    with one_clear_line():
        store = Store(output, again=again)
        plan = common.make_plan(
            lengths=lengths, density=density, dtype=dtype, passes=passes, path=path, device=device, heads=heads,
            kv_heads=kv_heads, head_dim=head_dim, block=block, threads=threads, repeats=repeats, graphs=graphs, run=run,
        )  # fmt: skip
        jobs = mask_jobs(patterns or [], plan)
        common.carry_out("mask", plan, store, lambda progress: run_jobs(jobs, plan, store, progress), report)


def peer(
    peers: list[str] = typer.Argument(None, metavar="[PEERS...]", help=f"Of {', '.join(PEERS)}; default: all."),
    cpu_flex: bool = typer.Option(
        False,
        "--cpu-flex",
        help="Against compiled flex_attention: 4k and 8k, fp32 and bf16, 1 and 2 threads.",
    ),
    lengths: str = common.LENGTHS,
    density: str = common.DENSITY,
    dtype: str = common.DTYPE,
    passes: str = common.PASS,
    path: str = common.PATH,
    device: str = common.DEVICE,
    heads: int = common.HEADS,
    kv_heads: int = common.KV_HEADS,
    head_dim: int = common.HEAD_DIM,
    block: int = common.BLOCK,
    threads: int = common.THREADS,
    repeats: int = common.REPEATS,
    graphs: bool = common.GRAPHS,
    output: Path = common.RESULTS,
    again: bool = common.AGAIN,
    run: str = common.RUN,
    report: Path = common.REPORT,
) -> None:
    """Time other packages on the same task, inputs and rounds; "/peer" is their time over ours.

    A peer that is not installed, or lacks a GPU or a C++ compiler, has a row that says so.

    Example: `hf-attn bench peer flex --lengths 4096 8192`
    """
    with one_clear_line():
        store = Store(output, again=again)
        plan = common.make_plan(
            lengths=lengths or ("4096 8192" if cpu_flex else ""), density=density, dtype=dtype, passes=passes,
            path=path, device="cpu" if cpu_flex else device, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            block=block, threads=threads, repeats=repeats, graphs=graphs, run=run,
        )  # fmt: skip
        jobs = cpu_flex_jobs(plan, plan.lengths) if cpu_flex else peer_jobs(peers or [], plan)
        common.carry_out("peer", plan, store, lambda progress: run_jobs(jobs, plan, store, progress), report)
