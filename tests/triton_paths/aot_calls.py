"""What is compiled ahead of time: every call of `hf_attn.bench.kernel_calls` for a choice of shapes and targets.

    python -m tests.triton_paths.aot_calls --shard 0/2 [--wide]

Prints one JSON line a program, and one that says which rows of the table were used. A process of its own, as Triton
compiles only where its interpreter was never chosen.
"""

from __future__ import annotations

import argparse
import json

import torch

from hf_attn.bench.kernel_calls import Shape, available_calls, table_head_dims
from hf_attn.ops.hfattn_sparse import aot
from hf_attn.ops.hfattn_sparse.launch import find_row

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def shapes(target: str, wide: bool) -> list[Shape]:
    """Quick: the head dimensions that must not spill on sm_90, one elsewhere. Wide: all types, sizes and layouts."""
    dims = sorted({*table_head_dims(), 64, 128, 256})
    packed = {"causal": False, "index": True, "bias": True}
    if not wide:
        near = [Shape(BF16, dim) for dim in dims if dim <= 128]
        return [*near, Shape(BF16, 128, **packed)] if target == "sm_90" else [Shape(BF16)]
    found = [Shape(dtype, dim, **kind) for dtype in (BF16, FP16, FP32) for dim in dims for kind in ({}, packed)]
    return found + [Shape(BF16, *size) for size in ((192, 128), (256, 16), (40, 72), (8, 8))]


def programs(target: str, wide: bool) -> tuple[list[tuple[str, int, aot.Specialised]], list[dict]]:
    """(where it comes from, largest head dimension, program) without repeats, and the rows of the table in use."""
    found: dict[tuple, tuple[str, int, aot.Specialised]] = {}
    rows = []
    for call in available_calls():
        for shape in shapes(target, wide):
            launches, lookups = call.record(shape, target)
            for program in aot.distinct(launches):
                head_dim = max(shape.head_dim, shape.value_dim or 0)
                found.setdefault(program.key, (f"{call.name}, {shape}", head_dim, program))
            rows += [{"kernel": name, **find_row(name, target, *rest)} for name, *rest in lookups]
    return list(found.values()), rows


def fits(config: dict[str, int], settings: dict) -> bool:
    """Whether a program has this configuration; few rows make its tile of queries smaller."""
    return all(settings.get(name) == value or name == "BLOCK_M" and name in settings for name, value in config.items())


def specialisation_errors(program: aot.Specialised) -> list[str]:
    """Arguments for which the just-in-time compiler decides otherwise than `aot.specialise`."""
    from triton._C.libtriton import native_specialize_impl
    from triton.compiler import make_backend

    launch, errors = program.launch, []
    backend = make_backend(aot._gpu(launch.target))
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    for number, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr or parameter.name not in values:
            continue
        options = (not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment)
        kind, marks = native_specialize_impl(type(backend), values[parameter.name], False, *options)
        marks = backend.parse_attr(marks) if kind != "constexpr" and marks else []
        ours = program.source.signature[parameter.name], program.source.attrs.get((number,), [])
        if (kind, marks) != ours:
            errors.append(f"{aot.kernel_name(launch)}: {parameter.name} is {ours}, Triton says {(kind, marks)}")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(aot.SHARED_LIMITS))
    parser.add_argument("--shard", default="0/1", help="which part of how many")
    parser.add_argument("--wide", action="store_true")
    args = parser.parse_args()
    part, parts = (int(number) for number in args.shard.split("/"))
    for target in args.targets:
        found, rows = programs(target, args.wide)
        for origin, head_dim, program in found[part::parts]:
            result = {"target": target, "origin": origin, "head_dim": head_dim}
            try:
                built = aot.compile_launch(program)
            except Exception as error:  # any kernel that does not compile is a line of the report
                result |= {
                    "kernel": aot.kernel_name(program.launch),
                    "error": f"{type(error).__name__}: {error}"[:2000],
                }
            else:
                result |= {"kernel": str(built), "shared": built.shared, "spills": built.spills}
                measured = any("measured" in row and fits(row["config"], built.meta | built.options) for row in rows)
                result |= {"registers": built.registers, "problem": aot.problem(built), "measured": measured}
            print(json.dumps(result | {"specialisation": specialisation_errors(program)}), flush=True)
        if part == 0:
            print(json.dumps({"target": target, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
