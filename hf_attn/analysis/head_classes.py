"""Which heads look far back: attention mass outside sinks and a recent window, measured on real text, no training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_attn.analysis.mass import captured_mass
from hf_attn.analysis.texts import python_reference_text, token_windows
from hf_attn.call import AttentionCall
from hf_attn.checks import require_int
from hf_attn.mechanism import Capabilities, Mechanism, MechanismConfig, observe
from hf_attn.ops import dense_attention

# Elements of one chunk of dense weights, batch and heads included.
MAX_WEIGHTS = 1 << 23


class OutsideMass:
    """Observer that sums, head by head, the dense softmax weight on keys outside the sinks and the recent window.

    Args:
        sink: first tokens of a row.
        local: most recent tokens of a query, its own included.
        kv_scales: also keep the largest |key| and |value| of every layer.
        tick: called after every attention call.

    Only queries that have keys outside are counted. Memory: one chunk of weights, `MAX_WEIGHTS` elements.
    """

    def __init__(
        self, sink: int, local: int, *, kv_scales: bool = False, tick: Callable[[], None] | None = None
    ) -> None:
        require_int("sink", sink, 0)
        require_int("local", local, 1)
        self.sink, self.local, self.kv_scales, self._tick = sink, local, kv_scales, tick
        self._sums: dict[int, Tensor] = {}
        self._queries: dict[int, int] = {}
        self._largest: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, mechanism: Mechanism, call: AttentionCall, config: MechanismConfig) -> None:
        if not call.tokens.is_plain or not call.causal:
            raise ValueError("attention mass outside the window is measured on causal rows without padding or packing")
        layer, (batch, heads) = call.layer.known_index(), call.query.shape[:2]
        kv_heads, first = call.key.shape[1], self.sink + self.local
        step = max(MAX_WEIGHTS // (batch * heads * call.k_len), 1)
        total = torch.zeros(kv_heads, dtype=torch.float64)
        for start in range(first, call.q_len, step):
            stop = min(start + step, call.q_len)
            part = replace(call, query=call.query[:, :, start:stop], key=call.key[:, :, :stop])
            rows = torch.arange(stop - start, device=call.query.device)
            mass = captured_mass(part, rows, self._outside(start, stop, call.query.device))
            total += mass.view(batch, kv_heads, -1).sum((0, 2), dtype=torch.float64).cpu()
        self._sums[layer] = self._sums.get(layer, 0) + total
        queries = batch * (heads // kv_heads) * max(call.q_len - first, 0)
        self._queries[layer] = self._queries.get(layer, 0) + queries
        if self.kv_scales:
            largest = torch.stack([call.key.abs().amax(), call.value.abs().amax()]).float().cpu()
            self._largest[layer] = torch.maximum(self._largest.get(layer, largest), largest)
        if self._tick is not None:
            self._tick()

    def _outside(self, start: int, stop: int, device: torch.device) -> Tensor:
        own = torch.arange(start, stop, device=device)[:, None]
        key = torch.arange(stop, device=device)
        return ((key >= self.sink) & (key <= own - self.local))[None, None]

    def mean(self, layers: int) -> Tensor:
        """Mean mass, fp32 `[layers, Hkv]` in [0, 1]; NaN for layers that were never seen.

        Raises ValueError when layers differ in their number of KV heads.
        """
        widths = {tuple(total.shape) for total in self._sums.values()}
        if len(widths) > 1:
            raise ValueError(f"layers differ in their number of KV heads ({sorted(w[0] for w in widths)})")
        table = torch.full((layers, *widths.pop()), torch.nan)
        for layer, total in self._sums.items():
            table[layer] = (total / self._queries[layer]).float()
        return table

    def scales(self, layers: int) -> Tensor:
        """Symmetric int8 scales of keys and values, largest magnitude / 127, fp32 `[layers, 2]`; 1 where unseen."""
        table = torch.ones(layers, 2)
        for layer, largest in self._largest.items():
            table[layer] = torch.where(largest > 0, largest / 127, 1.0)
        return table


@dataclass(frozen=True)
class HeadCalibration:
    """What `calibrate` found out about a model's heads.

    gates: fp32 `[layers, Hkv]`, larger = retrieval; NaN for layers that no mechanism reaches (a sliding window of their
    own). kv_scales: fp32 `[layers, 2]` of keys and values, or None. method: "mass" (measured), "gates" (trained) or
    "duo" (trained elsewhere). sink, local, tokens: what was measured with; tokens is 0 where that is not known.
    """

    gates: Tensor
    kv_scales: Tensor | None
    method: str
    sink: int
    local: int
    tokens: int


def order_equal_gates(gates: Tensor, mass: Tensor) -> Tensor:
    """Gates whose equal values are told apart by attention mass, so that the heads with the least of it stream first.

    Trained gates of half of a model's heads can be exactly 0; which of these stream at a smaller share is then a matter
    of their order alone.

    Args:
        gates, mass: `[layers, Hkv]`; `mass` >= 0, such as the gates of `calibrate_heads`, with finite values.

    Returns `[layers, Hkv]` in [0, 1], within 1e-3 of `gates`. Raises ValueError for other shapes and values.
    """
    if gates.shape != mass.shape or gates.dim() != 2:
        raise ValueError(f"gates and mass must be [layers, KV heads], got {tuple(gates.shape)} and {tuple(mass.shape)}")
    if not bool(mass.isfinite().all()) or bool((mass < 0).any()):
        raise ValueError("mass must be finite and not negative")
    # Below the thousandth that is added, gates keep 999 parts of their own.
    return 0.999 * gates.clamp(0, 1) + 0.001 * mass / mass.max().clamp(min=torch.finfo(mass.dtype).tiny)


def calibrate_heads(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str] | None = None,
    *,
    sink: int = 64,
    local: int = 256,
    tokens: int = 8192,
    length: int = 2048,
    batch_size: int = 1,
    kv_scales: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> HeadCalibration:
    """Measure how much attention each KV head pays outside `sink` and `local`, on real text and without training.

    Args:
        model: a causal decoder of transformers; it runs dense and is left as it was.
        tokenizer: the model's.
        texts: real text; the language reference that Python ships when None.
        sink, local: tokens a streaming head would see; more than `sink + local` tokens are needed in a row.
        tokens: read at most, in rows of `length`; a row never spans two texts.
        batch_size: rows run at a time.
        kv_scales: also measure the scales of a per-tensor int8 cache.
        progress: called as `progress(done, total)` after each layer of each batch.

    Deterministic. Raises ValueError for sizes that do not fit, for texts too short, and for models whose attention no
    mechanism can reach.
    """
    from hf_attn.integrations.transformers.replaced import replaced_attention, run_rows

    config = model.config.get_text_config()
    length = _row_length(length, tokens, sink, local, config)
    require_int("batch_size", batch_size, 1)
    texts = [python_reference_text()] if texts is None else texts
    rows = token_windows(tokenizer, texts, length=length, count=max(tokens // length, 1))
    layers, done = config.num_hidden_layers, 0
    total = layers * -(-len(rows) // batch_size)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    probe = OutsideMass(sink, local, kv_scales=kv_scales, tick=tick)
    with replaced_attention(model, _DENSE), observe(probe):
        run_rows(model, rows, batch_size)
    if not done:
        raise ValueError(
            f"no attention layer of {type(model).__name__} can be classified: every one has a sliding window of its own"
        )
    return HeadCalibration(
        gates=probe.mean(layers),
        kv_scales=probe.scales(layers) if kv_scales else None,
        method="mass",
        sink=sink,
        local=local,
        tokens=rows.numel(),
    )


def _row_length(length: int, tokens: int, sink: int, local: int, config: Any) -> int:
    require_int("tokens", tokens, 1)
    require_int("length", length, 1)
    fits = min(length, tokens, getattr(config, "max_position_embeddings", None) or length)
    if fits <= sink + local:
        raise ValueError(
            f"rows of {fits} tokens have no key outside sink={sink} and local={local}; use a larger length and tokens, "
            "or smaller sink and local"
        )
    return fits


_DENSE = Mechanism(
    name="calibration",
    summary="dense attention that is looked at",
    source="none",
    config=MechanismConfig,
    capabilities=Capabilities(bidirectional=False),
    attend=lambda call, config: dense_attention(call),
)
