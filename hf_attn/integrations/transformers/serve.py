"""`transformers serve` for checkpoints with a mechanism: python -m hf_attn.integrations.transformers.serve MODEL.

The command of transformers does not import hf_attn, and its loader passes `attn_implementation=None`, which discards
the choice of the checkpoint. This starts the same command with both put right; continuous batching is enabled.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from hf_attn.integrations.transformers.config import mechanism_of
from hf_attn.integrations.transformers.continuous import enable_continuous_batching
from hf_attn.integrations.transformers.model import apply, implementations

_MARK = "_hf_attn_wrapped"


def follow_checkpoint(model: PreTrainedModel) -> PreTrainedModel:
    """Give `model` the mechanism its `config.hf_attn` names, when its loader dropped it; returns the model."""
    chosen = model.config.hf_attn
    if chosen and not any(mechanism_of(found) for found in implementations(model.config).values()):
        options = {key: value for key, value in chosen.items() if key != "mechanism"}
        apply(model, chosen["mechanism"], **options)
    return model


def install() -> None:
    """Let the server of this process follow its checkpoints, and enable continuous batching; harmless when repeated.

    An `--attn-implementation` given on the command line wins.
    """
    from transformers.cli.serving.model_manager import ModelManager

    enable_continuous_batching()
    original = ModelManager._load_model
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
        model = original(self, *args, **kwargs)
        return model if self.attn_implementation is not None else follow_checkpoint(model)

    setattr(load, _MARK, True)
    ModelManager._load_model = load


def main() -> None:
    """`transformers serve` with the arguments of this process."""
    from transformers.cli.transformers import app

    install()
    sys.argv = [sys.argv[0], "serve", *sys.argv[1:]]
    app()


if __name__ == "__main__":
    main()
