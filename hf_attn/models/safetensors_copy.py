"""Rewriting safetensors files tensor by tensor: what is read at any time is one tensor, and mostly not even that."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

_CHUNK = 1 << 24
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FLOATS = {"F64", "F32", "F16", "BF16"}


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Entries `{name: {dtype, shape, data_offsets}}` of a file and the position of its data; ValueError if cut off."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length:
            raise ValueError(f"{file} is cut off in its header; download or save it again")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < end:
        raise ValueError(f"{file} is cut off: {size:,} bytes instead of {end:,}; download or save it again")
    return header, 8 + length


def copy_tensors(
    source: Path, target: Path, names: Iterable[str], change: Callable[[str, Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write the tensors `names` of `source` to `target`, which appears only when it is complete.

    Args:
        change: replaces single tensors; returns the very tensor for those that stay.
        dtype: of the floating-point tensors of `target`; None keeps each one's.
    """
    header, start = read_header(source)
    wanted = {_NAMES[dtype]} if dtype is not None else FLOATS
    with open(source, "rb") as raw, safe_open(source, framework="pt") as tensors:
        plan: dict[str, dict[str, Any]] = {}
        for name in names:
            entry = header[name]
            if entry["dtype"] not in FLOATS or (change is None and entry["dtype"] in wanted):
                plan[name] = entry
                continue
            tensor = tensors.get_tensor(name)
            new = _changed(name, tensor, change, dtype)
            plan[name] = entry if new is tensor else {"dtype": _NAMES[new.dtype], "shape": list(new.shape)}
            del tensor, new

        def write(name: str, out: BinaryIO) -> None:
            if plan[name] is header[name]:
                begin, end = header[name]["data_offsets"]
                raw.seek(start + begin)
                _copy_bytes(raw, out, end - begin)
            else:
                _write(_changed(name, tensors.get_tensor(name), change, dtype), out)

        _write_file(target, plan, write)


def write_tensors(target: Path, tensors: dict[str, Tensor]) -> None:
    """Write a new file, which appears only when it is complete."""
    plan = {name: {"dtype": _NAMES[t.dtype], "shape": list(t.shape)} for name, t in tensors.items()}
    _write_file(target, plan, lambda name, out: _write(tensors[name], out))


def _changed(name: str, tensor: Tensor, change: Any, dtype: torch.dtype | None) -> Tensor:
    new = tensor if change is None else change(name, tensor)
    return new if dtype is None or not new.is_floating_point() else new.to(dtype)


def _write_file(target: Path, plan: dict[str, dict[str, Any]], write: Callable[[str, BinaryIO], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, entry in plan.items():
        size = torch.Size(entry["shape"]).numel() * _bytes(entry["dtype"])
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = target.with_name(target.name + ".partial")
    with open(partial, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in plan:
            write(name, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, target)


def _bytes(name: str) -> int:
    sizes = {short: torch.empty((), dtype=dtype).element_size() for dtype, short in _NAMES.items()}
    if name not in sizes:
        raise ValueError(f"tensors of type {name} are not supported: {', '.join(sizes)}")
    return sizes[name]


def _copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        piece = source.read(min(count, _CHUNK))
        target.write(piece)
        count -= len(piece)


def _write(tensor: Tensor, out: BinaryIO) -> None:
    out.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
