"""Which KV heads retrieve and which stream: classes from gate values, and DuoAttention's folders of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


def classify_heads(alpha: Tensor, sparsity: float) -> Tensor:
    """Retrieval heads from gate values: the smallest gates stream (DuoAttention, arXiv 2410.10819).

    Args:
        alpha: `[layers, KV heads]`, clipped to [0, 1]; large = retrieval.
        sparsity: share of streaming heads over the whole model, in [0, 1].

    Returns bool `[layers, KV heads]`, True = retrieval. ceil((N - 1) sparsity) of the N heads stream (none for 0, all
    for 1); among equal gates those of earlier layers, then of lower heads, stream first. Raises ValueError for other
    shapes, a sparsity outside [0, 1], or gates that are not finite.
    """
    if alpha.dim() != 2 or alpha.numel() == 0:
        raise ValueError(f"alpha must be [layers, KV heads], got {tuple(alpha.shape)}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity}")
    if not bool(alpha.isfinite().all()):
        raise ValueError("alpha holds values that are not finite")
    total = alpha.numel()
    # A sparsity that went through float32 must not add a head.
    count = 0 if sparsity == 0 else total if sparsity == 1 else math.ceil((total - 1) * float(sparsity) - 1e-6)
    order = alpha.detach().double().clamp(0, 1).flatten().sort(dim=-1, stable=True).indices
    retrieval = torch.ones(total, dtype=torch.bool)
    retrieval[order[:count].cpu()] = False
    return retrieval.view(alpha.shape)


@dataclass(frozen=True)
class DuoHeads:
    """Gates of a DuoAttention folder: `alpha` fp32 `[layers, KV heads]`, and the sink and window of their training."""

    alpha: Tensor
    sink_size: int
    recent_size: int


def load_duo_heads(folder: str | Path) -> DuoHeads:
    """Read the gates that DuoAttention's training wrote: `full_attention_heads.tsv` and `config.json` of a folder.

    Raises OSError for a missing file, ValueError for a table that is not one row of numbers a layer.
    """
    folder = Path(folder)
    rows = [line.split("\t") for line in (folder / "full_attention_heads.tsv").read_text().splitlines() if line.strip()]
    try:
        table = [[float(cell) for cell in row] for row in rows]
    except ValueError as error:
        raise ValueError(f"full_attention_heads.tsv in {folder} must hold tab-separated numbers ({error})") from None
    widths = {len(row) for row in table}
    if len(widths) != 1:
        raise ValueError(
            f"full_attention_heads.tsv in {folder} must have one row a layer with equally many heads, got rows of "
            f"{sorted(widths) or 'no'} columns"
        )
    sizes = json.loads((folder / "config.json").read_text())
    for name in ("sink_size", "recent_size"):
        if not isinstance(sizes.get(name), int):
            raise ValueError(f"config.json in {folder} must hold the integer {name}, got {sizes.get(name)!r}")
    return DuoHeads(torch.tensor(table).clamp(0, 1), sizes["sink_size"], sizes["recent_size"])
