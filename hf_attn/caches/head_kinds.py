"""Retrieval and streaming heads of one layer: taking them out of a tensor and joining results, in few calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """Some heads of `[B, H, ...]`: all (both None), neighbours (`span` = first, count), or any (`index`)."""

    span: tuple[int, int] | None = None
    index: Tensor | None = None

    @classmethod
    def listed(cls, heads: list[int] | None, device: torch.device) -> Heads:
        """Heads by number, ascending; None for all."""
        if heads is None:
            return cls()
        if heads and heads[-1] - heads[0] + 1 == len(heads):
            return cls(span=(heads[0], len(heads)))
        return cls(index=torch.tensor(heads, dtype=torch.int64, device=device))

    def of(self, x: Tensor) -> Tensor:
        """These heads of `[B, H, ...]`: a view where they are neighbours."""
        if self.span is not None:
            return x.narrow(1, *self.span)
        return x if self.index is None else x.index_select(1, self.index)


class HeadPlan:
    """Which heads of a layer retrieve and which stream.

    Args:
        kinds: one flag a KV head, True = retrieval; None makes every head one.
        kv_heads, group: KV heads of the layer, and query heads of each.

    `retrieval` and `streaming` are KV heads, `retrieving` and `windowed` the query heads that read them; `reads` and
    `streams` say whether there are any.
    """

    def __init__(self, kinds: tuple[bool, ...] | None, kv_heads: int, group: int, device: torch.device) -> None:
        kinds = (True,) * kv_heads if kinds is None else kinds
        self.of = (kv_heads, group, device)
        lists = [[head for head, kind in enumerate(kinds) if kind is wanted] for wanted in (True, False)]
        wide = [[head * group + i for head in heads for i in range(group)] for heads in lists]
        self.reads, self.streams = (len(heads) > 0 for heads in lists)
        whole = not (self.reads and self.streams)
        self.retrieval, self.streaming, self.retrieving, self.windowed = (
            Heads.listed(None if whole else heads, device) for heads in (*lists, *wide)
        )
        order = torch.tensor(wide[0] + wide[1], device=device).argsort()
        self._first = 1 if not whole and lists[1][0] == 0 else 0
        parts = wide[self._first] + wide[1 - self._first]
        self._order = None if parts == sorted(parts) else order

    def joined(self, retrieving: Tensor | None, windowed: Tensor | None) -> Tensor:
        """The query heads `[B, Hq, ...]` of both kinds in their order; None where there are none of a kind."""
        if retrieving is None or windowed is None:
            part = windowed if retrieving is None else retrieving
            assert part is not None  # every layer has heads
            return part
        if self._order is not None:
            return torch.cat([retrieving, windowed], 1).index_select(1, self._order)
        return torch.cat([windowed, retrieving] if self._first else [retrieving, windowed], 1)
