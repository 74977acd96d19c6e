"""Speed of routed block attention (routing + attention) against dense causal attention, measured in the same run.

    python -m hf_attn.bench.routed_speed --lengths 8192 16384 32768 --threads 1 --backward --memory

Each case is checked first against dense attention of sampled rows in float64; a case that fails gets no speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import Timing, interleaved, machine_load, paired_ratio
from hf_attn.ops.hfattn_sparse.routed import torch_path
from hf_attn.ops.hfattn_sparse.routed.layout import Geometry, density
from hf_attn.ops.hfattn_sparse.routed.routing import select_routes

FIGURES = ("speed-up", "limit", "forward and backward")


@dataclass
class Case:
    """Random inputs of one length and what runs on them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    block_size: int
    top_k: int
    allow_dense: bool

    @property
    def options(self) -> dict:
        scale = self.query.shape[-1] ** -0.5
        return dict(block_size=self.block_size, causal=True, scale=scale, allow_dense=self.allow_dense)

    def route(self) -> torch.Tensor:
        return select_routes(self.query, self.key, block_size=self.block_size, top_k=self.top_k, causal=True)

    def attend(self, routes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch_path.forward(self.query, self.key, self.value, routes, **self.options)

    def gradients(self, grad: torch.Tensor, routes: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> tuple:
        return torch_path.backward(grad, None, self.query, self.key, self.value, routes, out, lse, **self.options)

    def dense(self) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True, enable_gqa=True)


def make_case(length: int, args: argparse.Namespace) -> Case:
    """Random tensors; with args.skewed nearly all rows of all heads want block 1, beside what they find at random."""
    generator = torch.Generator().manual_seed(length)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, length, args.head_dim, generator=generator)

    query, key, value = random(args.heads), random(args.kv_heads), random(args.kv_heads)
    if args.skewed:
        direction = torch.zeros(args.head_dim)
        direction[0] = 3.0
        query += direction
        key[:, :, args.block_size : 2 * args.block_size] += direction
    dtype = getattr(torch, args.dtype)
    tensors = (query.to(dtype), key.to(dtype), value.to(dtype))
    return Case(*tensors, args.block_size, args.top_k, not args.no_dense)


def worst_error(case: Case, routes: torch.Tensor, out: torch.Tensor, samples: int = 24) -> float:
    """Largest difference of sampled rows from float64 attention over the blocks of their routes, over max |out|."""
    group = case.query.shape[1] // case.key.shape[1]
    length = case.key.shape[2]
    worst = scale = 0.0
    for row in torch.linspace(0, length - 1, samples).long().tolist():
        chosen = torch.zeros(case.query.shape[1], -(-length // case.block_size) + 1, dtype=torch.bool)
        chosen.scatter_(1, torch.where(routes[0, :, row] < 0, chosen.shape[1] - 1, routes[0, :, row]).long(), True)
        visible = chosen[:, :-1].repeat_interleave(case.block_size, 1)[:, :length] & (torch.arange(length) <= row)
        for head in range(case.query.shape[1]):
            keys = visible[head].nonzero().view(-1)
            key = case.key[0, head // group, keys].double()
            weights = (key @ case.query[0, head, row].double() * case.options["scale"]).softmax(0)
            expected = weights @ case.value[0, head // group, keys].double()
            worst = max(worst, float((out[0, head, row].double() - expected).abs().max()))
            scale = max(scale, float(expected.abs().max()))
    return worst / scale


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that torch had allocated at one time during a call, above what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak


def run_case(length: int, args: argparse.Namespace) -> Row:
    """One line of the table."""
    case = make_case(length, args)
    routes = case.route()
    out, lse = case.attend(routes)
    shape = Geometry(length, length, args.block_size, True)
    share = density(routes, shape)
    form = torch_path.plan(
        routes, q_len=length, k_len=length, block_size=args.block_size, causal=True, allow_dense=case.allow_dense
    )
    error, allowed = worst_error(case, routes, out), 20 * torch.finfo(case.query.dtype).eps
    if not error <= allowed:
        reason = f"check failed: error {error:.1e} > {allowed:.1e}"
        return Row(str(length), f"{length:>7}  {reason}, no speed", problem=reason)
    functions = {"dense": case.dense, "route": case.route, "forward": lambda: case.attend(routes)}
    if args.backward:
        grad = torch.randn_like(out)
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
        dense_out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        functions["dense_bwd"] = lambda: torch.autograd.grad(dense_out, inputs, grad, retain_graph=True)
        functions["backward"] = lambda: case.gradients(grad, routes, out, lse)
    times = interleaved(functions, repeats=args.repeats)
    both = _sum(times["route"], times["forward"])
    ratio = paired_ratio(times["dense"], both)
    line = f"{length:>7} {share:>8.3f} {form:>12} " + " ".join(
        f"{times[name].median * 1e3:>9.1f}" for name in ("dense", "route", "forward")
    )
    line += f" {ratio:>7.2f} {ratio * share:>11.2f}"
    figures = {"speed-up": ratio, "limit": ratio * share}
    if args.backward:
        step = paired_ratio(_sum(times["dense"], times["dense_bwd"]), _sum(both, times["backward"]))
        figures["forward and backward"] = step
        line += f" {times['dense_bwd'].median * 1e3:>9.1f} {times['backward'].median * 1e3:>9.1f} {step:>8.2f}"
    if args.memory:
        dense, routed = peak_bytes(case.dense), peak_bytes(lambda: case.attend(case.route()))
        line += f" {dense / 1e6:>9.1f} {routed / 1e6:>9.1f} {routed / dense:>7.2f}"
        if args.backward:
            line += f" {peak_bytes(lambda: case.gradients(grad, routes, out, lse)) / 1e6:>9.1f}"
    return Row(str(length), line, figures, times["dense"].spread)


def _sum(first: Timing, second: Timing) -> Timing:
    return Timing(tuple(a + b for a, b in zip(first.samples, second.samples, strict=True)))


def header(args: argparse.Namespace) -> str:
    line = f"{'N':>7} {'density':>8} {'form':>12} {'dense ms':>9} {'route ms':>9} {'attend ms':>9} {'x dense':>7} "
    line += f"{'x * density':>11}"
    if args.backward:
        line += f" {'dense bwd':>9} {'backward':>9} {'x f+b':>8}"
    if args.memory:
        line += f" {'dense MB':>9} {'MB':>9} {'MB x':>7}" + (f" {'bwd MB':>9}" if args.backward else "")
    return line


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skewed", action="store_true", help="all rows prefer one block")
    parser.add_argument("--no-dense", action="store_true", help="always the gathered form")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak of torch allocations, without the inputs")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.dtype}, {args.threads} thread(s), Hq={args.heads}, Hkv={args.kv_heads}, "
        f"D={args.head_dim}, block {args.block_size}, top_k {args.top_k}, median of {args.repeats}; {machine_load()}"
    )
    print(header(args))
    rows = [show(run_case(length, args)) for length in args.lengths]
    print(machine_load())
    return rows


if __name__ == "__main__":
    main()
