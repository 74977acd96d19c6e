"""Cases of the softmax ops over sequences of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.bench.block_sparse_speed import pattern_of_pairs
from hf_attn.bench.cases import Case, Op, Setting, causal_rows, reorder, softmax_rows
from hf_attn.bench.runner import backend
from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.mechanisms.psa import PSAConfig, choose_levels
from hf_attn.ops.hfattn_sparse.paged.pages import Pages
from hf_attn.ops.hfattn_sparse.pyramid import reference as pyramid_reference
from hf_attn.ops.hfattn_sparse.routed.layout import Geometry, density
from hf_attn.pattern import BlockPattern

# Sinks of the windowed ops, tokens of a page and of the statistics in it.
SINKS, PAGE, LOGICAL = 16, 64, 16


def of_pattern(
    setting: Setting,
    pattern: BlockPattern,
    *,
    causal: bool,
    select: Callable[[Tensor, Tensor], BlockPattern] | None = None,
    tensors: tuple[Tensor, ...] | None = None,
) -> Case:
    """Block-sparse attention over a pattern; `select` is what would choose one, for its time."""
    query, key, value = tensors = setting.shape.tensors() if tensors is None else tensors
    scale = setting.shape.scale

    def run(*leaves: Tensor) -> Tensor:
        return ops.block_sparse_attention(*leaves, pattern, causal=causal)

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        visible = block_rows(pattern, rows, setting.shape.heads)
        if causal:
            visible = visible & causal_rows(rows + pattern.k_len - pattern.q_len, pattern.k_len)
        return softmax_rows(leaves[0][:, :, rows], *leaves[1:], visible, scale)

    chosen = None if select is None else lambda: select(query, key)
    share = pattern.density(causal=causal)
    return Case(run, tensors, expected, tensors, causal, share, select=chosen, permute=reorder(tensors))


def block_rows(pattern: BlockPattern, rows: Tensor, heads: int) -> Tensor:
    """Which keys query rows see through the blocks of a pattern, bool `[B | 1, heads, R, N]`."""
    blocks = torch.arange(pattern.num_k_blocks, device=rows.device)
    listed = pattern.indices[:, :, rows // pattern.block_q]
    chosen = torch.stack([(one[..., None] == blocks).any(-2) for one in listed.unbind(2)], 2)
    visible = chosen.repeat_interleave(pattern.block_k, -1)[..., : pattern.k_len]
    return visible.repeat_interleave(heads // visible.shape[1], 1)


def random_pattern(setting: Setting, *, causal: bool = True) -> BlockPattern:
    """A share of all blocks at random for every head, in causal attention the diagonal ones among them."""
    shape, block, length = setting.shape, setting.block, setting.length
    sizes = {"block_q": 1 if setting.decode else block, "block_k": block, "q_len": shape.q_len, "k_len": length}
    blocks = -(-length // block)
    if setting.decode or not causal:
        rows = 1 if setting.decode else blocks
        count = max(1, round(setting.density * blocks))
        lists = torch.rand(1, shape.heads, rows, blocks, generator=setting.generator())
        lists[..., -1] = 2
        return BlockPattern.from_indices(lists.topk(count, -1).indices.to(shape.device), **sizes)
    indices = pattern_of_pairs(shape.heads, blocks, setting.density, setting.generator())
    return BlockPattern(indices.to(shape.device), **sizes)


def block_sparse(setting: Setting) -> Case:
    sizes = {"block_q": 1 if setting.decode else setting.block, "block_k": setting.block}
    select = partial(ops.select_blocks, top_k=setting.density, local=1, **sizes)
    return of_pattern(setting, random_pattern(setting), causal=True, select=select)


def routed(setting: Setting) -> Case:
    """Routes of MoBA: mean key . query, the own block always."""
    tensors = query, key, _ = setting.shape.tensors()
    length, block = setting.length, min(setting.block, setting.length)
    # A row sees half of the blocks on average.
    average = -(-length // block) if setting.decode else (length / block + 1) / 2
    select = partial(ops.select_routes, query, key, block_size=block, top_k=max(1, round(setting.density * average)))
    routes = select()

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        listed = routes[:, :, rows]
        blocks = torch.arange(-(-length // block), device=rows.device)
        chosen = (listed[..., None] == blocks).any(-2).repeat_interleave(block, -1)[..., :length]
        visible = chosen & causal_rows(rows + length - setting.shape.q_len, length)
        return softmax_rows(leaves[0][:, :, rows], *leaves[1:], visible, setting.shape.scale)

    share = density(routes, Geometry(setting.shape.q_len, length, block, True))
    return Case(
        partial(_routed, routes=routes, block_size=block), tensors, expected, tensors, True, share, select=select
    )


def _routed(*leaves: Tensor, routes: Tensor, block_size: int) -> Tensor:
    return ops.routed_block_attention(*leaves, routes, block_size=block_size)


def head_routed(setting: Setting) -> Case:
    """Every (head, token) pair computes with the same chance."""
    tensors = setting.shape.tensors()
    shape, length = setting.shape, setting.length
    heads = torch.rand(1, shape.heads, shape.q_len, generator=setting.generator()).to(shape.device) < setting.density
    heads[:, :1, :1] = True

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        visible = causal_rows(rows + length - shape.q_len, length) & heads[:, :, rows, None]
        return softmax_rows(leaves[0][:, :, rows], *leaves[1:], visible, shape.scale)

    pairs = torch.arange(length - shape.q_len + 1, length + 1, device=shape.device, dtype=torch.float64)
    share = float((heads * pairs).sum() / (pairs.sum() * shape.heads))
    return Case(lambda *x: ops.head_routed_attention(*x, heads), tensors, expected, tensors, True, share)


def selective(setting: Setting) -> Case:
    """KV heads that choose tokens; c chosen tokens of N cost (c / N)^2 of the pairs."""
    tensors, length = setting.shape.tensors(), setting.length
    shape = setting.shape
    count = max(1, round(setting.density**0.5 * length))
    ranks = torch.rand(1, shape.kv_heads, length, generator=setting.generator()).argsort(-1).argsort(-1)
    selected = (ranks < count).to(shape.device)
    wide = selected.repeat_interleave(shape.heads // shape.kv_heads, 1)

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        visible = causal_rows(rows, length) & wide[:, :, None] & wide[:, :, rows, None]
        return softmax_rows(leaves[0][:, :, rows], *leaves[1:], visible, shape.scale)

    share = count * (count + 1) / (length * (length + 1))
    return Case(lambda *x: ops.selective_attention(*x, selected), tensors, expected, tensors, True, share)


def window_of(setting: Setting) -> int:
    """Tokens of a causal window that holds the asked share of the pairs."""
    share = setting.density if setting.decode else 1 - (1 - setting.density) ** 0.5
    return max(1, round(share * setting.length) - (SINKS if setting.decode else 0))


def window_rows(setting: Setting, rows: Tensor, sinks: int, window: int) -> Tensor:
    """Which keys a window and the sinks let query rows see, bool `[1, 1, R, N]`."""
    rows = rows + setting.length - setting.shape.q_len
    keys = torch.arange(setting.length, device=rows.device)
    return causal_rows(rows, setting.length) & ((keys < sinks) | (keys > rows[:, None] - window))


def windowed(setting: Setting) -> Case:
    tensors, window = setting.shape.tensors(), window_of(setting)

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        visible = window_rows(setting, rows, SINKS, window)
        return softmax_rows(leaves[0][:, :, rows], *leaves[1:], visible, setting.shape.scale)

    run = partial(_windowed, window=window)
    return Case(run, tensors, expected, tensors, True, window_density(setting, SINKS, window))


def _windowed(*leaves: Tensor, window: int) -> Tensor:
    return ops.sink_window_attention(*leaves, sinks=SINKS, window=window)


def window_density(setting: Setting, sinks: int, window: int) -> float:
    """Share of the causal pairs in a window and behind the sinks."""
    seen = torch.arange(setting.length - setting.shape.q_len + 1, setting.length + 1, dtype=torch.float64)
    return float(torch.minimum(seen, seen.clamp(max=window) + (seen - window).clamp(0, sinks)).sum() / seen.sum())


def gated(setting: Setting) -> Case:
    """Both branches are computed: it cannot be faster than dense attention."""
    query, key, value = setting.shape.tensors()
    window, shape = window_of(setting), setting.shape
    alpha = torch.rand(shape.kv_heads, generator=setting.generator()).to(shape.device, shape.dtype)

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        gate = leaves[3].repeat_interleave(shape.heads // shape.kv_heads)[:, None, None]
        masks = causal_rows(rows, setting.length), window_rows(setting, rows, SINKS, window)
        full, near = (softmax_rows(leaves[0][:, :, rows], *leaves[1:3], mask, shape.scale) for mask in masks)
        return gate * full + (1 - gate) * near

    def run(*leaves: Tensor) -> Tensor:
        return ops.gated_streaming_attention(*leaves, sinks=SINKS, window=window)

    return Case(run, (query, key, value, alpha), expected, (query, key, value))


def grouped(setting: Setting) -> Case:
    """Landmark attention; the own block and the landmarks of earlier ones take part in the first softmax."""
    tensors, block = setting.shape.tensors(), min(setting.block, 64)
    rows = torch.arange(min(setting.length, 4 * block), device=setting.shape.device)

    def run(*leaves: Tensor) -> Tensor:
        return ops.grouped_softmax_attention(*leaves, block_size=block)

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        with backend("reference"):
            return run(*(x[:, :, : len(rows)] for x in leaves))

    return Case(run, tensors, expected, tensors, rows=rows)


def documents(setting: Setting) -> Case:
    """BlockRank: documents see the prefix and themselves, the reader behind them sees everything."""
    tensors, length, device = setting.shape.tensors(), setting.length, setting.shape.device
    size = max(1, min(length // 3, round(setting.density * length / 2)))
    count = max(3, length // size)
    ids = (torch.arange(length) // size).clamp(max=count - 1).to(device)
    tokens = TokenLayout.documents(ids[None])

    def visible(rows: Tensor) -> Tensor:
        own = ids[rows, None]
        return causal_rows(rows, length) & ((ids == own) | (ids == 0) | (own == ids[-1]))

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        return softmax_rows(leaves[0][:, :, rows], *leaves[1:], visible(rows), setting.shape.scale)

    def run(*leaves: Tensor) -> Tensor:
        return ops.document_attention(*leaves, tokens=tokens)

    lengths = torch.bincount(ids).double()
    within = (lengths * (lengths + 1) / 2).sum()
    others = lengths[0] * lengths[1:-1].sum() + lengths[-1] * lengths[:-1].sum()
    share = float((within + others) / (length * (length + 1) / 2))
    return Case(run, tensors, expected, tensors, True, share)


def pyramid(setting: Setting) -> Case:
    """PSA: pooled keys, levels from sampled importance; bidirectional."""
    tensors = setting.shape.tensors()
    length, block = setting.length, min(setting.block, setting.length // 2)
    call = AttentionCall(*tensors, setting.shape.scale, False, TokenLayout.full(1, length))
    config = PSAConfig(
        density=setting.density, min_tokens=0, text_length=0, similarity=None, block_size=block, dense_steps=0
    )
    select = partial(choose_levels, call, config)
    levels = select()
    sizes = {"block_q": config.block_size, "block_k": config.keys_per_block}
    chosen = sorted({0, levels.shape[2] // 2, levels.shape[2] - 1})
    rows = torch.cat([torch.arange(b * block, min((b + 1) * block, length)) for b in chosen]).to(setting.shape.device)

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        found = []
        for number in chosen:
            some = leaves[0][:, :, number * block : (number + 1) * block], *leaves[1:]
            one = levels[:, :, number : number + 1]
            options = {"causal": False, "scale": setting.shape.scale, "tail": "replicate", **sizes}
            found.append(pyramid_reference.forward(*some, one, **options)[0])
        return torch.cat(found, 2)

    def run(*leaves: Tensor) -> Tensor:
        return ops.pyramid_attention(*leaves, levels, **sizes)

    computed, visible = ops.pyramid_pairs(levels, causal=False, tokens=call.tokens, **sizes)
    return Case(
        run, tensors, expected, tensors, False, float(computed / visible), rows=rows, select=select,
        permute=reorder(tensors),
    )  # fmt: skip


def quantized(setting: Setting) -> Case:
    """PAROAttention's INT8 q k^T over a bidirectional pattern, without gradients."""
    tensors, pattern = setting.shape.tensors(), random_pattern(setting, causal=False)

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        visible = block_rows(pattern, rows, setting.shape.heads)
        return softmax_rows(leaves[0][:, :, rows], *leaves[1:], visible, setting.shape.scale)

    def run(*leaves: Tensor) -> Tensor:
        return ops.quantized_block_attention(*leaves, pattern, qk_bits=8)

    return Case(
        run, tensors, expected, tensors, False, pattern.density(), tolerance=0.02, permute=reorder(tensors)
    )  # fmt: skip


