"""Gates that tell retrieval heads from streaming heads, trained by distillation (DuoAttention, arXiv 2410.10819)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_attn.call import AttentionCall
from hf_attn.checks import require_int
from hf_attn.mechanism import Capabilities, Mechanism, MechanismConfig
from hf_attn.mechanisms import lserve
from hf_attn.ops import dense_attention, gated_streaming_attention

MODES = ("teacher", "student", "deployed")


class TwoWayAttention:
    """Attention of both passes of gate distillation; register `mechanism(name)` and apply it to a causal decoder.

    In a teacher pass every layer runs dense and its attention output is kept. In the student pass that follows on the
    same batch a layer gives `alpha * full + (1 - alpha) * streaming`: `full` is what the teacher kept, `streaming`
    comes from the student's own hidden states. In deployed passes the layer is that of LServe: heads with a gate >= 0.5
    are dense, the others stream.

    Args:
        gates: `[layers, Hkv]`, one a KV head, in [0, 1].
        sink: first tokens a streaming head sees.
        local: most recent tokens it sees, its own included.

    Memory: the teacher's attention output of every layer, `[B, Hq, N, Dv]` each, from one teacher pass to the next.
    """

    def __init__(self, gates: Tensor, sink: int, local: int) -> None:
        require_int("sink", sink, 0)
        require_int("local", local, 1)
        self.gates, self.sink, self.local = gates, sink, local
        self._mode = "teacher"
        self._full: dict[int, Tensor] = {}

    def mechanism(self, name: str) -> Mechanism:
        """For `hf_attn.register_mechanism`; its options are none."""
        return Mechanism(
            name=name,
            summary="teacher and student of gate distillation",
            source="DuoAttention, arXiv 2410.10819",
            config=MechanismConfig,
            capabilities=Capabilities(decode=False, padding=False, packing=False, bidirectional=False),
            attend=self._attend,
        )

    @contextmanager
    def mode(self, mode: str, gates: Tensor | None = None) -> Iterator[None]:
        """Run passes as "teacher", "student" or "deployed" for a while, with other gates when given."""
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        before = self._mode, self.gates
        self._mode, self.gates = mode, before[1] if gates is None else gates
        try:
            yield
        finally:
            self._mode, self.gates = before

    def _attend(self, call: AttentionCall, config: MechanismConfig) -> Tensor:
        if not call.tokens.is_plain or call.q_len != call.k_len:
            raise ValueError(
                "gate training takes whole rows of equal length without padding, packing or cache; cut the batch to "
                "one length and pass use_cache=False"
            )
        layer = call.layer.known_index()
        if self._mode == "teacher":
            self._full[layer] = dense_attention(call).detach()
            return self._full[layer]
        if self._mode == "deployed":
            heads = (self.gates[layer : layer + 1] >= 0.5).int().tolist()
            return lserve.attend(call, lserve.LServeConfig(heads=heads, ctx_sink=self.sink, ctx_local=self.local))
        alpha = self.gates[layer].to(call.query.device)
        return gated_streaming_attention(
            call.query, call.key, call.value, alpha,
            full=self._full[layer], sinks=self.sink, window=self.local, scale=call.scale,
        )  # fmt: skip


def distillation_loss(teacher: Tensor, student: Tensor, labelled: Tensor) -> Tensor:
    """Mean over labelled tokens of the squared difference of final hidden states, mean over channels.

    Args:
        teacher, student: `[B, N, C]`, after the final norm.
        labelled: bool `[B, N]`, at least one True.
    """
    difference = teacher[labelled].float() - student[labelled].float()
    return difference.square().mean()


def gate_schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: up over the first fifth of `steps`, down over the last, never below 0.1."""
    ramp = steps / 5
    return min(1.0, max((step + 1) / ramp, 0.1), max((steps - step) / ramp, 0.1))


