"""Memory as gate, as layer, as context, or alone: the four ways of Titans to mix tokens (arXiv 2501.00663, section 4).

Each takes `[B, N, D]` with the real tokens of every row in front, and the state of the call before: one call over a
sequence and any number of calls over its parts are the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_attn import ops
from hf_attn.models.titans.attention import TitansAttention, segment_mask, windowed
from hf_attn.models.titans.configuration_titans import TitansConfig
from hf_attn.nn.neural_memory import NeuralMemory, State, rms_norm
from hf_attn.nn.ragged import put, tail, take


class TitansMixer(nn.Module):
    """What the variants share: the memory, the attention, the persistent tokens, and how two streams are combined."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.memory = NeuralMemory(
            width,
            config.memory_num_heads,
            depth=config.memory_depth,
            inner_size=config.memory_inner_size,
            chunk_size=config.memory_chunk_size,
            conv_kernel=config.conv_kernel,
            theta_max=config.theta_max,
            norm_eps=config.rms_norm_eps,
            max_inner_grad_norm=config.max_inner_grad_norm,
        )
        if config.variant != "lmm":
            self.attention = TitansAttention(config)
            self.persistent = nn.Parameter(torch.zeros(config.num_persistent_tokens, width))
        if config.variant in ("mag", "mac"):
            self.attention_norm = nn.Parameter(torch.ones(width))
            self.memory_norm = nn.Parameter(torch.ones(width))

    def forward(
        self, hidden: Tensor, state: State | None = None, lengths: Tensor | None = None, *, frozen: bool = False
    ) -> tuple[Tensor, State]:
        """`[B, N, D]` (already normed) and the state behind it.

        Args:
            state: what the call before returned; None or empty at the beginning of the sequence.
            lengths: int64 `[B]`, real tokens of each row; None for N.
            frozen: read the memory, write nothing.
        """
        raise NotImplementedError

    def _combined(self, attended: Tensor, remembered: Tensor) -> Tensor:
        """RMSNorm(y) * sigmoid(RMSNorm(m)), each with its own weight (eq. 28)."""
        eps = self.config.rms_norm_eps
        gate = rms_norm(remembered, self.memory_norm, eps).sigmoid()
        return rms_norm(attended, self.attention_norm, eps) * gate

    def _persistent(self, batch: int) -> Tensor:
        return self.persistent.expand(batch, -1, -1)

    def _led(self, hidden: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        """The stream with the persistent tokens in front where it begins, its lengths, and how many they are."""
        lead = 0 if state else self.config.num_persistent_tokens
        if not lead:
            return hidden, lengths, 0
        stream = torch.cat([self._persistent(hidden.shape[0]).to(hidden.dtype), hidden], 1)
        return stream, None if lengths is None else lengths + lead, lead

    def _window(
        self, state: State, key: Tensor, value: Tensor, lengths: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor] | None, State]:
        """Keys and values before this call, and what of them and the new ones the next call sees."""
        keep = self.config.window - 1
        past = (state["window_key"], state["window_value"]) if "window_key" in state else None
        held = (None, None) if past is None else past
        kept = (tail(old, new, lengths, keep) for old, new in zip(held, (key, value), strict=True))
        return past, dict(zip(("window_key", "window_value"), kept, strict=True))


def _positions(count: int | Tensor, length: int, device: torch.device) -> Tensor:
    """`[B | 1, length]`, from `count` on."""
    steps = torch.arange(length, device=device)
    return (count[:, None] + steps) if isinstance(count, Tensor) else (count + steps)[None]


def _passed(count: int | Tensor, lengths: Tensor | None, length: int) -> int | Tensor:
    return count + (length if lengths is None else lengths)


class TitansMemoryMixer(TitansMixer):
    """ "lmm": the memory alone."""

    def forward(
        self, hidden: Tensor, state: State | None = None, lengths: Tensor | None = None, *, frozen: bool = False
    ) -> tuple[Tensor, State]:
        """Output `[B, N, d]` of hidden `[B, N, d]`, and the state behind it; lengths `[B]` counts real tokens, `frozen`
        only reads.
        """
        return self.memory(hidden, state, lengths, frozen=frozen)


