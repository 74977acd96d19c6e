"""Captured attention mass: how much of dense attention a mechanism's selection keeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_attn.call import AttentionCall
from hf_attn.checks import require_int
from hf_attn.mechanism import Mechanism, MechanismConfig, observe


class MassProbe:
    """Collects, layer by layer, the dense softmax weight that falls on the keys a mechanism reads.

    Args:
        rows: query rows sampled from each call (all when it has fewer).
        first_row: rows before this one are not sampled (early rows see few keys and keep all of them).
        layers: layer numbers to look at, all when None.
        seed: of the sampling.

    `seconds` is the time the probe itself took, to be taken off a measured prefill.
    """

    def __init__(self, rows: int = 256, first_row: int = 0, layers: set[int] | None = None, seed: int = 0) -> None:
        require_int("rows", rows, 1)
        require_int("first_row", first_row, 0)
        self.rows, self.first_row, self.layers = rows, first_row, layers
        self.seconds = 0.0
        self._generator = torch.Generator().manual_seed(seed)
        self._mass: dict[int | None, list[Tensor]] = {}

    @property
    def by_layer(self) -> dict[int | None, float]:
        """Mean captured mass of every layer seen, in [0, 1]."""
        return {layer: float(torch.cat(seen).mean()) for layer, seen in self._mass.items()}

    @property
    def mean(self) -> float:
        """Mean over layers; raises RuntimeError when no call was seen."""
        if not self._mass:
            raise RuntimeError(
                "the probe saw no attention call: is the mechanism applied to the model (hf_attn.doctor tells), and "
                "was the model run inside the 'with' block?"
            )
        values = list(self.by_layer.values())
        return sum(values) / len(values)

    @torch.no_grad()
    def __call__(self, mechanism: Mechanism, call: AttentionCall, config: MechanismConfig) -> None:
        if mechanism.attended is None or (self.layers is not None and call.layer.index not in self.layers):
            return
        if not call.tokens.is_plain:
            raise ValueError(
                "captured mass is measured on rows without padding or packing; pass one sequence at a time"
            )
        if call.q_len <= self.first_row + 1 or call.key.shape[2] != call.tokens.k_len:
            return  # too short, or a chunk behind a mechanism's own cache, which hands over its new keys alone
        start = time.perf_counter()
        rows = self._sample(call.q_len).to(call.query.device)
        read = mechanism.attended(call, config, rows)
        mass = captured_mass(call, rows, read)
        self._mass.setdefault(call.layer.index, []).append(mass.mean().cpu().view(1))
        self.seconds += time.perf_counter() - start

    def _sample(self, q_len: int) -> Tensor:
        eligible = q_len - self.first_row
        picked = torch.randperm(eligible, generator=self._generator)[: self.rows]
        return picked.sort().values + self.first_row


def captured_mass(call: AttentionCall, rows: Tensor, read: Tensor) -> Tensor:
    """Dense softmax weight on the keys in `read`, `[B, Hq, R]`.

    Args:
        call: one layer's work, rows without padding.
        rows: int64 `[R]`, query rows.
        read: bool `[B | 1, Hq | 1, R, Nk]`, keys the mechanism reads.
    """
    batch, heads, _, dim = call.query.shape
    group = heads // call.key.shape[1]
    picked = call.query[:, :, rows].float().view(batch, -1, group * rows.numel(), dim)
    scores = (picked @ call.key.float().mT * call.scale).view(batch, heads, rows.numel(), call.k_len)
    if call.causal:
        position = (rows + call.k_len - call.q_len)[:, None]
        scores = scores.masked_fill(torch.arange(call.k_len, device=rows.device) > position, float("-inf"))
    return torch.where(read, scores.softmax(-1), 0).sum(-1)


@contextmanager
def captured_mass_probe(
    rows: int = 256, first_row: int = 0, layers: set[int] | None = None, seed: int = 0
) -> Iterator[MassProbe]:
    """Measure captured mass during the forward passes inside the `with` block; arguments as `MassProbe`.

    A prefill is measured while it runs; single decoded tokens are not. The dense weights of the sampled rows are the
    only extra memory, `[B, Hq, rows, Nk]` in fp32 one layer at a time.
    """
    probe = MassProbe(rows, first_row, layers, seed)
    with observe(probe):
        yield probe