class GateTrainer:
    """AdamW on the gates of a frozen model: `step(batch)` does both passes, and the state is a few small tensors.

    Args:
        body: the model without its head, `hf_attn.apply`-ed with `attention`'s mechanism; `body(input_ids=...)` gives
            final hidden states after the norm.
        attention: the two-way attention; its gates become the trained parameter, starting from their values.
        steps: of the whole schedule, >= 1.
        learning_rate: the peak.
        regularisation: weight of mean |alpha|, which pushes heads towards streaming.
    """

    def __init__(
        self,
        body: nn.Module,
        attention: TwoWayAttention,
        *,
        steps: int,
        learning_rate: float = 0.02,
        regularisation: float = 0.05,
    ) -> None:
        require_int("steps", steps, 1)
        body.requires_grad_(False)
        self.body, self.attention, self.steps = body, attention, steps
        self.learning_rate, self.regularisation = learning_rate, regularisation
        self.gates = attention.gates = nn.Parameter(attention.gates.detach().clone().float())
        self.optimizer = torch.optim.AdamW([self.gates], lr=learning_rate, weight_decay=0.0)
        self.done = 0

    def step(
        self, input_ids: Tensor, labelled: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, float]:
        """One update on `input_ids` int64 `[B, N]` with the loss on `labelled` bool `[B, N]`; returns its figures.

        `reduce(tensor) -> tensor` averages the gradient and the loss over processes.
        """
        with torch.no_grad():
            self.gates.clamp_(0, 1)
        teacher = self._hidden("teacher", input_ids)
        self.optimizer.zero_grad(set_to_none=True)
        # The backward pass too is the student's: activation checkpointing calls the layers again there.
        with self.attention.mode("student"):
            student = self.body(input_ids=input_ids, use_cache=False).last_hidden_state
            distillation = distillation_loss(teacher, student, labelled)
            penalty = self.gates.abs().mean()
            (distillation + self.regularisation * penalty).backward()
        if self.gates.grad is None:
            self.gates.grad = torch.zeros_like(self.gates)
        figures = torch.stack([distillation.detach(), penalty.detach().to(distillation.device)])
        if reduce is not None:
            self.gates.grad, figures = reduce(self.gates.grad), reduce(figures)
        factor = gate_schedule(self.done, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        self.optimizer.step()
        self.done += 1
        return {"distillation": float(figures[0]), "mean_gate": float(figures[1]), "lr": self.learning_rate * factor}

    @torch.no_grad()
    def evaluate(self, batches: list[tuple[Tensor, Tensor]], candidates: dict[str, Tensor]) -> dict[str, float]:
        """Mean distillation loss when heads are used by class, for each of `candidates` (bool `[layers, Hkv]`)."""
        losses = dict.fromkeys(candidates, 0.0)
        for input_ids, labelled in batches:
            teacher = self._hidden("teacher", input_ids)
            for name, retrieval in candidates.items():
                student = self._hidden("deployed", input_ids, retrieval.float())
                losses[name] += float(distillation_loss(teacher, student, labelled)) / len(batches)
        return losses

    @property
    def final_gates(self) -> Tensor:
        """The gates now, `[layers, Hkv]` fp32 on the CPU, clamped to [0, 1]."""
        return self.gates.detach().clamp(0, 1).cpu()

    def state(self) -> dict[str, Tensor]:
        """Everything a later process needs to go on: gates, both moments, and the number of steps done."""
        moments = self.optimizer.state.get(self.gates, {})
        zero = torch.zeros_like(self.gates)
        state = {
            "gates": self.gates.detach(),
            "exp_avg": moments.get("exp_avg", zero),
            "exp_avg_sq": moments.get("exp_avg_sq", zero),
            "step": torch.tensor(self.done),
        }
        return {name: tensor.cpu().contiguous() for name, tensor in state.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken; raises ValueError when the gates have another shape."""
        if state["gates"].shape != self.gates.shape:
            raise ValueError(
                f"the checkpoint has gates {tuple(state['gates'].shape)}, this model has {tuple(self.gates.shape)} "
                "([layers, KV heads]); it belongs to another model"
            )
        self.done = int(state["step"])
        with torch.no_grad():
            self.gates.copy_(state["gates"])
        moments = {name: state[name].to(self.gates.device) for name in ("exp_avg", "exp_avg_sq")}
        self.optimizer.state[self.gates] = {"step": torch.tensor(float(self.done)), **moments}

    @torch.no_grad()
    def _hidden(self, mode: str, input_ids: Tensor, gates: Tensor | None = None) -> Tensor:
        with self.attention.mode(mode, gates):
            return self.body(input_ids=input_ids, use_cache=False).last_hidden_state
