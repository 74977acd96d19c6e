"""Selective attention in plain torch: the chosen tokens of a head are gathered, attended, and put back.

A head's tokens keep their order, so the causal mask among them is the plain one and PyTorch's fused kernel needs
no mask at all: c chosen tokens cost c^2, not N c.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Query rows whose scores the backward holds at a time.
ROWS = 512


def forward(query: Tensor, key: Tensor, value: Tensor, selected: Tensor, causal: bool, scale: float) -> Tensor:
    """Queries of a KV head at its chosen tokens attend to its chosen tokens; other queries give 0.

    Args:
        query, key, value: `[B, Hq, N, D]`, `[B, H, N, D]`, `[B, H, N, Dv]`.
        selected: bool `[B, H, N]`.

    Returns `[B, Hq, N, Dv]`.
    """
    group = query.shape[1] // key.shape[1]
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for row, head, tokens in _chosen(selected):
        heads = slice(head * group, (head + 1) * group)
        parts = _gather(query[row, heads], key[row, head], value[row, head], tokens)
        out[row, heads].index_copy_(1, tokens, _attend(*parts, causal, scale))
    return out


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, selected: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the weights of a head are computed again."""
    group = query.shape[1] // key.shape[1]
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    for row, head, tokens in _chosen(selected):
        heads = slice(head * group, (head + 1) * group)
        parts = _gather(query[row, heads], key[row, head], value[row, head], tokens)
        found = _gradients(grad_out[row, heads].index_select(1, tokens), *parts, causal, scale)
        grads[0][row, heads].index_copy_(1, tokens, found[0])
        grads[1][row, head].index_copy_(0, tokens, found[1])
        grads[2][row, head].index_copy_(0, tokens, found[2])
    return tuple(grads)


def _chosen(selected: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Row, head and chosen tokens in order, for heads that chose any."""
    for row in range(selected.shape[0]):
        for head in range(selected.shape[1]):
            tokens = selected[row, head].nonzero()[:, 0]
            if tokens.numel():
                yield row, head, tokens


def _gather(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[G, c, D]`, `[1, c, D]`, `[1, c, Dv]` of one KV head."""
    return query.index_select(1, tokens), key.index_select(0, tokens)[None], value.index_select(0, tokens)[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    key, value = (t[None].expand(1, query.shape[0], -1, -1) for t in (key, value))
    return scaled_dot_product_attention(query[None], key, value, is_causal=causal, scale=scale)[0]


def _gradients(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one KV head: query `[G, c, D]`, key `[c, D]`, value `[c, Dv]`; runs of query rows bound the scores held."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    count = query.shape[1]
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (torch.zeros(t.shape[1:], dtype=dtype, device=t.device) for t in (key, value))
    key, value = key.to(dtype), value.to(dtype)
    for start in range(0, count, ROWS):
        stop = min(start + ROWS, count)
        seen = stop if causal else count
        q, g = query[:, start:stop].to(dtype), grad_out[:, start:stop].to(dtype)
        k, v = key[:, :seen], value[:, :seen]
        scores = q @ k.mT * scale
        if causal:
            future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu_(1)
            scores[:, :, start:].masked_fill_(future, float("-inf"))
        weights = scores.softmax(-1)
        grad_weights = g @ v.mT
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
        grad_query[:, start:stop] = (grad_scores @ k).to(query.dtype)
        grad_key[:seen] += (grad_scores.mT @ q).sum(0)
        grad_value[:seen] += (weights.mT @ g).sum(0)
    return grad_query, grad_key.to(query.dtype), grad_value.to(query.dtype)
