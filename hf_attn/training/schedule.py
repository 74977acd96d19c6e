"""Trainer callbacks that change what a mechanism does while a model learns to live with it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_attn.checks import require_int


class TopKSchedule(TrainerCallback):
    """Lower `top_k` from dense to its target over the first part of training.

    With as many blocks as there are keys attention is dense, so training starts at the loss of the model it came from
    (moba.md, section 4). Steps in between fall geometrically: halving the blocks costs about the same each time.

    Args:
        target: the final `top_k`, >= 1.
        blocks: blocks of a training sequence, `ceil(length / block_size)`; where the schedule starts.
        share: part of all steps after which the target is reached, in [0, 1]; 0 starts at the target.
    """

    def __init__(self, target: int, blocks: int, share: float = 0.2) -> None:
        require_int("target", target, 1)
        require_int("blocks", blocks, 1)
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {share}")
        self.target, self.blocks, self.share = target, max(blocks, target), share

    def top_k(self, step: int, total: int) -> int:
        """`top_k` of optimizer step `step` (from 0) of `total`."""
        ramp = self.share * total
        if step >= ramp:
            return self.target
        return round(self.blocks * (self.target / self.blocks) ** (step / ramp))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """As the host's."""
        set_options(model, top_k=self.top_k(state.global_step, state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """As the host's."""
        set_options(model, top_k=self.target)


class AttentionSwitch(TrainerCallback):
    """Train the last part of the steps with another implementation (two-stage training of the MoBA paper: 90 % MoBA,
    then 10 % full attention), and give the first one back at the end.

    Args:
        after: part of the steps before the switch, in [0, 1].
        implementation: what follows, "sdpa" for full attention.
    """

    def __init__(self, after: float = 0.9, implementation: str = "sdpa") -> None:
        if not 0 <= after <= 1:
            raise ValueError(f"after must lie in [0, 1], got {after}")
        self.after, self.implementation = after, implementation
        self._before: str | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """As the host's."""
        if self._before is None and state.global_step >= self.after * state.max_steps:
            base = _base(model)
            self._before = base.config._attn_implementation
            base.set_attn_implementation(self.implementation)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """As the host's."""
        if self._before is not None:
            _base(model).set_attn_implementation(self._before)
            self._before = None


def set_options(model: Any, **options: Any) -> None:
    """Change single options of the mechanism a model uses, from its next call on; the rest stays.

    Raises ValueError when the model's config names no mechanism, and for bad options.
    """
    config = _base(model).config
    if not config.hf_attn:
        raise ValueError("the model uses no mechanism (config.hf_attn is empty); call hf_attn.apply first")
    if any(config.hf_attn.get(name) != value for name, value in options.items()):
        config.hf_attn = {**config.hf_attn, **options}


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
