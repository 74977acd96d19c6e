"""What classes of streaming heads cost in quality: perplexity and passkeys of a real model, by method and share.

python -m hf_attn.bench.head_classes --rows 4
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import hf_attn
from hf_attn.analysis.head_files import load_heads
from hf_attn.analysis.texts import python_reference_text, token_windows
from hf_attn.bench.models import load_language_model
from hf_attn.bench.prefill import prefill, run_body


def perplexity(model: Any, rows: Tensor, **lserve: Any) -> float:
    """Perplexity of `rows` int64 `[n, length]`: dense, or with options of lserve when any are given."""
    with _applied(model, lserve):
        logs = [torch.tensor(prefill(model, row[None], mass_rows=0).perplexity).log() for row in rows]
    return float(torch.stack(logs).mean().exp())


@torch.inference_mode()
def passkey_hits(model: Any, prompts: list[tuple[list[int], list[int]]], **lserve: Any) -> int:
    """Prompts whose answer is the model's own greedy continuation; each is (prompt ids, answer ids).

    One pass over prompt and answer tells: every answer token is the best one after the tokens before it.
    """
    hits = 0
    with _applied(model, lserve):
        for prompt, answer in prompts:
            hidden = run_body(model, torch.tensor([prompt + answer]))[0]
            logits = model.get_output_embeddings()(hidden[0, len(prompt) - 1 : -1])
            hits += logits.argmax(-1).tolist() == answer
    return hits


def passkey_prompts(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Five digits at depths 0.05 to 0.95 of about `length` tokens of real text, and the question for them."""
    generator = torch.Generator().manual_seed(seed)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    filler = encode(python_reference_text()[: 16 * length * 2])
    prompts = []
    for number in range(count):
        digits = "".join(str(d) for d in torch.randint(10, (5,), generator=generator).tolist())
        needle = encode(f"\n\nThe pass key is {digits}. Remember it. {digits} is the pass key.\n\n")
        question = encode("\n\nWhat is the pass key? The pass key is")
        room = length - len(needle) - len(question)
        start = int(torch.randint(len(filler) - room + 1, (), generator=generator))
        place = start + int(room * (0.05 + 0.9 * number / max(count - 1, 1)))
        ids = filler[start:place] + needle + filler[place : start + room] + question
        prompts.append((ids, encode(f" {digits}")))
    return prompts


class _applied:
    """Lserve with these options inside the `with` block, nothing when there are none."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self.model, self.options = model, options

    def __enter__(self) -> None:
        if self.options:
            hf_attn.apply(self.model, "lserve", **self.options)

    def __exit__(self, *_: object) -> None:
        if self.options:
            hf_attn.remove(self.model)


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity and passkeys with streaming heads.")
    parser.add_argument("--model", default=None, help="Hub id, folder or .gguf; default SmolLM2-135M")
    parser.add_argument("--heads", default=None, help="folder of hf-attn calibrate or lserve_gates; default: calibrate")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=4, help="rows for perplexity, behind the text of the calibration")
    parser.add_argument("--passkeys", type=int, default=10, help="passkey prompts; 0 leaves them out")
    parser.add_argument("--passkey-length", type=int, default=3500, help="tokens of a passkey prompt")
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--local", type=int, default=256)
    arguments = parser.parse_args()
    model, tokenizer = load_language_model(arguments.model)
    window = {"ctx_sink": arguments.sink, "ctx_local": arguments.local}
    read = 4
    if arguments.heads is None:
        sizes = {"sink": arguments.sink, "local": arguments.local, "tokens": read * arguments.length}
        found = hf_attn.calibrate(model, "lserve", tokenizer=tokenizer, length=arguments.length, **sizes)
    else:
        found = load_heads(arguments.heads)
    rows = token_windows(tokenizer, [python_reference_text()], length=arguments.length, count=read + arguments.rows)
    rows = rows[read:]
    classes = {}
    for share in (0.25, 0.5):
        classes[f"{share:.0%} streaming"] = hf_attn.classify_heads(found.gates, share)
        classes[f"{share:.0%} reversed"] = hf_attn.classify_heads(1 - found.gates, share)
    dense = perplexity(model, rows)
    print(f"perplexity of {rows.numel()} tokens in rows of {arguments.length}, sink {arguments.sink}, "
          f"local {arguments.local}\n{'dense':<16} {dense:8.3f}", flush=True)  # fmt: skip
    for name, retrieval in classes.items():
        value = perplexity(model, rows, heads=retrieval.int().tolist(), **window)
        print(f"{name:<16} {value:8.3f}  ratio {value / dense:.3f}", flush=True)
    if arguments.passkeys:
        prompts = passkey_prompts(tokenizer, arguments.passkeys, arguments.passkey_length)
        print(f"passkeys found in {arguments.passkey_length} tokens, of {len(prompts)}", flush=True)
        print(f"{'dense':<16} {passkey_hits(model, prompts):8d}", flush=True)
        for name, retrieval in classes.items():
            hits = passkey_hits(model, prompts, heads=retrieval.int().tolist(), **window)
            print(f"{name:<16} {hits:8d}", flush=True)


if __name__ == "__main__":
    main()
