"""Decoding with landmark retrieval against attention to the whole cache, one layer, one new token.

python -m hf_attn.bench.landmark_decode --lengths 4096 16384 32768
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.bench.figures import Row, show
from hf_attn.bench.timing import interleaved, machine_load, paired_ratio
from hf_attn.caches.landmark import LandmarkStore
from hf_attn.mechanisms._landmark import Chunk, Retrieval, Rotary, attend_chunk

FIGURES = ("speed-up",)


def layer(length: int, heads: int, kv_heads: int, dim: int, options: Retrieval) -> tuple[Callable, Callable]:
    """Two functions that attend one new token to `length` cached ones: by retrieval, and by SDPA."""
    key, value = (torch.randn(1, kv_heads, length, dim) for _ in range(2))
    query, new_key, new_value = (torch.randn(1, n, 1, dim) for n in (heads, kv_heads, kv_heads))
    rotary = Rotary(1.0 / 10000.0 ** (torch.arange(0, dim, 2) / dim))
    store = LandmarkStore(options.block_size)
    store.hold(key, value, Chunk([length], length, "cpu"), rotary)
    store.commit()
    one = Chunk([1], 1, "cpu")

    def retrieve() -> torch.Tensor:
        return attend_chunk(query, new_key, new_value, store, one, rotary, options, scale=dim**-0.5)[0]

    def whole() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, enable_gqa=heads != kv_heads)

    return retrieve, whole


def check(options: Retrieval, heads: int, kv_heads: int, dim: int) -> float:
    """Largest difference of retrieving all of few blocks to the dense form: nothing is timed unless it is small."""
    from hf_attn import ops

    length = options.block_size * options.top_k + 7
    key, value = (torch.randn(1, kv_heads, length, dim) for _ in range(2))
    query = torch.randn(1, heads, 1, dim)
    rotary = Rotary(1.0 / 10000.0 ** (torch.arange(0, dim, 2) / dim))
    store = LandmarkStore(options.block_size)
    store.hold(key[:, :, :-1], value[:, :, :-1], Chunk([length - 1], length - 1, "cpu"), rotary)
    store.commit()
    new = key[:, :, -1:], value[:, :, -1:]
    got = attend_chunk(query, *new, store, Chunk([1], 1, "cpu"), rotary, options, scale=dim**-0.5)[0]
    positions = torch.arange(length)
    turned = rotary.rotate(query, positions[-1:]), rotary.rotate(key, positions)
    want = ops.grouped_softmax_attention(*turned, value, block_size=options.block_size)
    return float((got - want).abs().max())


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768], help="cached tokens")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    options = Retrieval(arguments.block_size, arguments.top_k)
    sizes = arguments.heads, arguments.kv_heads, arguments.head_dim
    with torch.inference_mode():
        error = check(options, *sizes)
        if error > 1e-4:
            raise SystemExit(f"retrieval differs from the dense form by {error:.1e}; nothing is timed")
        rows = []
        print(machine_load())
        print("| cached tokens | SDPA ms | retrieval ms | speed-up |\n|---|---|---|---|")
        for length in arguments.lengths:
            retrieve, whole = layer(length, *sizes, options)
            times = interleaved({"retrieval": retrieve, "sdpa": whole}, repeats=arguments.repeats, warmup=3)
            cells = [f"{1000 * times[name].median:.2f}" for name in ("sdpa", "retrieval")]
            ratio = paired_ratio(times["sdpa"], times["retrieval"])
            line = f"| {length} | {' | '.join(cells)} | {ratio:.1f} |"
            rows.append(show(Row(str(length), line, {"speed-up": ratio}, times["sdpa"].spread)))
    return rows


if __name__ == "__main__":
    main()
