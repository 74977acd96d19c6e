"""How evenly the heads of a routed model are used, in the Trainer's logs."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class HeadLoad(TrainerCallback):
    """Adds `head_load_min` and `head_load_max` to every log: the load of the least and the most chosen routed head of
    all layers in the last forward, as a multiple of an even load.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """Also into `state.log_history`, which transformers fills before it calls this."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not hasattr(base, "head_load"):
            return
        shares = [
            load / (sum(layer) / len(layer)) for layer in base.head_load() if layer and sum(layer) for load in layer
        ]
        if shares:
            found = {"head_load_min": round(min(shares), 4), "head_load_max": round(max(shares), 4)}
            for entry in (logs, state.log_history[-1] if state.log_history else None):
                if entry is not None:
                    entry.update(found)
