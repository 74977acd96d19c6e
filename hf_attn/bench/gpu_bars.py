"""Speed bars on a GPU: every family of kernels against the best dense attention of the same run.

    python -m hf_attn.bench.gpu_bars --output rows.jsonl [--only moba block_sparse] [--profile]

Each case is checked first; one that fails shows no speed. Times are those of captured graphs (no launches of the host),
the median of interleaved rounds. "limit" is speed-up x density: 1 would be a kernel that pays nothing for being sparse.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_attn import ops
from hf_attn.bench.figures import Row
from hf_attn.bench.levels import figures_row
from hf_attn.bench.runner import KINDS, dense_candidates
from hf_attn.bench.runner import measure as time_functions
from hf_attn.pattern import BlockPattern

FIGURES = ("speed-up", "limit", "selection", "over fla")
CHECKED_ROWS = 64
# Beyond this many tokens only cuDNN, the fastest at all lengths before.
LONG = 100_000


@dataclass
class Case:
    """One comparison.

    own, dense and parts: what is timed; density: computed over dense pairs; check: the largest error over what is
    allowed, above 1 is wrong; bar: speed-up asked for; limit: share of the limit asked for.
    """

    name: str
    own: Callable[[], object]
    dense: dict[str, Callable[[], object]]
    density: float
    check: Callable[[], float]
    bar: float | None = None
    limit: float | None = None
    parts: dict[str, Callable[[], object]] = field(default_factory=dict)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def heads(length: int, q: int, kv: int, dim: int, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> list[Tensor]:
    return [draw(batch, h, length, dim, dtype=dtype, seed=n) for n, h in enumerate((q, kv, kv))]


def dense(tensors: list[Tensor], *, causal: bool, backward: bool = False, mask: Tensor | None = None) -> dict:
    """Dense attention through the back ends of torch that take the task."""
    if mask is None:
        kinds = KINDS[1:2] if tensors[0].shape[2] > LONG else KINDS[:2]
        return dense_candidates(*tensors, causal=causal, backward=backward, kinds=kinds)
    # Only one back end takes a mask, and it has no grouped heads.
    query, *others = tensors
    leaves = [query, *(t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in others)]
    leaves = [t.detach().requires_grad_(backward) for t in leaves]
    grad = torch.randn_like(query)

    def run() -> object:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            out = F.scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=causal)
        return torch.autograd.grad(out, leaves, grad) if backward else out

    return {"efficient": run}


def both(attend: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward, and forward with backward to the tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    grad = torch.randn_like(tensors[0])

    def forward() -> object:
        with torch.no_grad():
            return attend(*tensors)

    return forward, lambda: torch.autograd.grad(attend(*leaves), leaves, grad)


def row_error(out: Tensor, tensors: list[Tensor], rows: Tensor, seen: Tensor) -> float:
    """Of sampled query rows: error over twice that of plain code in the same type. seen: bool [H, rows, keys]."""
    results = {}
    for dtype in (tensors[0].dtype, torch.float32):
        query, key, value = (t[:1].to(dtype) for t in tensors)
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scores = (query[:, :, rows] @ key.mT).float() * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(dtype)
        results[dtype] = (weights @ value).float()
    exact = results[torch.float32]
    allowed = 2 * ((results[tensors[0].dtype] - exact).abs().max() + torch.finfo(out.dtype).eps * exact.abs().max())
    return float((out[:1, :, rows].float() - exact).abs().max() / allowed)


def sample(length: int) -> Tensor:
    return torch.randint(length, (CHECKED_ROWS,), device="cuda", generator=torch.Generator("cuda").manual_seed(5))


def block_sparse() -> Iterator[Case]:
    """Random tenth of the causal blocks of 128, the diagonal among them, 16 heads over 4, D 128."""
    for length, limit in ((8192, 0.60), (65_536, 0.75)):
        tensors, size = heads(length, 16, 4, 128), {"block_q": 128, "block_k": 128, "q_len": length, "k_len": length}
        blocks = length // 128
        generator = torch.Generator("cuda").manual_seed(3)
        chance = torch.rand(1, 16, blocks, blocks, device="cuda", generator=generator)
        share = (0.1 * (blocks + 1) - 1) / (blocks - 1)  # of the blocks below the diagonal
        chosen = ((chance < share) | torch.eye(blocks, dtype=torch.bool, device="cuda")).tril()
        pattern = BlockPattern.from_dense(chosen, **size)
        rows, density = sample(length), pattern.density(causal=True)
        seen = chosen[0][:, rows // 128].repeat_interleave(128, -1)
        seen &= torch.arange(length, device="cuda") <= rows[:, None]

        def attend(*t: Tensor, pattern: BlockPattern = pattern) -> Tensor:
            return ops.block_sparse_attention(*t, pattern, causal=True)

        forward, train = both(attend, tensors)

        def check(forward=forward, tensors=tensors, rows=rows, seen=seen) -> float:
            return row_error(forward(), tensors, rows, seen)

        name = f"block-sparse {length // 1024}k"
        yield Case(f"{name} forward", forward, dense(tensors, causal=True), density, check, limit=limit)
        backward = dense(tensors, causal=True, backward=True)
        yield Case(f"{name} forward+backward", train, backward, density, check, limit=0.60)


def moba() -> Iterator[Case]:
    """MoBA with blocks of 128 and 8 of them a query, 16 heads over 4, D 128; routing included, its time beside it."""
    bars = {8192: (1.0, None), 32_768: (None, None), 65_536: (None, 2.0), 262_144: (10.0, 5.0)}
    for length, (bar, bar_backward) in bars.items():
        tensors = heads(length, 16, 4, 128)
        options = {"block_size": 128, "causal": True}

        def routes(query: Tensor, key: Tensor, options=options) -> Tensor:
            return ops.select_routes(query, key, top_k=8, **options)

        def attend(query: Tensor, key: Tensor, value: Tensor, options=options, routes=routes) -> Tensor:
            return ops.routed_block_attention(query, key, value, routes(query, key), **options)

        forward, train = both(attend, tensors)
        chosen, rows = routes(*tensors[:2])[0], sample(length)
        picked = chosen[:, rows].long()  # [H, rows, 8]
        seen = torch.zeros(16, CHECKED_ROWS, length // 128, dtype=torch.bool, device="cuda")
        seen.scatter_(2, torch.where(picked < 0, rows[None, :, None] // 128, picked), True)
        seen = seen.repeat_interleave(128, -1) & (torch.arange(length, device="cuda") <= rows[:, None])

        def check(forward=forward, tensors=tensors, rows=rows, seen=seen) -> float:
            return row_error(forward(), tensors, rows, seen)

        # Each query sees seven whole blocks and half of its own, as soon as it has them.
        visible = (torch.arange(length) // 128).clamp(max=7) * 128 + torch.arange(length) % 128 + 1
        density = float(visible.sum() / (length * (length + 1) / 2))
        parts = {"selection": lambda tensors=tensors, routes=routes: routes(*tensors[:2])}
        name = f"MoBA {length // 1024}k"
        yield Case(f"{name} forward", forward, dense(tensors, causal=True), density, check, bar=bar, parts=parts)
        if bar_backward:
            backward = dense(tensors, causal=True, backward=True)
            yield Case(f"{name} forward+backward", train, backward, density, check, bar=bar_backward, parts=parts)


def linear() -> Iterator[Case]:
    """Lightning attention, batch 4, 32 heads, D 128, against causal softmax attention; fla beside it if installed."""
    for length in (2048, 4096, 8192, 32_768):
        batch = 4 if length <= 8192 else 1
        tensors = heads(length, 32, 32, 128, batch=batch)
        slopes = torch.tensor([2 ** (-8 * (h + 1) / 32) for h in range(32)], device="cuda")

        def attend(*t: Tensor, slopes=slopes) -> Tensor:
            return ops.linear_attention(*t, slopes)

        forward, train = both(attend, tensors)

        def check(tensors=tensors, forward=forward, slopes=slopes) -> float:
            narrow = [t[:1, :2, :2048] for t in tensors]
            exact = ops.linear_attention(*(t.double().cpu() for t in narrow), slopes[:2].double().cpu())
            found = forward()[:1, :2, :2048]
            return float((found.double().cpu() - exact).abs().max() / (2e-2 * exact.abs().max()))

        parts = {}
        try:
            from fla.ops.simple_gla import chunk_simple_gla

            turned = [t.transpose(1, 2).contiguous() for t in tensors]
            leaves = [t.detach().requires_grad_() for t in turned]
            gates = (-slopes).expand(batch, length, 32).contiguous()
            grad = torch.randn_like(turned[2])

            def peer(leaves=leaves, gates=gates) -> Tensor:
                return chunk_simple_gla(*leaves, g=gates, scale=1.0)[0]

            def peer_forward(turned=turned, gates=gates) -> Tensor:
                with torch.no_grad():
                    return chunk_simple_gla(*turned, g=gates, scale=1.0)[0]

            parts = {"fla": peer_forward}
            train_parts = {"fla": lambda leaves=leaves, grad=grad, peer=peer: torch.autograd.grad(peer(), leaves, grad)}
        except ImportError:
            train_parts = {}
        name, bar = f"linear {length // 1024}k", 1.0 if length >= 4096 else None
        yield Case(f"{name} forward", forward, dense(tensors, causal=True), 1.0, check, bar=bar, parts=parts)
        backward = dense(tensors, causal=True, backward=True)
        yield Case(f"{name} forward+backward", train, backward, 1.0, check, bar=bar, parts=train_parts)


def neighbours(space: tuple[int, ...], options: dict[str, Any], rows: Tensor) -> Tensor:
    """Rows of `ops.neighborhood_mask`, without the whole of it."""
    seen = torch.ones(len(rows), 1, dtype=torch.bool, device="cuda")
    places = torch.unravel_index(rows, space)
    for axis, (length, place) in enumerate(zip(space, places, strict=True)):
        sizes = {n: v if isinstance(v, int) else v[axis] for n, v in options.items()}
        own = ops.neighborhood_mask((length,), **sizes, device="cuda")[place]
        seen = (seen[:, :, None] & own[:, None, :]).flatten(1)
    return seen


def neighborhood() -> Iterator[Case]:
    """Neighborhoods of 64 x 64 maps and of a video; against dense attention without a mask, and with one on the map."""
    cases = [
        ("2-D 64x64 K7", (64, 64), 7, 1, 16, 64, 4, 0.5),
        ("2-D 64x64 K13", (64, 64), 13, 1, 16, 64, 4, 0.5),
        ("2-D 256x256 K80", (256, 256), 80, 1, 8, 128, 1, 0.5),
        ("2-D 256x256 K80 stride 16", (256, 256), 80, 16, 8, 128, 1, 0.8),
        ("3-D 32x48x80 K18x24x24", (32, 48, 80), (18, 24, 24), 1, 8, 128, 1, 0.5),
        ("3-D 32x48x80 K16x24x16 stride 16x8x8", (32, 48, 80), (16, 24, 16), (16, 8, 8), 8, 128, 1, 0.8),
    ]
    for name, space, kernel, stride, count, dim, batch, limit in cases:
        length = int(torch.tensor(space).prod())
        flat = heads(length, count, count, dim, torch.float16, batch)
        grid = [t.transpose(1, 2).unflatten(1, space).contiguous() for t in flat]
        options = {"kernel_size": kernel, "stride": stride}

        def attend(*t: Tensor, options=options) -> Tensor:
            return ops.neighborhood_attention(*t, **options)

        forward, train = both(attend, grid)
        sizes = (kernel,) * len(space) if isinstance(kernel, int) else kernel
        density = float(torch.tensor(sizes).prod()) / length
        sampled = sample(length)
        mask = ops.neighborhood_mask(space, **options, device="cuda") if length <= 4096 else None
        seen = neighbours(space, options, sampled)

        def check(forward=forward, flat=flat, sampled=sampled, seen=seen) -> float:
            return row_error(forward().flatten(1, -3).transpose(1, 2), flat, sampled, seen)

        yield Case(f"neighborhood {name} forward", forward, dense(flat, causal=False), density, check, limit=limit)
        if mask is not None:
            masked, masked_back = (dense(flat, causal=False, mask=mask, backward=b) for b in (False, True))
            yield Case(f"neighborhood {name} forward, masked", forward, masked, density, check, bar=3.0)
            yield Case(f"neighborhood {name} forward+backward, masked", train, masked_back, density, check, bar=2.0)


def others() -> Iterator[Case]:
    """Sink and window, and pyramids, 16 heads over 4 at 16k."""
    length = 16_384
    tensors, rows = heads(length, 16, 4, 128), sample(length)
    keys = torch.arange(length, device="cuda")
    seen = (keys <= rows[:, None]) & ((keys < 128) | (keys > rows[:, None] - 1024))

    def window(*t: Tensor) -> Tensor:
        return ops.sink_window_attention(*t, sinks=128, window=1024)

    forward, _ = both(window, tensors)
    density = (1152 * length - 1152 * 1152 / 2) / (length * length / 2)
    yield Case(
        "sinks 128 + window 1024, 16k",
        forward,
        dense(tensors, causal=True),
        density,
        lambda: row_error(forward(), tensors, rows, seen.expand(16, -1, -1)),
    )
    blocks = length // 128
    generator = torch.Generator("cuda").manual_seed(7)
    chance = torch.rand(1, 16, blocks, blocks, device="cuda", generator=generator)
    levels = (chance < 0.1) * 1 + ((chance >= 0.1) & (chance < 0.2)) * 2 + ((chance >= 0.2) & (chance < 0.4)) * 4
    levels = levels.to(torch.uint8)

    def pyramid(*t: Tensor) -> Tensor:
        return ops.pyramid_attention(*t, levels, block_q=128, block_k=128)

    walk, _ = both(pyramid, tensors)

    def check() -> float:
        narrow = [t[:, :1, :2048] for t in tensors]
        own = levels[:, :1, :16, :16].contiguous()
        own[:, :, :, 0] = 1
        results = []
        for path, dtype in (("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.bfloat16)):
            os.environ["HF_ATTN_BACKEND"] = path
            results.append(ops.pyramid_attention(*(t.to(dtype) for t in narrow), own, block_q=128, block_k=128).float())
        del os.environ["HF_ATTN_BACKEND"]
        exact, plain, got = results
        return float((got - exact).abs().max() / (3 * (plain - exact).abs().max()))

    share = float((1 / levels.float()).where(levels > 0, 0).mean())
    yield Case("pyramids of blocks of 128, 16k, not causal", walk, dense(tensors, causal=False), share, check)


FAMILIES = {f.__name__: f for f in (block_sparse, moba, linear, neighborhood, others)}


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """A row of results."""
    row: dict[str, Any] = {"case": case.name, "density": round(case.density, 4)}
    row |= {name: bar for name, bar in (("bar", case.bar), ("limit bar", case.limit)) if bar is not None}
    error = case.check()
    torch.cuda.empty_cache()
    if not error <= 1:
        return row | {"wrong": f"error {error:.2f} times what is allowed"}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.own()
    row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    functions = {"own": case.own, **{f"dense {n}": f for n, f in case.dense.items()}}
    for name, part in case.parts.items():
        try:
            part()
        except Exception as reason:  # whatever another package makes of it, our own times stand
            row[f"{name} failed"] = f"{type(reason).__name__}: {reason}"[:200]
        else:
            functions[name] = part
    times = time_functions(functions, "cuda", repeats=repeats)
    row |= {f"{name} ms": round(t.timing.median * 1e3, 4) for name, t in times.items()}
    row["error"] = round(error, 3)
    best = min((name for name in times if name.startswith("dense")), key=lambda name: times[name].timing.median)
    cells = figures_row(times["own"], times[best], best, case.density, {})
    names = {"spread": "spread", "dense spread": "dense_spread", "speed-up": "speedup", "limit": "limit"}
    return row | {name: round(cells[cell], 3) for name, cell in names.items()}


def row_of(found: dict[str, Any]) -> Row:
    """The figures of a row of results; `selection` is a share of the whole."""
    figures = {name: found[name] for name in ("speed-up", "limit") if name in found}
    if "selection ms" in found:
        figures["selection"] = found["selection ms"] / found["own ms"]
    if "fla ms" in found:
        figures["over fla"] = found["fla ms"] / found["own ms"]
    problem = found.get("wrong") or found.get("failed") or ""
    return Row(found["case"], str(found), figures, found.get("dense spread"), problem)


def kernel_profile(case: Case) -> list[tuple[str, float, int]]:
    """(kernel, ms, launches) of one call, slowest first."""
    case.own()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.own()
        torch.cuda.synchronize()
    events = [(e.key[:70], e.self_device_time_total / 1e3, e.count) for e in profile.key_averages()]
    return sorted((e for e in events if e[1] > 0), key=lambda e: -e[1])


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="append rows as JSON lines")
    parser.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--skip", default="none", help="no cases whose name holds this")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="also the kernels of every case")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA or ROCm device, and found none; `hf-attn bench bars` measures the bars of a CPU")
    found = []
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for family in arguments.only:
        for case in FAMILIES[family]():
            if arguments.match not in case.name or arguments.skip in case.name:
                continue
            try:
                row = measure(case, arguments.repeats)
                if arguments.profile:
                    row["kernels"] = kernel_profile(case)[:12]
            except RuntimeError as error:
                row = {"case": case.name, "failed": f"{type(error).__name__}: {error}"[:600]}
            print({k: v for k, v in row.items() if k != "kernels"}, flush=True)
            for kernel, ms, count in row.get("kernels", []):
                print(f"      {ms:8.3f} ms {count:4d} x {kernel}", flush=True)
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(json.dumps(machine | row) + "\n")
            found.append(row_of(row))
            torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    main()
