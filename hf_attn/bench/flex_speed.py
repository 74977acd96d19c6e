"""Block-sparse attention against compiled flex_attention on a CPU, the same static blocks: 12.5 %, none of them cut.

    python -m hf_attn.bench.flex_speed --threads 1 --length 4096 --dtype fp32

`lower`: blocks below and on the diagonal; `full`: bidirectional. Building the pattern is in no time but in its own
column. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from hf_attn.bench.figures import Row, show
from hf_attn.bench.kernel_calls import Shape
from hf_attn.bench.levels import DTYPES, Plan, run_job
from hf_attn.bench.peers import cxx_missing, peer_jobs
from hf_attn.bench.timing import machine_load

FIGURES = ("over flex", "speed-up")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[4096])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32"])
    parser.add_argument("--kind", choices=("lower", "full"), nargs="+", default=["lower", "full"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if cxx_missing():
        raise SystemExit(cxx_missing())
    shape = Shape(heads=8, kv_heads=4, head_dim=64)
    plan = Plan("cpu", args.dtype, args.length, passes=("forward",), shape=shape, repeats=args.repeats)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {machine_load()}; times in ms")
    print(f"{'blocks':8}{'dtype':6}{'tokens':>7}{'dense':>10}{'ours':>10}{'flex':>10}{'build':>8}{'/flex':>8}  status")
    rows = []
    for job in peer_jobs(["flex"], plan, [f"blocks-{kind}" for kind in args.kind]):
        ours, flex = run_job(job, plan)
        kind = job.row["name"].split()[0].removeprefix("blocks-")
        dtype, length = job.row["dtype"], job.row["length"]
        case = f"{kind} {dtype} {length}"
        if ours.get("over_peer") is None:
            problem = f"{ours['status']}; {flex['status']}"
            rows.append(show(Row(case, f"{job.row['name']}: FAILED: {problem}", problem=problem)))
            continue
        line = (
            f"{kind:8}{dtype:6}{length:7}{ours['dense_ms']:10.1f}{ours['ms']:10.1f}{flex['ms']:10.1f}"
            f"{flex['build_ms']:8.2f}{ours['over_peer']:8.2f}  {ours['status']}"
        )
        figures = {"over flex": ours["over_peer"], "speed-up": ours["speedup"]}
        problem = "" if ours["status"] == "ok" else ours["status"].removeprefix("rejected: ")
        rows.append(show(Row(case, line, figures, ours["dense_spread"], problem)))
    return rows


if __name__ == "__main__":
    main()
