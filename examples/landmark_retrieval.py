"""Give a pretrained model landmarks, train three LoRA steps, save, load, and generate behind a cache of blocks.

python examples/landmark_retrieval.py                       # SmolLM2-135M-Instruct
python examples/landmark_retrieval.py --model your/model
"""

from __future__ import annotations

import argparse

import peft
import torch
from transformers import AutoModelForCausalLM

import hf_attn
from hf_attn.bench.long_text import prompt_of_length
from hf_attn.bench.models import load_language_model
from hf_attn.integrations.transformers.landmark_cache import LandmarkCache
from hf_attn.training.landmark import add_landmark_token

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="Hub id, folder or .gguf file (Llama, Qwen2, Qwen3, Mistral); default SmolLM2-135M")
parser.add_argument("--tokens", type=int, default=512, help="length of the prompt")
parser.add_argument("--output", default="landmark_model", help="folder for the converted model")
arguments = parser.parse_args()

dense, tokenizer = load_language_model(arguments.model)
ids = prompt_of_length(tokenizer, arguments.tokens, answer_tokens=1)
token = add_landmark_token(tokenizer)
model = hf_attn.convert(dense, "landmark", token_id=token, block_size=16, top_k=4, train_length=256)

# Training reads every block; the model puts landmarks in and takes them out, so data and labels are the usual ones.
lora = peft.LoraConfig(target_modules=["q_proj", "k_proj"], trainable_token_indices={"embed_tokens": [token]})
adapted = peft.get_peft_model(model, lora)
optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-3)
for step in range(3):
    loss = adapted(input_ids=ids[:, :240], labels=ids[:, :240]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

adapted.merge_and_unload().save_pretrained(arguments.output)
tokenizer.save_pretrained(arguments.output)

# Options of the cache are chosen at load time: here blocks wait on the CPU, landmark keys stay on the device.
loaded = AutoModelForCausalLM.from_pretrained(arguments.output, landmark_top_k=4, landmark_offload=True)
cache = LandmarkCache(loaded.config)
answer = loaded.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False, pad_token_id=0)
print(type(loaded).__name__, repr(tokenizer.decode(answer[0, ids.shape[1] :])))
counts, report = hf_attn.stats(loaded)["totals"]["counts"], cache.report()
print(f"blocks read while decoding: {counts['decode_blocks_read'] / counts['decode_blocks_cached']:.1%} of the cache")
print(f"cache: {report['bytes']}")
