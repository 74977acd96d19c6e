"""Other packages on the same task, the same inputs and in the same rounds: `hf-attn bench peer`.

Every result, theirs as well as ours, is checked against attention written out in fp64 before it is timed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.bench.cases import Case, Setting, causal_rows, softmax_rows
from hf_attn.bench.levels import Job, Plan, key_row
from hf_attn.bench.op_cases import block_rows, quantized, random_pattern, window_density, window_of, window_rows
from hf_attn.bench.other_cases import flat_map, linear, neighborhood
from hf_attn.pattern import BlockPattern

# Errors that INT8 attention is allowed, in the Frobenius norm.
QUANTIZED = 0.05


@dataclass(frozen=True)
class Peer:
    """Another package.

    Args:
        tasks: names of `TASKS` that it can do.
        package: what it is imported as.
        install: how to get it.
        cuda: whether it needs a GPU.
        passes: of "forward" and "backward", what it has (on a CPU: flex has a forward alone).
    """

    tasks: tuple[str, ...]
    package: str
    install: str
    cuda: bool = True
    passes: tuple[str, ...] = ("forward", "backward")

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, None where it can."""
        if self.cuda and not device.startswith("cuda"):
            return "not run: needs a GPU"
        if importlib.util.find_spec(self.package) is None:
            return f"not run: not installed ({self.install})"
        if self.package == "torch" and not device.startswith("cuda"):
            return cxx_missing()
        return None


PEERS = {
    "flex": Peer(("blocks-causal", "blocks-lower", "blocks-full", "neighborhood"), "torch", "pip install torch", False),
    "natten": Peer(("neighborhood",), "natten", "https://natten.org/install"),
    "fla": Peer(("linear",), "fla", "pip install flash-linear-attention"),
    "flash-attn": Peer(("window",), "flash_attn", "pip install flash-attn"),
    "kernels-community": Peer(("window",), "kernels", "pip install kernels"),
    "sageattention": Peer(("int8",), "sageattention", "pip install sageattention", passes=("forward",)),
}


@cache
def cxx_missing() -> str | None:
    """What inductor lacks on a CPU: a C++ compiler that runs, by $CXX or the usual names."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]:
        found = shutil.which(name)
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return None
    return "not run: needs a C++ compiler (install g++, or set CXX)"


# -- tasks -------------------------------------------------------------------------------------------------------------


def blocks(kind: str, setting: Setting) -> Case:
    """A static pattern: "causal" with the diagonal blocks cut, "lower" with whole ones, "full" bidirectional."""
    pattern = random_pattern(setting, causal=kind != "full")
    causal = kind == "causal"
    tensors, heads = setting.shape.tensors(), setting.shape.heads
    mask = pattern.to_dense()
    sizes = {"block_q": setting.block, "block_k": setting.block, "q_len": setting.length, "k_len": setting.length}

    def run(*leaves: Tensor) -> Tensor:
        return ops.block_sparse_attention(*leaves, pattern, causal=causal)

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        visible = block_rows(pattern, rows, heads)
        visible = visible & causal_rows(rows, setting.length) if causal else visible
        return softmax_rows(leaves[0][:, :, rows], *leaves[1:], visible, setting.shape.scale)

    build = {
        "auto": partial(BlockPattern.from_dense, mask, **sizes),
        "flex": partial(flex_mask, mask, causal, setting),
    }
    share = pattern.density(causal=kind != "full")
    rivals = {"flex": flex_function(partial(flex_mask, mask, causal, setting))}
    return Case(run, tensors, expected, tensors, kind != "full", share, rivals=rivals, builds=build)


def flex_mask(mask: Tensor, causal: bool, setting: Setting) -> Any:
    """A BlockMask of a block mask: whole blocks are full ones, the diagonal ones of causal attention are cut."""
    from torch.nn.attention.flex_attention import BlockMask

    partial_blocks = torch.zeros_like(mask)
    if causal:
        diagonal = torch.eye(mask.shape[2], dtype=torch.bool, device=mask.device)
        partial_blocks, mask = mask & diagonal, mask & ~diagonal
    cut, full = (_listed(m) for m in (partial_blocks, mask))
    return BlockMask.from_kv_blocks(
        *cut, *full, BLOCK_SIZE=(setting.block, setting.block), seq_lengths=(setting.length, setting.length),
        mask_mod=(lambda b, h, q, k: q >= k) if causal else None,
    )  # fmt: skip


def _listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and lists of a block mask, as BlockMask wants them."""
    order = mask.int().argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32), order.to(torch.int32)


def flex_function(build: Callable[[], Any]) -> Callable[..., Tensor]:
    """Compiled FlexAttention; the mask is built, and the function compiled, at its first call."""
    made: list[Any] = []

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not made:
            from torch._inductor import config
            from torch.nn.attention.flex_attention import flex_attention

            torch._dynamo.reset()  # variants of one function count against dynamo's limit
            config.cpp.threads = torch.get_num_threads()  # generated code has the number in it
            made.extend([torch.compile(flex_attention, dynamic=False), build()])
        return made[0](query, key, value, block_mask=made[1], enable_gqa=query.shape[1] != key.shape[1])

    return run


