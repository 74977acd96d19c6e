"""Pass keys that a model finds while it decodes: dense, and with LServe's budget of pages and streaming heads.

python -m hf_attn.bench.lserve_passkey --heads gates/heads
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import torch
from torch import Tensor

import hf_attn
from hf_attn.analysis.head_classes import order_equal_gates
from hf_attn.analysis.head_files import load_heads
from hf_attn.bench.head_classes import passkey_prompts
from hf_attn.bench.models import load_language_model
from hf_attn.training.passkeys import passkey_text

# Tokens generated for an answer, as in arXiv 2305.16300.
ANSWER_TOKENS = 10


def repeated_prompts(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[tuple[Tensor, str]]:
    """Prompts of about `length` tokens whose filler is a few sentences again and again, with their keys."""
    generator = torch.Generator().manual_seed(seed)

    def encode(characters: int) -> tuple[list[int], str]:
        prompt, key = passkey_text(characters, generator, held_out=True)
        return tokenizer(prompt, add_special_tokens=False)["input_ids"], key

    bare, wide = (len(encode(characters)[0]) for characters in (0, 4 * length))
    characters = max(4 * length * (length - bare) // (wide - bare), 0)
    prompts = (encode(characters) for _ in range(count))
    return [(torch.tensor([ids]), key) for ids, key in prompts]


def real_prompts(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[tuple[Tensor, str]]:
    """Prompts of `length` tokens of real text with a key at depths from 0.05 to 0.95, and their keys."""
    prompts = passkey_prompts(tokenizer, count, length, seed)
    return [(torch.tensor([ids]), tokenizer.decode(answer).strip()) for ids, answer in prompts]


FILLERS = {"real": real_prompts, "repeated": repeated_prompts}


@torch.inference_mode()
def found(model: Any, tokenizer: Any, prompts: list[tuple[Tensor, str]]) -> list[bool]:
    """For every prompt whether the first number of the greedy continuation is its key."""
    hits = []
    for ids, key in prompts:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=0
        )
        number = re.search(r"\d+", tokenizer.decode(out[0, ids.shape[1] :]))
        hits.append(number is not None and number.group() == key)
    return hits


def variants(gates: list[list[float]], budget: int, share: float, sink: int, local: int) -> dict[str, dict[str, Any]]:
    """Options of lserve by what is told apart: the budget of pages, streaming in decoding, streaming in the prompt."""
    pages = {"page_size": 64, "logical_page_size": 16, "token_budget": budget, "reuse_interval": 4}
    streaming = {"gates": gates, "static_sparsity": share, "dec_sink": sink, "dec_local": local}
    prompt = {"ctx_sink": sink, "ctx_local": local}
    return {
        f"budget {budget}, no streaming": {**pages, "static_sparsity": 0.0},
        f"budget {budget}, {share:.0%} streaming while decoding": {**pages, **streaming},
        f"budget {budget}, {share:.0%} streaming, prompt too": {**pages, **streaming, **prompt},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub id, folder or .gguf; default SmolLM2-135M")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--heads", default=None, help="folder of hf-attn calibrate or lserve_gates; default: calibrate")
    parser.add_argument(
        "--order-equal", type=int, default=0, metavar="TOKENS",
        help="tokens of text whose attention mass orders heads of equal gates; 0 leaves their order to their numbers",
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--length", type=int, default=3500, help="tokens of a prompt")
    parser.add_argument("--filler", choices=sorted(FILLERS), default="real", help="real text, or sentences repeated")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.25, help="of heads that stream")
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--local", type=int, default=256)
    parser.add_argument("--only", default="", help="rows of the table whose name holds this text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_language_model(arguments.model, getattr(torch, arguments.dtype))
    if arguments.heads is None:
        sizes = {"sink": arguments.sink, "local": arguments.local, "tokens": 8192}
        gates = hf_attn.calibrate(model, "lserve", tokenizer=tokenizer, length=2048, **sizes).gates
    else:
        gates = load_heads(arguments.heads).gates
        if arguments.order_equal:
            sizes = {"sink": arguments.sink, "local": arguments.local, "tokens": arguments.order_equal}
            mass = hf_attn.calibrate(model, "lserve", tokenizer=tokenizer, length=2048, **sizes).gates
            gates = order_equal_gates(gates, mass)
    prompts = FILLERS[arguments.filler](tokenizer, arguments.prompts, arguments.length, arguments.seed)
    tokens = sum(ids.shape[1] for ids, _ in prompts) / len(prompts)
    source = arguments.heads or "calibrated"
    print(f"{len(prompts)} prompts of {tokens:.0f} tokens, {arguments.filler} filler; gates: {source}")
    print("| variant | found | by prompt |\n|---|---|---|", flush=True)
    options = variants(gates.tolist(), arguments.budget, arguments.share, arguments.sink, arguments.local)
    for name, chosen in {"dense": None, **options}.items():
        if arguments.only not in name:
            continue
        if chosen is not None:
            hf_attn.apply(model, "lserve", **chosen)
        hits = found(model, tokenizer, prompts)
        if chosen is not None:
            hf_attn.remove(model)
        print(f"| {name} | {sum(hits)} | {''.join('.x'[hit] for hit in hits)} |", flush=True)


if __name__ == "__main__":
    main()
