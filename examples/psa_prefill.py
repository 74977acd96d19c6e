"""Prefill a long text with PSA, no training: perplexity and density against dense attention.

python examples/psa_prefill.py                              # SmolLM2-135M-Instruct, 2048 tokens
python examples/psa_prefill.py --model your/model --tokens 8192 --density 0.5
"""

from __future__ import annotations

import argparse

import hf_attn
from hf_attn.bench.long_text import python_reference_text
from hf_attn.bench.models import load_language_model
from hf_attn.bench.prefill import prefill

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct")
parser.add_argument("--tokens", type=int, default=2048)
parser.add_argument("--density", type=float, help="share of the dense work; default: what the thresholds give")
parser.add_argument("--block-size", type=int, default=128)
arguments = parser.parse_args()

model, tokenizer = load_language_model(arguments.model)
text = python_reference_text()[: 8 * arguments.tokens]
ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : arguments.tokens]

dense = prefill(model, ids, mass_rows=0)
print(f"dense: perplexity {dense.perplexity:.2f}, {dense.seconds:.1f} s")

hf_attn.apply(model, "psa", block_size=arguments.block_size, density=arguments.density, text_length=0, min_tokens=0)
sparse = prefill(model, ids, mass_rows=0)
ratio, density = sparse.perplexity / dense.perplexity, hf_attn.stats(model)["totals"]["density"]
print(
    f"psa: perplexity {sparse.perplexity:.2f} ({ratio:.3f} times dense), density {density:.3f}, {sparse.seconds:.1f} s"
)
