"""Tile plans of patterns, kept while the pattern lives: layers and calls that share one plan it once."""

from __future__ import annotations

import weakref
from collections import OrderedDict

from torch import Tensor

from .tiling import Geometry, TilePlan, plan_tiles, row_runs

# Patterns whose plans are kept; a plan is a few integers a tile.
KEPT = 4

Plans = list[tuple[slice, TilePlan]]
_kept: OrderedDict[tuple, tuple[weakref.ref, Plans]] = OrderedDict()


def plans_of(indices: Tensor, geometry: Geometry, fold: bool) -> Plans:
    """(query rows, plan) of every run of equal query blocks, for int indices [B | 1, Hq | Hkv | 1, blocks, M].

    The same tensor, unchanged, in the same geometry gives the plans of the last time. Raises ValueError for key blocks
    that do not exist.
    """
    if not indices.numel():
        return []
    name = None if indices.is_inference() else (id(indices), indices._version, geometry, fold)
    found = _kept.get(name)
    if found is not None and found[0]() is indices:
        _kept.move_to_end(name)
        return found[1]
    if int(indices.max()) >= geometry.key_blocks:
        raise ValueError(f"indices name key block {int(indices.max())}, but there are only {geometry.key_blocks}.")
    plans = []
    for rows, columns, block_rows in row_runs(geometry.q_len, geometry.block_q):
        plans.append((rows, plan_tiles(indices[:, :, columns], geometry, rows.start, block_rows, fold=fold)))
    if name is not None:
        _kept[name] = weakref.ref(indices), plans
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return plans
