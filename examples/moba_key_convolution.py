"""Give a pretrained model MoBA with a key convolution, train three LoRA steps, save, load and generate.

python examples/moba_key_convolution.py                       # SmolLM2-135M-Instruct
python examples/moba_key_convolution.py --model your/model
"""

from __future__ import annotations

import argparse

import peft
import torch
from transformers import AutoModelForCausalLM

import hf_attn
from hf_attn.bench.long_text import prompt_of_length
from hf_attn.bench.models import load_language_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="Hub id, folder or .gguf file (Llama, Qwen2, Qwen3, Mistral); default SmolLM2-135M")
parser.add_argument("--tokens", type=int, default=512, help="length of the training text")
parser.add_argument("--output", default="moba_key_convolution", help="folder for the converted model")
arguments = parser.parse_args()

dense, tokenizer = load_language_model(arguments.model)
model = hf_attn.convert(dense, "moba", kconv_width=3, block_size=32, top_k=4, min_seq_len=0)
ids = prompt_of_length(tokenizer, arguments.tokens, answer_tokens=1)

# The convolution starts at zero: until it is trained, logits are those of the same model without it.
hf_attn.apply(dense, "moba", block_size=32, top_k=4, min_seq_len=0)
with torch.no_grad():
    difference = (model(ids).logits - dense(ids).logits).abs().max()
print(f"largest change of a logit by the new weights: {difference:.1e}")

torch.manual_seed(0)  # adapters begin at random
lora = peft.LoraConfig(target_modules=["q_proj", "k_proj"], modules_to_save=["k_conv1d"])
adapted = peft.get_peft_model(model, lora)
optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=5e-3)
for step in range(3):
    loss = adapted(ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

adapted.merge_and_unload().save_pretrained(arguments.output)
loaded = AutoModelForCausalLM.from_pretrained(arguments.output)
answer = loaded.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
print(type(loaded).__name__, repr(tokenizer.decode(answer)))
