"""bitsandbytes' 4-bit layers on CPUs with bf16 instructions: the first call without gradients packs the weights anew.

Of packed weights, bitsandbytes 0.50 makes other numbers when they are read: `dequantize_4bit`, with which PEFT merges,
ignores the packing, and `state_dict`, which undoes it, leaves the scales transposed unless they are quantised too. So
they are unpacked before either. The next call packs them again, to the same numbers.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def unpack(model: nn.Module) -> None:
    """Bring all packed 4-bit weights of a model, or of one layer, back to the format that they were loaded in."""
    for module in model.modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if not getattr(state, "packing_format_for_cpu", False):
            continue
        scales = state.absmax.T.reshape(-1).float()
        module.state_dict()
        # The scales as they were packed; quantising them once more would change them.
        state = module.weight.quant_state
        state.absmax, state.nested, state.offset, state.state2 = scales, False, None, None
