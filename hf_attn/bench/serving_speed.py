"""LServe on SmolLM2-135M over a real text: decoding and prefill against dense attention, as the speed bars ask.

    python -m hf_attn.bench.serving_speed decode --lengths 4096 8192       # over DynamicCache and our own cache, dense
    python -m hf_attn.bench.serving_speed prefill --lengths 8192           # end to end, and the attention calls

`hf-attn bench decode` has the whole tables, perplexity among them; this is what the bars need of them. Half of the
heads stream (classes are measured first). A variant whose check fails has no speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from transformers.utils import logging as hf_logging

import hf_attn
from hf_attn.analysis.head_files import lserve_options
from hf_attn.analysis.texts import python_reference_text, token_windows
from hf_attn.bench import decode, prefill_speed
from hf_attn.bench.figures import Row, show
from hf_attn.bench.models import load_language_model
from hf_attn.bench.timing import machine_load

FIGURES = ("over DynamicCache", "over own dense", "end to end", "attention")
# The settings that speeds of short contexts are stated for; the mechanism's own defaults are for longer ones.
LSERVE = {"token_budget": 1024, "ctx_sink": 64, "ctx_local": 256, "dec_sink": 64, "dec_local": 256}


def decoding(model: torch.nn.Module, options: dict, ids: torch.Tensor, args: argparse.Namespace) -> Iterator[Row]:
    """The mechanism without quantisation, over both dense baselines."""
    table = decode.variants("lserve", options)[:3]
    prompts = decode.Prompts(model, "lserve", table[2].options, ids)
    rows = decode.measure(model, "lserve", table, ids, prompts, args.lengths, repeats=args.repeats)
    for host, own, found in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        case = f"decode {found.length}"
        if not all(row.passed for row in (host, own, found)):
            yield Row(case, f"{case}: check FAILED, error {found.error:.1e}", problem="check failed")
            continue
        figures = {"over DynamicCache": found.speedup(host), "over own dense": found.speedup(own)}
        line = f"{case}: {found.tokens_per_second:.1f} tokens/s, " + _joined(figures)
        yield Row(case, line, figures, max(host.timing.spread, own.timing.spread))


def prefilling(model: torch.nn.Module, options: dict, ids: torch.Tensor, args: argparse.Namespace) -> Iterator[Row]:
    rows = prefill_speed.measure(model, "lserve", options, ids, args.lengths, repeats=args.repeats)
    for dense, found in zip(rows[::2], rows[1::2], strict=True):
        case = f"prefill {found.length}"
        if not found.passed:
            yield Row(case, f"{case}: check FAILED, error {found.error:.1e}", problem="check failed")
            continue
        figures = {"end to end": found.speedup(dense), "attention": found.attention_speedup(dense)}
        line = f"{case}: {found.timing.median:.2f} s, {_joined(figures)}, ceiling {found.ceiling(dense):.2f}x"
        yield Row(case, line, figures, dense.timing.spread)


def _joined(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}x" for name, value in figures.items())


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "prefill"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct")
    parser.add_argument("--calibration-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    hf_logging.disable_progress_bar()
    model, tokenizer = load_language_model(args.model)
    limit = model.config.max_position_embeddings
    if max(args.lengths) > limit:
        parser.error(f"--lengths must be at most {limit}, where this model ends, got {max(args.lengths)}")
    print(f"torch {torch.__version__}, fp32, {args.threads} thread(s), {machine_load()}")
    sizes = {"length": min(2048, limit), "tokens": args.calibration_tokens}
    windows = {"sink": LSERVE["ctx_sink"], "local": LSERVE["ctx_local"]}
    heads = hf_attn.calibrate(model, "lserve", tokenizer=tokenizer, **sizes, **windows)
    options = {**LSERVE, **lserve_options(heads, 0.5)}
    ids = token_windows(tokenizer, [python_reference_text()], length=max(args.lengths) + 1, count=1)
    run = {"decode": decoding, "prefill": prefilling}[args.what]
    return [show(row) for row in run(model, options, ids, args)]


if __name__ == "__main__":
    main()