def paged(setting: Setting) -> Case:
    """LServe's decoding step: the best pages of every query head by Quest's bound, and attention to them."""
    shape, length = setting.shape, setting.length - setting.length % PAGE
    query, key, value = setting.shape.tensors()
    key, value = key[:, :, :length].contiguous(), value[:, :, :length].contiguous()
    stored = [Pages(x.unflatten(2, (-1, PAGE))) for x in (key, value)]
    statistics = ops.page_statistics(key, page_size=PAGE, logical_page_size=LOGICAL)[0]
    last = torch.full((1,), length // PAGE - 1, device=shape.device)
    count = max(1, round(setting.density * length / PAGE)) - 1

    def select() -> Tensor:
        chosen = ops.select_pages(ops.page_scores(query[:, :, 0], statistics), last, count=count)
        return torch.cat([chosen, last.expand(1, shape.heads, 1)], -1)

    pages, tokens = select(), torch.full((1,), length, device=shape.device)

    def run(*leaves: Tensor) -> Tensor:
        return ops.paged_attention(leaves[0][:, :, 0], *stored, pages, length=tokens)[:, :, None]

    def expected(rows: Tensor, *leaves: Tensor) -> Tensor:
        listed = (pages[..., None] == torch.arange(length // PAGE, device=shape.device)).any(-2)
        visible = listed.repeat_interleave(PAGE, -1)[:, :, None]
        return softmax_rows(leaves[0], key.to(leaves[0].dtype), value.to(leaves[0].dtype), visible, shape.scale)

    share = pages.shape[-1] * PAGE / length
    return Case(run, (query,), expected, (query, key, value), False, share, select=select)


ALL = ("forward", "backward", "decode")
OPS = {
    "block_sparse_attention": Op(block_sparse, ALL),
    "routed_block_attention": Op(routed, ALL),
    "head_routed_attention": Op(head_routed, ALL),
    "selective_attention": Op(selective),
    "sink_window_attention": Op(windowed, ALL),
    "gated_streaming_attention": Op(gated),
    "grouped_softmax_attention": Op(grouped, dense=False),
    "document_attention": Op(documents),
    "pyramid_attention": Op(pyramid),
    "quantized_block_attention": Op(quantized, ("forward",)),
    "paged_attention": Op(paged, ("decode",)),
}
