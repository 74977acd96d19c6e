"""Compiling recorded launches for a device that is not there: shared memory, registers and spills of every kernel."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, interpreting

# Bytes of shared memory (LDS) that one program may use.
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
# Bytes that a row of the table may spill which was timed on a device: it was the fastest there, under one Triton.
MEASURED_SPILLS = 256
_POINTERS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel.

    shared: bytes of shared memory; registers: of a thread; spills: bytes of registers that were stored to and loaded
    from memory (NVIDIA), or spilled registers (AMD); meta: the constexprs; options: num_warps and num_stages.
    """

    kernel: str
    target: str
    shared: int
    registers: int
    spills: int
    meta: dict[str, Any]
    options: dict[str, int]

    def __str__(self) -> str:
        settings = " ".join(f"{name}={value}" for name, value in {**self.meta, **self.options}.items())
        return f"{self.kernel} on {self.target} ({settings})"


@dataclass(frozen=True)
class Specialised:
    """A launch as the compiler sees it; launches with the same `key` are the same program."""

    launch: Launch
    source: Any
    key: tuple[str, str, str]


def specialise(launch: Launch) -> Specialised:
    """Types, constants and divisibility of the arguments, by the rules of Triton's just-in-time compiler.

    None, and integers equal to 1, become constants; pointers and integers divisible by 16 are marked as such.
    """
    if interpreting():
        raise RuntimeError("kernels compile only where TRITON_INTERPRET was unset when triton was imported")
    from triton.compiler import ASTSource, make_backend

    kernel, backend = launch.kernel, make_backend(_gpu(launch.target))
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.meta
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        kind, marks = ("constexpr", None) if parameter.is_constexpr else _kind(value, parameter, launch.target)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(number,)] = value
        elif marks:
            attributes[(number,)] = backend.parse_attr(marks)
    source = ASTSource(kernel, signature, constants, attributes)
    return Specialised(launch, source, (source.hash(), launch.target, str(sorted(launch.options.items()))))


def distinct(launches: Iterable[Launch]) -> list[Specialised]:
    """The different programs among the launches, in order of appearance."""
    found: dict[tuple[str, str, str], Specialised] = {}
    for launch in launches:
        program = specialise(launch)
        found.setdefault(program.key, program)
    return list(found.values())


def compile_launch(program: Launch | Specialised) -> Compiled:
    """Compile for the launch's target; needs no GPU. Raises what Triton raises when the kernel does not compile."""
    import triton

    program = specialise(program) if isinstance(program, Launch) else program
    launch, log = program.launch, io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(program.source, target=_gpu(launch.target), options=dict(launch.options))
    if launch.target.startswith("gfx"):
        registers, spills = _amd_resources(built.asm["amdgcn"])
    else:
        # Nothing is logged when the binary came from Triton's cache.
        text = log.getvalue()
        text = text if "registers" in text else _ptxas_log(built.asm["ptx"], launch.target)
        registers, spills = _nvidia_resources(text)
    shared, settings = built.metadata.shared, (dict(launch.meta), dict(launch.options))
    return Compiled(kernel_name(launch), launch.target, shared, registers, spills, *settings)


def kernel_name(launch: Launch) -> str:
    """Family and function of a kernel, e.g. "selection.block_means"."""
    return f"{launch.kernel.__module__.split('.')[-2]}.{launch.kernel.__name__}"


def problem(
    compiled: Compiled, *, limit: int | None = None, spills_allowed: bool = False, measured: bool = False
) -> str | None:
    """Why a kernel cannot, or should not, run on its target; None when all is well.

    `limit`: bytes of shared memory of targets that `SHARED_LIMITS` does not know. `measured`: the configuration was the
    fastest on a device, so that it may spill a little.
    """
    limit = SHARED_LIMITS.get(compiled.target, limit)
    if limit is not None and compiled.shared > limit:
        return f"needs {compiled.shared} bytes of shared memory, {compiled.target} has {limit}"
    if compiled.spills > MEASURED_SPILLS * measured and not spills_allowed:
        return f"spills {compiled.spills} {'registers' if compiled.target.startswith('gfx') else 'bytes'}"
    return None


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"sm_(\d+)", target):
        return GPUTarget("cuda", int(match[1]), 32)
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    raise ValueError(f"target must be 'sm_XX' or 'gfxXXX', got {target!r}")


def _kind(value: Any, parameter: Any, target: str) -> tuple[str, str]:
    """Type of an argument and what the compiler may assume: "D" divisible by 16, "S" a buffer below 2 GiB (AMD)."""
    special, align = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
    if value is None:
        return "constexpr", ""
    if isinstance(value, Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        small = target.startswith("gfx") and value.untyped_storage().nbytes() <= 2**31 - 1
        return "*" + _POINTERS[value.dtype], ("D" if special and align and aligned else "") + "S" * (special and small)
    if isinstance(value, bool):
        return "u1", ""
    if isinstance(value, float):
        return "fp32", ""
    if value == 1 and special:
        return "constexpr", ""
    kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
    return kind, "D" if special and align and value % 16 == 0 else ""


def _ptxas_log(ptx: str, target: str) -> str:
    """What the assembler that comes with triton says of a program."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    capability = int(target.removeprefix("sm_"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", "--regAllocOptLevel=2"]
        command += [f"--gpu-name={sm_arch_from_capability(capability)}", str(path), "-o", str(path.with_suffix(".o"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _nvidia_resources(log: str) -> tuple[int, int]:
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    if not registers:
        raise RuntimeError(f"the assembler did not say how many registers it used: {log[:200]!r}")
    return max(registers), spills


def _amd_resources(assembly: str) -> tuple[int, int]:
    def total(name: str) -> int:
        return sum(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    # Scalar registers spill into vector registers, not into memory.
    return total("vgpr_count"), total("vgpr_spill_count")
