"""Convert a model, tune it with LoRA, push it, and load what everybody else would load.

python examples/convert_and_push.py --model HuggingFaceTB/SmolLM2-135M-Instruct --user me

Pushes USER/moba-converted (the model) and USER/moba-adapter (the adapter alone). Needs `hf auth login` once.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hf_attn
from hf_attn.training.data import blocks, byte_ids, reference_text


def losses(model: torch.nn.Module, rows: list) -> float:
    """Mean loss over rows of tokens."""
    with torch.no_grad():
        return sum(model(**{k: v[None] for k, v in row.items()}).loss.item() for row in rows) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder")
    parser.add_argument("--user", required=True, help="your name on the Hub")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # Bytes are ids of every vocabulary above 255; a real run takes the model's tokenizer.
    train, held_out = (blocks(byte_ids(text), arguments.length) for text in reference_text())
    held_out = held_out[:4]

    # 1. Convert. New weights start so that nothing changes, the sparse attention does not.
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    dense = losses(base, held_out)
    model = hf_attn.convert(base, "moba", block_size=16, top_k=3, min_seq_len=0)
    before = losses(model, held_out)

    # 2. Tune: LoRA on the projections, the new weights themselves in modules_to_save.
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj"], modules_to_save=["k_conv1d"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    for row in train[: arguments.steps]:
        model(**{k: v[None] for k, v in row.items()}, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    after = losses(model, held_out)
    print(f"held-out loss: dense {dense:.4f}, converted {before:.4f}, tuned {after:.4f}")

    # 3. Push the adapter alone, then the merged model. Both cards are filled from this.
    hf_attn.set_card(
        model,
        trained="LoRA on q_proj and k_proj, and the key convolutions",
        data=f"{arguments.steps} rows of {arguments.length} bytes of the Python language reference",
        metrics={"held-out loss": {"dense": dense, "before": before, "after": after}},
    )
    model.push_to_hub(f"{arguments.user}/moba-adapter")
    merged = model.merge_and_unload()
    merged.push_to_hub(f"{arguments.user}/moba-converted")

    # 4. What everybody else does.
    ids = held_out[0]["input_ids"][None]
    again = AutoModelForCausalLM.from_pretrained(f"{arguments.user}/moba-converted").eval()
    adapter = hf_attn.load_adapter(arguments.model, f"{arguments.user}/moba-adapter", load={"dtype": torch.float32})
    with torch.no_grad():
        want, whole, light = (m(ids).logits for m in (merged, again, adapter.eval()))
    print(f"difference after the round trip: model {(whole - want).abs().max():.1e}, ", end="")
    print(f"adapter on its base {(light - want).abs().max():.1e}")


if __name__ == "__main__":
    main()
