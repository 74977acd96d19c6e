"""Rank documents for a query with a chat model, in one partial forward pass.

python examples/blockrank.py                              # SmolLM2-135M-Instruct
python examples/blockrank.py --model you/a-tuned-ranker   # of recipes/blockrank
"""

from __future__ import annotations

import argparse
import time

import hf_attn
from hf_attn.bench.models import load_language_model

QUERY = "Which river runs through Paris?"
DOCUMENTS = [
    "Bread is baked in a hot oven until its crust is brown.",
    "The Seine flows through the French capital on its way to the sea.",
    "A prime number has no divisors but one and itself.",
    "The Thames passes London and ends in the North Sea.",
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct, which is not tuned")
arguments = parser.parse_args()

model, tokenizer = load_language_model(arguments.model)
ranker = hf_attn.BlockRanker(model, tokenizer)
start = time.perf_counter()
for place, entry in enumerate(ranker.rank(QUERY, DOCUMENTS, return_documents=True), 1):
    print(f"{place}. {entry['score']:.3f}  {entry['text']}")
layers = len(hf_attn.stats(model)["layers"])
print(f"{layers} of {model.config.num_hidden_layers} layers, {time.perf_counter() - start:.2f} s")
