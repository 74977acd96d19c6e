"""What a head contributes, measured on real text: chooses the shared heads and starts the learned router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Ridge of the regression from hidden states to contributions, as a share of the mean squared feature.
RIDGE = 0.1


@dataclass
class LayerMoments:
    """Sums over the tokens of one layer: contributions `[H]`, features x features, features x contributions."""

    contribution: Tensor
    gram: Tensor
    cross: Tensor
    tokens: int = 0


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a decoder or a ViT of transformers by name, in the order of their layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("self_attn", "attention") and hasattr(module, "o_proj")
    }


@torch.no_grad()
def measure_heads(model: nn.Module, rows: Tensor, *, features: bool) -> list[LayerMoments]:
    """Run a decoder of transformers on token ids int64 `[rows, N]`, or a ViT on pixels `[rows, C, H, W]`.

    Returns sums over the tokens for every layer, in fp32.

    The contribution of head i to a token is the length of what it adds, ||H_i W_O^i||. `features` also sums the moments
    of hidden states (and a constant) that `fit_router` needs: `(d + 1)^2` numbers a layer.
    """
    inputs: dict[int, Tensor] = {}
    found: list[LayerMoments] = []
    hooks = []
    for number, attention in enumerate(attentions(model).values()):
        weight = attention.o_proj.weight
        heads, width = weight.shape[1] // attention.head_dim, weight.shape[0]
        sizes = ((heads,), (width + 1, width + 1), (width + 1, heads))
        first, second, third = (weight.new_zeros(size, dtype=torch.float32) for size in sizes)
        found.append(LayerMoments(first, second, third))
        hooks.append(attention.register_forward_pre_hook(_keep_hidden(inputs, number), with_kwargs=True))
        hooks.append(attention.o_proj.register_forward_pre_hook(_add_moments(found[-1], inputs, number, features)))
    try:
        for row in rows.split(1):
            row = row.to(model.device)
            model.base_model(row) if row.is_floating_point() else model.base_model(row, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _keep_hidden(inputs: dict[int, Tensor], number: int) -> Any:
    def keep(module: nn.Module, arguments: tuple, kwargs: dict[str, Any]) -> None:
        inputs[number] = kwargs["hidden_states"] if "hidden_states" in kwargs else arguments[0]

    return keep


def _add_moments(found: LayerMoments, inputs: dict[int, Tensor], number: int, features: bool) -> Any:
    def add(o_proj: nn.Module, arguments: tuple) -> None:
        heads = found.contribution.shape[0]
        weight = o_proj.weight.float().unflatten(1, (heads, -1))
        square = torch.einsum("ohd,ohe->hde", weight, weight)
        out = arguments[0].float().flatten(0, -2).unflatten(-1, (heads, -1))
        length = torch.einsum("thd,hde,the->th", out, square, out).clamp(min=0).sqrt()
        found.contribution += length.sum(0)
        found.tokens += length.shape[0]
        hidden = inputs.pop(number)
        if features:
            hidden = hidden.float().flatten(0, -2)
            hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
            found.gram += hidden.T @ hidden
            found.cross += hidden.T @ length

    return add


def largest_heads(moments: LayerMoments, count: int) -> list[int]:
    """Indices of the `count` heads that contribute most, ascending."""
    return sorted(moments.contribution.topk(count).indices.tolist())


def fit_router(moments: LayerMoments, routed: list[int]) -> tuple[Tensor, Tensor]:
    """Weight `[E, d]` and bias `[E]` whose output ranks the routed heads by contribution: ridge regression.

    Scores are in units of the mean contribution, so that their softmax is neither even nor all on one head.
    """
    gram, cross = moments.gram / moments.tokens, moments.cross[:, routed] / moments.tokens
    ridge = torch.full((gram.shape[0],), RIDGE * float(gram.diagonal()[:-1].mean()), device=gram.device)
    ridge[-1] = 0
    solution = torch.linalg.solve((gram + ridge.diag()).double(), cross.double())
    solution = (solution / cross[-1].double().mean().clamp(min=1e-12)).float()
    return solution[:-1].T.contiguous(), solution[-1].contiguous()
