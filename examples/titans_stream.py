"""Read an endless stream with a Titans model, whose memory learns and does not grow; save it and go on later.

python examples/titans_stream.py                            # a small new model: shows the mechanics, knows nothing
python examples/titans_stream.py --model titans_needle_output/memory_0/model
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_attn  # noqa: F401  registers the model type
from hf_attn.integrations.transformers.memory import TitansCache

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder or Hub id of a Titans model")
parser.add_argument("--pieces", type=int, default=16, help="pieces of 256 tokens to read")
arguments = parser.parse_args()

if arguments.model:
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
else:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("titans", vocab_size=256, window=64, **sizes))
model.eval()

cache = TitansCache(model.config.num_hidden_layers)
stream = torch.Generator().manual_seed(0)
with torch.no_grad():
    for piece in range(arguments.pieces):
        tokens = torch.randint(3, model.config.vocab_size, (1, 256), generator=stream)
        loss = model(tokens, labels=tokens, past_key_values=cache).loss
        if piece % 4 == 0:
            read = cache.get_seq_length()
            print(f"{read:6d} tokens read, loss {loss:.3f}, states {cache.bytes() / 1e6:.2f} MB")

    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "stream.safetensors")
        resumed = TitansCache(model.config.num_hidden_layers).load(Path(folder) / "stream.safetensors")
    question = tokens[:, :4]
    answer = model(question, past_key_values=resumed, freeze_memory=True).logits[0, -1].argmax()
    print(f"resumed after {resumed.get_seq_length() - 4} tokens; next token with the memory frozen: {int(answer)}")
