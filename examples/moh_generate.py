"""Convert a pretrained model to Mixture-of-Head attention, save it, load it as any model, and generate.

python examples/moh_generate.py                       # SmolLM2-135M-Instruct, 7 of 9 heads
python examples/moh_generate.py --model your/model --shared-heads 8 --top-k 12
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM

import hf_attn
from hf_attn.analysis.texts import python_reference_text, token_windows
from hf_attn.bench.models import load_language_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="Hub id, folder or .gguf file (Llama, Qwen2, Qwen3, Mistral); default SmolLM2-135M")
parser.add_argument("--shared-heads", type=int, default=3, help="heads that every token computes, found by calibration")
parser.add_argument("--top-k", type=int, default=4, help="heads a token computes of the others")
parser.add_argument("--output", default="moh_model", help="folder for the converted model")
arguments = parser.parse_args()

dense, tokenizer = load_language_model(arguments.model)
rows = token_windows(tokenizer, [python_reference_text()], length=128, count=5)
options = {"shared_heads": arguments.shared_heads, "top_k": arguments.top_k, "router": "learned", "tokens": rows[1:]}
model = hf_attn.convert(dense, "moh", **options).eval()
print(f"{100 * model.activated_heads:.0f} % of the heads a token, shared in the first layer: "
      f"{model.config.moh_shared_heads[0]}")  # fmt: skip

with torch.no_grad():
    for name, variant in (("dense", dense), ("MoH, not tuned", model)):
        print(f"{name}: loss {variant(rows[:1], labels=rows[:1]).loss:.3f}")

model.save_pretrained(arguments.output)
loaded = AutoModelForCausalLM.from_pretrained(arguments.output)
answer = loaded.generate(rows[:1, :64], max_new_tokens=16, do_sample=False, pad_token_id=0)[0, 64:]
print(type(loaded).__name__, repr(tokenizer.decode(answer)))