def near(setting: Setting) -> Case:
    """Neighborhoods on a map; flex takes the map flattened, compiled, with a mask of its own."""
    from hf_attn.ops.hfattn_sparse.neighborhood.flex_path import block_mask
    from hf_attn.ops.hfattn_sparse.neighborhood.op import windows_of

    case = neighborhood(setting)
    space, kernel = list(case.leaves[0].shape[1:3]), case.run.keywords["kernel"]
    windows = windows_of(space, kernel, [1, 1], [1, 1], [False, False])
    attend = flex_function(partial(block_mask, windows, 0, setting.shape.device))

    def by_flex(*leaves: Tensor) -> Tensor:
        return attend(*(flat_map(x) for x in leaves)).transpose(1, 2).unflatten(1, space)

    return replace(case, rivals={**case.rivals, "flex": by_flex})


def window(setting: Setting) -> Case:
    """A causal sliding window without sinks."""
    size = window_of(setting)

    def run(*leaves: Tensor) -> Tensor:
        return ops.sink_window_attention(*leaves, sinks=0, window=size)

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        visible = window_rows(setting, rows, 0, size)
        return softmax_rows(leaves[0][:, :, rows], *leaves[1:], visible, setting.shape.scale)

    def by_flash(load: Callable[[], Any], *leaves: Tensor) -> Tensor:
        moved = [x.transpose(1, 2) for x in leaves]
        out = load()(*moved, causal=True, window_size=(size - 1, 0))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    tensors = setting.shape.tensors()
    rivals = {"flash-attn": partial(by_flash, _flash_attn), "kernels-community": partial(by_flash, _hub_flash)}
    share = window_density(setting, 0, size)
    return Case(run, tensors, expected, tensors, True, share, rivals=rivals)


@cache
def _flash_attn() -> Callable[..., Any]:
    from flash_attn import flash_attn_func

    return flash_attn_func


@cache
def _hub_flash() -> Callable[..., Any]:
    from kernels import get_kernel

    return get_kernel("kernels-community/flash-attn2").flash_attn_func


def int8(setting: Setting) -> Case:
    """Whole attention with INT8 products of query and key, bidirectional."""

    def by_sage(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from sageattention import sageattn

        return sageattn(query, key, value, tensor_layout="HND", is_causal=False)

    case = quantized(replace(setting, density=1.0))
    return replace(case, rivals={"sageattention": by_sage}, tolerance=QUANTIZED)


TASKS: dict[str, Callable[[Setting], Case]] = {
    "blocks-causal": partial(blocks, "causal"),
    "blocks-lower": partial(blocks, "lower"),
    "blocks-full": partial(blocks, "full"),
    "neighborhood": near,
    "linear": linear,
    "window": window,
    "int8": int8,
}


def peer_jobs(names: Iterable[str], plan: Plan, tasks: Sequence[str] = ()) -> list[Job]:
    """Jobs of peers, short lengths first; what is missing becomes rows that say so.

    Raises ValueError for an unknown peer or task.
    """
    names = list(names) or list(PEERS)
    for what, given, known in (("peer", names, PEERS), ("task", tasks, TASKS)):
        for name in given:
            if name not in known:
                raise ValueError(f"no {what} is called {name!r}; there are {', '.join(known)}")
    jobs = []
    for length in plan.lengths:
        for name in names:
            peer = PEERS[name]
            missing = peer.missing(plan.device)
            for task in (t for t in peer.tasks if not tasks or t in tasks):
                for dtype in plan.dtypes:
                    for density in plan.densities if task != "int8" else (1.0,):
                        for kind in (p for p in ("forward", "backward") if p in plan.passes):
                            setting = plan.setting(dtype, length, density, False)
                            row = key_row("peer", f"{task} {name}", plan, setting, dtype, kind)
                            jobs.append(_job(row, name, peer, missing, task, setting, kind, plan))
    return jobs


def _job(
    row: dict, name: str, peer: Peer, missing: str | None, task: str, setting: Setting, kind: str, plan: Plan
) -> Job:
    absent = missing
    if absent is None and kind not in peer.passes or (name == "flex" and kind == "backward" and plan.device == "cpu"):
        absent = absent or f"not run: {name} has no backward here"
    paths = plan.paths or ("auto",)
    variants: dict[str, tuple[str, str | None]] = {path: (path, None) for path in paths}
    return Job(row, variants | {name: ("auto", name)}, partial(TASKS[task], setting), {name: absent} if absent else {})


def cpu_flex_jobs(plan: Plan, lengths: Sequence[int] = (4096, 8192), threads: Sequence[int] = (1, 2)) -> list[Job]:
    """The bars against compiled FlexAttention on a CPU: 12.5 % of the blocks, fp32 and bf16, one thread and two."""
    jobs = []
    for count in threads:
        torch.set_num_threads(count)
        sized = replace(plan, lengths=lengths, densities=(0.125,), dtypes=("fp32", "bf16"), passes=("forward",))
        jobs += peer_jobs(["flex"], sized, ("blocks-causal", "blocks-lower", "blocks-full"))
    return jobs
