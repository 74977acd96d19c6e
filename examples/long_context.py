"""Answer from a long text with MoBA, and show what every layer did.

python examples/long_context.py                                # SmolLM2-135M-Instruct
python examples/long_context.py --model your/model --tokens 8192 --mechanism streaming
"""

from __future__ import annotations

import argparse

import torch

import hf_attn
from hf_attn.bench.long_text import QUESTION, prompt_of_length
from hf_attn.bench.models import load_language_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct")
parser.add_argument("--mechanism", default="moba", help="see hf_attn.list_mechanisms()")
parser.add_argument("--tokens", type=int, default=4096, help="text + question + answer")
arguments = parser.parse_args()

model, tokenizer = load_language_model(arguments.model)
hf_attn.apply(model, arguments.mechanism)

prompt = prompt_of_length(tokenizer, arguments.tokens, answer_tokens=48)
with torch.inference_mode():
    answer = model.generate(prompt, max_new_tokens=48, do_sample=False)[0, prompt.shape[1] :]
print(QUESTION)
print(tokenizer.decode(answer, skip_special_tokens=True).strip())

for layer, counters in hf_attn.stats(model)["layers"].items():
    reasons = ", ".join(f"{count} dense: {reason}" for reason, count in counters["dense_reasons"].items())
    density = "-" if counters["density"] is None else f"{counters['density']:.0%}"
    print(f"layer {layer}: {counters['sparse_calls']} sparse calls at density {density}; {reasons}")
