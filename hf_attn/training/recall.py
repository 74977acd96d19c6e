"""Key-value pairs, a stretch of filler, and questions: what a model still knows when nothing can look back that far."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_attn.checks import require_int
from hf_attn.nn.neural_memory import NeuralMemory
from hf_attn.training.data import IGNORED


@dataclass(frozen=True)
class RecallRows:
    """Rows `key value key value ... filler ... key value ...`: all pairs, `distance` tokens of filler, all pairs again
    in another order, whose values are to be predicted.

    Ids: 0 padding, then keys, values and filler letters.

    Args:
        pairs: key-value pairs a row, >= 1; keys differ within a row, values may repeat.
        keys, values, filler: how many of each there are; `keys >= pairs`.
    """

    pairs: int = 8
    keys: int = 32
    values: int = 32
    filler: int = 16

    padding = 0

    def __post_init__(self) -> None:
        for name in ("pairs", "keys", "values", "filler"):
            require_int(name, getattr(self, name), 1)
        if self.keys < self.pairs:
            raise ValueError(f"keys={self.keys} must be at least pairs={self.pairs}: keys of a row differ")

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return 1 + self.keys + self.values + self.filler

    def rows(self, count: int, distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids int64 `[count, 4 * pairs + distance]`, and labels: the value of every question, IGNORED elsewhere."""
        require_int("distance", distance, 0)
        shape = count, self.pairs
        keys = 1 + torch.rand(count, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values = 1 + self.keys + torch.randint(self.values, shape, generator=generator)
        first = 1 + self.keys + self.values
        filler = first + torch.randint(self.filler, (count, distance), generator=generator)
        order = torch.rand(shape, generator=generator).argsort(1)
        told = torch.stack([keys, values], 2).flatten(1)
        asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
        ids = torch.cat([told, filler, asked], 1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, -2 * self.pairs + 1 :: 2] = asked[:, 1::2]
        return ids, labels


@torch.no_grad()
def recall_accuracy(model: nn.Module, ids: Tensor, labels: Tensor, *, batch: int = 64) -> float:
    """Share of labelled tokens that `model` ranks first, given all tokens before them."""
    training, right, total = model.training, 0, 0
    model.eval()
    for rows, wanted in zip(ids.split(batch), labels.split(batch), strict=True):
        guess = model(input_ids=rows, use_cache=False).logits[:, :-1].argmax(-1)
        asked = wanted[:, 1:] != IGNORED
        right += int((guess[asked] == wanted[:, 1:][asked]).sum())
        total += int(asked.sum())
    model.train(training)
    return right / total


@torch.no_grad()
def open_gates(
    model: nn.Module, *, gate: float = 2.0, memory_norm: float = 2.0, forgetting: float = -6.0, seed: int = 0
) -> None:
    """Lets what the memories of a new Titans model recall reach its output from the first step on.

    What is read passes a factor SiLU(x W_g), whose sign is random in a new model, another for every token: on average
    nothing arrives, and training stands still until the gates have found a common sign. Here all tokens begin with a
    common direction; the gates open along it, while queries and keys do not see it.

    Args:
        model: a new `TitansForCausalLM`.
        gate: what a gate's input begins with, >= 0.
        memory_norm: weight of the norm of what was recalled: how strongly it gates attention.
        forgetting: bias of alpha before its sigmoid; -6 keeps 78 % of the memory over 100 tokens, -4 keeps 16 %.
    """
    embedding = model.get_input_embeddings().weight
    width = embedding.shape[1]
    common = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)
    common = common.to(embedding)
    embedding.add_(common * embedding.norm(dim=1).mean())
    share = (width / 2) ** 0.5  # of the common direction in a normed token
    for module in model.modules():
        if isinstance(module, NeuralMemory):
            module.alpha_proj.bias.fill_(forgetting)
            module.g_proj.weight.mul_(0.5).add_(gate / share * common)
            for projection in (module.q_proj, module.k_proj):
                projection.weight.sub_((projection.weight @ common)[:, None] * common)
        elif isinstance(getattr(module, "memory_norm", None), nn.Parameter):
            module.memory_norm.fill_(memory_norm)


@contextlib.contextmanager
def silenced_memory(model: nn.Module) -> Iterator[None]:
    """Inside, every memory of `model` contributes 0; raises ValueError when it has none."""
    found = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no neural memory to silence")
    handles = [module.o_proj.register_forward_hook(lambda *call: torch.zeros_like(call[-1])) for module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
