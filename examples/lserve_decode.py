"""Generate behind a long prompt with LServe, and show what its cache holds and reads.

python examples/lserve_decode.py                               # SmolLM2-135M-Instruct
python examples/lserve_decode.py --model your/model --tokens 16384 --kv-quant int4
python examples/lserve_decode.py --duo-heads path/to/duo_attention_folder
"""

from __future__ import annotations

import argparse

import torch

import hf_attn
from hf_attn.bench.long_text import QUESTION, prompt_of_length
from hf_attn.bench.models import load_language_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct")
parser.add_argument("--tokens", type=int, default=4096, help="text + question + answer")
parser.add_argument("--budget", type=int, default=1024, help="tokens a retrieval head reads for a new token")
parser.add_argument("--kv-quant", choices=["int8", "int4", "int8-per-tensor"])
parser.add_argument("--duo-heads", help="folder with DuoAttention's full_attention_heads.tsv and config.json")
arguments = parser.parse_args()

model, tokenizer = load_language_model(arguments.model)
options = {"token_budget": arguments.budget, "kv_quant": arguments.kv_quant, "min_seq_len": 0}
if arguments.duo_heads:
    options["gates"] = hf_attn.load_duo_heads(arguments.duo_heads).alpha.tolist()
hf_attn.apply(model, "lserve", **options)

# generate() would make this cache by itself; our own can be looked at afterwards, and kept for a next turn.
cache = hf_attn.LServeCache(model.config)
prompt = prompt_of_length(tokenizer, arguments.tokens, answer_tokens=48)
with torch.inference_mode():
    answer = model.generate(prompt, past_key_values=cache, max_new_tokens=48, do_sample=False)[0, prompt.shape[1] :]
print(QUESTION)
print(tokenizer.decode(answer, skip_special_tokens=True).strip())

report = hf_attn.cache_report(cache)
sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in report["bytes"].items() if size)
totals = hf_attn.stats(model)["totals"]
counts = totals["counts"]
print(f"cache of {report['tokens']} tokens: {sizes}")
print(
    f"{counts['decode_steps']:.0f} decode steps of single layers, {counts['selector_runs']:.0f} with the selector, "
    f"{report['pages_read']} pages read, density {totals['density'] or 1:.0%}"
)