class TitansGateMixer(TitansMixer):
    """ "mag": attention to the persistent tokens and a window, gated by the memory of the same stream (eq. 26-28)."""

    def forward(
        self, hidden: Tensor, state: State | None = None, lengths: Tensor | None = None, *, frozen: bool = False
    ) -> tuple[Tensor, State]:
        """Output `[B, N, d]` of hidden `[B, N, d]`, and the state behind it; lengths `[B]` counts real tokens, `frozen`
        only reads.
        """
        state = state or {}
        stream, real, lead = self._led(hidden, state, lengths)
        remembered, new = self.memory(stream, state, real, frozen=frozen)
        count, total = state.get("count", 0), self.config.num_persistent_tokens
        positions = _positions(count + total, hidden.shape[1], hidden.device)
        query = self.attention.queries(hidden, positions)
        key, value = self.attention.keys_values(hidden, positions)
        prefix = None
        if total:
            prefix = (state["prefix_key"], state["prefix_value"]) if "prefix_key" in state else self._prefix(stream)
            new |= {"prefix_key": prefix[0], "prefix_value": prefix[1]}
        past, kept = self._window(state, key, value, lengths)
        attended = windowed(self.attention, query, key, value, prefix, past, count)
        new |= {**kept, "count": _passed(count, lengths, hidden.shape[1])}
        return self._combined(attended, remembered[:, lead:]), new

    def _prefix(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._persistent(stream.shape[0]).to(stream.dtype)
        return self.attention.keys_values(tokens, _positions(0, tokens.shape[1], stream.device))


class TitansLayerMixer(TitansMixer):
    """ "mal": a window of attention over what the memory makes of the stream (eq. 29-31)."""

    def forward(
        self, hidden: Tensor, state: State | None = None, lengths: Tensor | None = None, *, frozen: bool = False
    ) -> tuple[Tensor, State]:
        """Output `[B, N, d]` of hidden `[B, N, d]`, and the state behind it; lengths `[B]` counts real tokens, `frozen`
        only reads.
        """
        state = state or {}
        stream, lengths, lead = self._led(hidden, state, lengths)
        remembered, new = self.memory(stream, state, lengths, frozen=frozen)
        count = state.get("count", 0)
        positions = _positions(count, stream.shape[1], hidden.device)
        query = self.attention.queries(remembered, positions)
        key, value = self.attention.keys_values(remembered, positions)
        past, kept = self._window(state, key, value, lengths)
        attended = windowed(self.attention, query, key, value, None, past, count)
        new |= {**kept, "count": _passed(count, lengths, stream.shape[1])}
        return attended[:, lead:], new


class TitansContextMixer(TitansMixer):
    """ "mac": segments that attend to what the memory recalls for their tokens, and then write to it (eq. 21-25).

    Token-causal, unlike eq. 22 and 25 taken literally: token t of a segment sees what was recalled for the tokens up to
    t only, and reads a memory that holds the tokens up to t only.
    """

    def forward(
        self, hidden: Tensor, state: State | None = None, lengths: Tensor | None = None, *, frozen: bool = False
    ) -> tuple[Tensor, State]:
        """Output `[B, N, d]` of hidden `[B, N, d]`, and the state behind it; lengths `[B]` counts real tokens, `frozen`
        only reads.
        """
        state = dict(state or {})
        query, state["x_tail"] = self.memory.query(hidden, state.get("x_tail"), lengths)
        if lengths is None and not isinstance(state.get("inside", 0), Tensor):
            return self._even(hidden, query, state, frozen)
        return self._ragged(hidden, query, state, lengths, frozen)

    def _even(self, hidden: Tensor, query: Tensor, state: State, frozen: bool) -> tuple[Tensor, State]:
        """All rows are at the same place of their segments."""
        outs, start, length = [hidden[:, :0]], 0, hidden.shape[1]
        while start < length:
            stop = min(start + self.config.segment_size - state.get("inside", 0), length)
            out, state = self._piece(hidden[:, start:stop], query[:, :, start:stop], state, None, frozen)
            outs.append(out)
            start = stop
        return torch.cat(outs, 1), state

    def _ragged(
        self, hidden: Tensor, query: Tensor, state: State, lengths: Tensor | None, frozen: bool
    ) -> tuple[Tensor, State]:
        """Each row goes on to the end of its own segment; as many rounds as the row with the most segments needs."""
        batch, length = hidden.shape[:2]
        if lengths is None:
            lengths = torch.full((batch,), length, device=hidden.device)
        inside = state.get("inside", 0)
        if not isinstance(inside, Tensor):
            state["inside"] = torch.full_like(lengths, inside)
        done, out = torch.zeros_like(lengths), torch.zeros_like(hidden)
        flat = query.transpose(1, 2).flatten(2)
        while bool((done < lengths).any()):
            count = torch.minimum(self.config.segment_size - state["inside"], lengths - done)
            steps = torch.arange(int(count.max()), device=hidden.device)
            index = (done[:, None] + steps).clamp(max=length - 1)
            picked = take(flat, index).unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
            part, state = self._piece(take(hidden, index), picked, state, count, frozen)
            shown = steps < count[:, None]
            # Places of tokens that are not real go to a slot behind the row.
            out = out + put(part, index.masked_fill(~shown, length), length + 1)[:, :length]
            done = done + count
        return out, state

    def _piece(
        self, hidden: Tensor, query: Tensor, state: State, lengths: Tensor | None, frozen: bool
    ) -> tuple[Tensor, State]:
        """Tokens `[B, n, D]` of one segment of each row; `query` are their questions to the memory before it."""
        memory, length, inside = self.memory, hidden.shape[1], state.get("inside", 0)
        before, state = self._before(state, hidden.shape[0])
        recalled = memory.out(ops.read_memory(query, before), hidden)
        attended, kept = self._attended(hidden, recalled, state, lengths)
        question, y_tail = memory.query(attended, state.get("y_tail"), lengths)
        read, state = memory.write_and_read(attended, question, state, lengths, frozen=frozen)
        state |= {"y_tail": y_tail, **kept}
        out = self._combined(attended, memory.out(read, attended))
        inside = _passed(inside, lengths, length)
        return out, state | {"inside": inside % self.config.segment_size}

    def _before(self, state: State, batch: int) -> tuple[list[Tensor], State]:
        """The memory before the segment of each row. Where a segment begins, so does a chunk."""
        inside, weights = state.get("inside", 0), self.memory.weights(state)
        if not isinstance(inside, Tensor):
            if inside == 0:
                state = {**state, "written": 0} | {
                    f"before.{i}": w.expand(batch, *w.shape[-3:]) for i, w in enumerate(weights)
                }
                state = {name: t for name, t in state.items() if not name.startswith("segment_")}
            return [state[f"before.{i}"] for i in range(len(weights))], state
        starts, found = inside == 0, []
        for i, weight in enumerate(weights):
            weight = weight.expand(batch, *weight.shape[-3:])
            found.append(torch.where(starts[:, None, None, None], weight, state.get(f"before.{i}", weight)))
        written = torch.as_tensor(state.get("written", 0), device=inside.device).expand_as(inside)
        return found, {**state, "written": written.masked_fill(starts, 0)} | {
            f"before.{i}": w for i, w in enumerate(found)
        }

    def _attended(self, hidden: Tensor, recalled: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        """The segment's tokens after attention to [persistent; recalled; segment], and its keys and values so far."""
        config, attention, inside = self.config, self.attention, state.get("inside", 0)
        lead, length, device = config.num_persistent_tokens, hidden.shape[1], hidden.device
        place = _positions(inside, length, device) + lead
        query = attention.queries(hidden, place + config.segment_size)
        fixed = attention.keys_values(self._persistent(hidden.shape[0]).to(hidden.dtype), _positions(0, lead, device))
        remembered = attention.keys_values(recalled, place)
        own = attention.keys_values(hidden, place + config.segment_size)
        names = ("segment_recalled_key", "segment_recalled_value", "segment_key", "segment_value")
        new = (*remembered, *own)
        old = [state.get(name, t[:, :0]) for name, t in zip(names, new, strict=True)]
        joined = [torch.cat([a.to(b.dtype), b], 1) for a, b in zip(old, new, strict=True)]
        keys = torch.cat([fixed[0], joined[0], joined[2]], 1)
        values = torch.cat([fixed[1], joined[1], joined[3]], 1)
        mask = segment_mask(length, old[0].shape[1], inside, lead, device)
        out = attention.attend(query, keys, values, mask)
        if isinstance(inside, Tensor):
            size = config.segment_size
            joined = [tail(a, b, lengths, size) for a, b in zip(old, new, strict=True)]
        return out, dict(zip(names, joined, strict=True))


MIXERS = {"lmm": TitansMemoryMixer, "mag": TitansGateMixer, "mal": TitansLayerMixer, "mac": TitansContextMixer}


def titans_mixer(config: TitansConfig) -> TitansMixer:
    """The mixer of `config.variant`."""
    config.check_architecture()
    return MIXERS[config.variant](config)
