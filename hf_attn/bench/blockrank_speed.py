"""Speed of BlockRank against dense attention: the attention core, and a whole call of `rank` (blockrank.md 8.12).

    python -m hf_attn.bench.blockrank_speed core                       # attention of one layer, SmolLM2's heads
    python -m hf_attn.bench.blockrank_speed rank --documents 100       # against a dense forward of the same prompt
    python -m hf_attn.bench.blockrank_speed scaling                    # 500 documents against 100

Documents of 64 tokens with their frame. A core whose result fails the check against dense attention with the mask of
the specification shows no speed.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

import hf_attn
from hf_attn import ops
from hf_attn.bench.figures import Row, show
from hf_attn.bench.models import load_language_model
from hf_attn.bench.timing import Timing, interleaved, machine_load, paired_ratio
from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.models.blockrank import BlockRanker

FIGURES = ("speed-up", "growth")
HEADS, KV_HEADS, DIM, BLOCK = 9, 3, 64, 64
WORDS = "river stone window music paper winter garden number letter silver bridge candle orange forest market".split()


def core(documents: int, repeats: int) -> Row:
    """One line: attention of instruction, `documents` documents and query, 64 tokens each, against causal SDPA."""
    generator = torch.Generator().manual_seed(0)
    tokens = TokenLayout.documents(torch.arange(documents + 2).repeat_interleave(BLOCK)[None])
    query, key, value = (torch.randn(1, h, tokens.q_len, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
    fast = partial(ops.document_attention, query, key, value, tokens=tokens)
    exact = ops.dense_attention(AttentionCall(query, key, value, DIM**-0.5, True, tokens))
    if float((fast() - exact).abs().max()) > 1e-5:
        line = f"{documents:9}   check FAILED: no speed shown"
        return Row(str(documents), line, problem="check failed")
    dense = partial(scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
    return row_of(documents, interleaved({"dense": dense, "blockrank": fast}, repeats=repeats))


def rank(documents: int, repeats: int, model: torch.nn.Module, tokenizer: object) -> Row:
    """One line: `rank` with early exit against a dense forward (last logits only) of the same tokens."""
    ranker = BlockRanker(model, tokenizer, max_block_length=BLOCK)
    query, texts = "which text is about a river?", long_texts(documents)
    batch = ranker.batch([query], [texts])

    def forward() -> object:
        hf_attn.remove(model)
        with torch.inference_mode():
            return model(batch.input_ids, use_cache=False, logits_to_keep=1).logits

    def ranked() -> object:
        return BlockRanker(model, tokenizer, max_block_length=BLOCK).rank(query, texts, top_k=10)

    times = interleaved({"dense": forward, "blockrank": ranked}, repeats=repeats, warmup=0)
    return row_of(documents, times, batch.input_ids.shape[1])


def scaling(few: int, many: int, repeats: int, model: torch.nn.Module, tokenizer: object) -> Row:
    """How much longer `rank` takes with `many` documents than with `few`."""
    ranker = BlockRanker(model, tokenizer, max_block_length=BLOCK)
    functions = {str(n): partial(ranker.rank, "which text is about a river?", long_texts(n)) for n in (few, many)}
    functions[str(few)]()
    times = interleaved(functions, repeats=repeats, warmup=0)
    small, large = times[str(few)], times[str(many)]
    ratio = paired_ratio(large, small)
    line = f"{few} documents {small.median:.2f} s, {many} documents {large.median:.2f} s: {ratio:.2f}x"
    return Row(f"{many} over {few}", line, {"growth": ratio}, small.spread if repeats > 1 else None)


def long_texts(count: int) -> list[str]:
    """Texts of more than a block each, every one cut to exactly 64 tokens with its frame."""
    return [" ".join(WORDS[(number + 3 * step) % len(WORDS)] for step in range(70)) for number in range(count)]


def row_of(documents: int, times: dict[str, Timing], tokens: int | None = None) -> Row:
    tokens = (documents + 2) * BLOCK if tokens is None else tokens
    dense, fast = times["dense"], times["blockrank"]
    ratio = paired_ratio(dense, fast)
    line = f"{documents:9}{tokens:8}{dense.median * 1e3:12.1f}{fast.median * 1e3:14.1f}{ratio:10.2f}"
    return Row(str(documents), line, {"speed-up": ratio}, dense.spread)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("core", "rank", "scaling"))
    parser.add_argument("--documents", nargs="+", type=int, help="default: 20 50 100; 100; 100 500")
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*were cut to max_block_length")
    print(f"torch {torch.__version__}, {args.threads} thread(s), {machine_load()}")
    head = f"{'documents':>9}{'tokens':>8}{'dense ms':>12}{'blockrank ms':>14}{'speed-up':>10}"
    if args.what == "core":
        print(head)
        return [show(core(count, args.repeats or 9)) for count in args.documents or (20, 50, 100)]
    model, tokenizer = load_language_model(args.model, getattr(torch, args.dtype))
    if args.what == "scaling":
        few, many = args.documents or (100, 500)
        return [show(scaling(few, many, args.repeats or 1, model, tokenizer))]
    print(f"{args.dtype}\n{head}")
    return [show(rank(count, args.repeats or 3, model, tokenizer)) for count in args.documents or (100,)]


if __name__ == "__main__":
    main()
