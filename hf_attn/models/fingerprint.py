"""Which weights a model has, in a few hex digits: enough to tell one base from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# Values that are read of every weight: runs of neighbours, evenly spread, so that a mapped file is read in few places.
_RUNS, _RUN = 8, 256


def fingerprint(shapes: Mapping[str, Iterable[int]], weight: Callable[[str], Tensor]) -> dict[str, Any]:
    """`{"layout": hash of names and shapes, "values": hash of sampled values or None, "parameters": count, "dtype"}`.

    Values are rounded to bfloat16 first, so a float32 base and the same in bfloat16 agree. They are None when some
    weight is quantised or offloaded (its values cannot be read here).

    Args:
        shapes: of every weight, by name.
        weight: returns one by name.
    """
    layout, values = hashlib.sha256(), hashlib.sha256()
    count, dtypes, readable = 0, set(), True
    for name in sorted(shapes):
        shape = list(shapes[name])
        layout.update(f"{name}{shape}".encode())
        tensor = weight(name)
        count += torch.Size(shape).numel()
        readable = readable and not tensor.is_meta and tensor.is_floating_point() and list(tensor.shape) == shape
        if readable:
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
            values.update(_sample(tensor.detach()).view(torch.int16).numpy().tobytes())
    return {
        "layout": layout.hexdigest()[:12],
        "values": values.hexdigest()[:12] if readable else None,
        "parameters": count,
        "dtype": "+".join(sorted(dtypes)) or None,
    }


def same_values(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool | None:
    """Whether two fingerprints are of the same weights; None when that cannot be told.

    It cannot for quantised weights, nor between float16 and another format, which round differently.
    """
    if a["values"] is None or b["values"] is None:
        return None
    if a["values"] == b["values"]:
        return True
    return None if "float16" in (a["dtype"], b["dtype"]) and a["dtype"] != b["dtype"] else False


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().reshape(-1)
    size = flat.numel()
    if size > _RUNS * _RUN:
        starts = [i * (size - _RUN) // (_RUNS - 1) for i in range(_RUNS)]
        flat = torch.cat([flat[start : start + _RUN] for start in starts])
    return flat.to("cpu", torch.bfloat16).contiguous()
