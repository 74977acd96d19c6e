"""Weights of the authors' own code: keys renamed, nothing left over, nothing missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

# Wrappers that training scripts put around a state dict.
_WRAPPERS = ("model", "state_dict", "model_state", "model_ema", "module")
_SHOWN = 8


@dataclass(frozen=True)
class OfficialNames:
    """How a family's official keys become ours.

    Args:
        prefixes: {official prefix: ours}; the longest that fits is replaced, keys without any are left over.
            `""` fits every key. Prefixes of modules end in a dot.
        unused: official prefixes whose keys may be dropped when this model has no place for them: heads of a
            backbone, norms of a detector.
        optional: our prefixes that a checkpoint may lack, then left as they are: norms of a dense task.
    """

    prefixes: Mapping[str, str]
    unused: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def rename(self, key: str) -> str | None:
        """Our name of an official key; None when no prefix fits."""
        fitting = [prefix for prefix in self.prefixes if key.startswith(prefix)]
        if not fitting:
            return None
        best = max(fitting, key=len)
        return self.prefixes[best] + key.removeprefix(best)


def unwrap(state: Mapping) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint (`model`, `state_dict`, ...), without `module.` of data parallel.

    Raises ValueError when it holds none.
    """
    while not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[name] for name in _WRAPPERS if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            raise ValueError(
                f"this is no state dict: none of its values is a tensor, and none of {', '.join(_WRAPPERS)} holds one; "
                f"it has {_listed(list(map(str, state)))}"
            )
        state = inner
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def load_official(model: nn.Module, state: Mapping, names: OfficialNames, *, prefix: str = "") -> None:
    """Load an official state dict into a model, in place.

    Args:
        model: a model of the same variant.
        state: official names -> tensors, or the checkpoint around it; read files with
            `safetensors.torch.load_file` or `torch.load(..., weights_only=True)`.
        names: the family's rules.
        prefix: of the backbone inside a model with a head; a model without one has the same names without it.

    Raises ValueError naming the keys that fit nothing, are missing, or have another shape; then nothing is loaded.
    """
    own, renamed, left_over = model.state_dict(), {}, []
    for key, tensor in unwrap(state).items():
        name = names.rename(key)
        if name is not None and name not in own:
            name = name.removeprefix(prefix)
        if name in own:
            renamed[name] = tensor
        elif not key.startswith(names.unused):
            left_over.append(key)
    optional = ("num_batches_tracked",)
    missing = [
        name
        for name in own
        if name not in renamed and not name.startswith(names.optional) and not name.endswith(optional)
    ]
    shapes = [
        f"{name}: {list(tensor.shape)} in the checkpoint, {list(own[name].shape)} in the model"
        for name, tensor in renamed.items()
        if tensor.shape != own[name].shape
    ]
    problems = [
        f"{what} ({len(keys)}): {_listed(keys)}"
        for what, keys in (("no place for", left_over), ("missing", missing), ("other shape", shapes))
        if keys
    ]
    if problems:
        raise ValueError(
            f"this checkpoint is not one of {type(model).__name__} with this config; "
            + "; ".join(problems)
            + ". Build the model from the preset of the checkpoint's variant."
        )
    model.load_state_dict(renamed, strict=False)


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
