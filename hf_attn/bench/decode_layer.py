"""Speed of one decoding step of LServe in one attention layer against SDPA over the full cache, in the same run.

    python -m hf_attn.bench.decode_layer --lengths 32768 65536 --threads 1

A step attends to a cache of random keys that was filled beforehand, selects pages where it is due, and stores its
token.
Each case is first checked against the reference; a case that fails gets no speed. "selector" is what a step with a
selection costs more than one without, over a whole reuse interval, as a share of the mean step.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import Timing, interleaved, machine_load, paired_ratio
from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.mechanism import get_mechanism

FIGURES = ("speed-up", "selector")
# Name of a row -> options besides those of the command line.
VARIANTS = {
    "per query head": {},
    "group_max": {"group_select": "group_max"},
    "group_max int8": {"group_select": "group_max", "kv_quant": "int8"},
    "per query head int8": {"kv_quant": "int8"},
    "group_max int4": {"group_select": "group_max", "kv_quant": "int4"},
    "per query head int4": {"kv_quant": "int4"},
    "paged dense": {"token_budget": 1 << 30, "static_sparsity": 0.0, "heads": None},
}


@dataclass
class Case:
    """A filled cache and what runs on it. Every step is taken back, so that all of them see the same length."""

    mechanism: object
    config: object
    store: object
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def step(self, selects: bool, keep: bool = False) -> torch.Tensor:
        """One new token, taken back unless `keep`; `selects` forces or forbids the selector."""
        store = self.store
        kept = store.selection
        if selects:
            store.selection = None
        new = slice(store.slots, store.slots + 1)
        call = AttentionCall(
            self.query, self.key[:, :, new], self.value[:, :, new], self.query.shape[3] ** -0.5, True,
            TokenLayout.full(1, 1, store.slots + 1), LayerContext(index=0, cache=store),
        )  # fmt: skip
        out = self.mechanism(call, self.config)
        if keep:
            return out
        chosen = store.selection
        store.crop(1)
        store.selection = chosen if kept is None else kept
        return out


def random_tensors(length: int, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query, and keys and values of `length + 1` tokens; the same for all variants."""
    generator = torch.Generator().manual_seed(length)
    key, value = (torch.randn(1, args.kv_heads, length + 1, args.head_dim, generator=generator) for _ in range(2))
    return torch.randn(1, args.heads, 1, args.head_dim, generator=generator), key, value


def make_case(length: int, args: argparse.Namespace, options: dict, tensors: tuple[torch.Tensor, ...]) -> Case:
    """The first `length` of the tokens in a cache."""
    query, key, value = tensors
    streaming = round(args.kv_heads * args.streaming)
    settings = {
        "page_size": args.page, "logical_page_size": args.logical, "token_budget": args.budget,
        "reuse_interval": args.reuse, "heads": [[0] * streaming + [1] * (args.kv_heads - streaming)],
        "min_seq_len": 0, **options,
    }  # fmt: skip
    mechanism = get_mechanism("lserve")
    config = mechanism.config.from_dict(settings)
    store = mechanism.store(config, 0, args.kv_heads)
    store.append(key[:, :, : length - 1], value[:, :, : length - 1], None)
    case = Case(mechanism, config, store, query, key, value)
    # The first token closes the prompt: streaming heads go over to their ring.
    case.step(True, keep=True)
    return case


def error_of(case: Case) -> float:
    """Largest difference of the torch path from the reference, over max |out|."""
    kept = os.environ.get("HF_ATTN_BACKEND")
    try:
        os.environ["HF_ATTN_BACKEND"] = "reference"
        expected = case.step(False)
    finally:
        os.environ.pop("HF_ATTN_BACKEND")
        if kept is not None:
            os.environ["HF_ATTN_BACKEND"] = kept
    return float((case.step(False) - expected).abs().max() / expected.abs().max())


def dense_step(case: Case) -> torch.Tensor:
    """SDPA over the whole cache, the new token included."""
    return F.scaled_dot_product_attention(case.query, case.key, case.value, enable_gqa=True)


def run_length(length: int, args: argparse.Namespace) -> Iterator[Row]:
    """The lines of one length."""
    asked = length
    # Off a multiple of the interval: otherwise every step would select.
    length += (length + 1) % args.reuse == 0
    tensors = random_tensors(length, args)
    for name, options in VARIANTS.items():
        if args.variants and name not in args.variants:
            continue
        case = make_case(length, args, options, tensors)
        error = error_of(case)
        if not error <= 1e-4:
            reason = f"check failed: error {error:.1e}"
            yield Row(f"{asked} {name}", f"{length:>7} {name:>20}  {reason}, no speed", problem=reason)
            continue
        functions = {"dense": lambda c=case: dense_step(c), "select": lambda c=case: c.step(True)}
        functions["reuse"] = lambda c=case: c.step(False)
        times = interleaved(functions, repeats=args.repeats)
        interval = args.reuse
        mean = Timing(
            tuple(
                (s + r * (interval - 1)) / interval
                for s, r in zip(times["select"].samples, times["reuse"].samples, strict=True)
            )
        )
        share = (times["select"].median - times["reuse"].median) / interval / mean.median
        held = case.store.bytes()
        total = held["data"] + held["scales"] + held["zeros"] + held["statistics"] + held["streaming"]
        ratio = paired_ratio(times["dense"], mean)
        line = (
            f"{length:>7} {name:>20} {times['dense'].median * 1e3:>9.2f} {times['select'].median * 1e3:>9.2f} "
            f"{times['reuse'].median * 1e3:>9.2f} {mean.median * 1e3:>9.2f} {ratio:>7.2f} "
            f"{share:>8.1%} {total / 1e6:>8.1f}"
        )
        yield Row(f"{asked} {name}", line, {"speed-up": ratio, "selector": share}, times["dense"].spread)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--streaming", type=float, default=0.5, help="share of streaming heads")
    parser.add_argument("--page", type=int, default=64)
    parser.add_argument("--logical", type=int, default=16)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--reuse", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, float32, {args.threads} thread(s), Hq={args.heads}, Hkv={args.kv_heads}, "
        f"D={args.head_dim}, {args.streaming:.0%} streaming, pages {args.page}/{args.logical}, budget {args.budget}, "
        f"reuse {args.reuse}, median of {args.repeats}; {machine_load()}"
    )
    print(
        f"{'N':>7} {'variant':>20} {'dense ms':>9} {'select ms':>9} {'reuse ms':>9} {'mean ms':>9} {'x dense':>7} "
        f"{'selector':>8} {'cache MB':>8}"
    )
    with torch.inference_mode():
        rows = [show(row) for length in args.lengths for row in run_length(length, args)]
    print(machine_load())
    return rows


if __name__ == "__main__":
    main()
