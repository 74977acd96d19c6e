"""Patterns by name for `hf-attn bench mask`, all of them on block-sparse attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.bench.block_sparse_speed import pattern_of_pairs
from hf_attn.bench.cases import Case, Setting
from hf_attn.bench.levels import Job, Plan, key_row, paths_here
from hf_attn.bench.op_cases import SINKS, of_pattern, random_pattern, window_of
from hf_attn.pattern import BlockPattern

# Tokens with a direction of their own, so that blocks of keys differ in what they are worth.
TOPIC = 256


@dataclass(frozen=True)
class Mask:
    """A pattern of a setting, or a rule that chooses one from query and key."""

    pattern: Callable[[Setting], BlockPattern] | None = None
    select: Callable[[Setting], Callable[[Tensor, Tensor], BlockPattern]] | None = None
    causal: bool = True


def sizes_of(setting: Setting) -> dict[str, int]:
    return {
        "block_q": setting.block, "block_k": setting.block, "q_len": setting.shape.q_len, "k_len": setting.length,
    }  # fmt: skip


def _named(name: str, *arguments: int, setting: Setting) -> BlockPattern:
    return getattr(BlockPattern, name)(*arguments, **sizes_of(setting), device=setting.shape.device)


def window(setting: Setting) -> BlockPattern:
    """Blocks of a causal window; whole blocks are read, so a little more than asked for."""
    return _named("window", window_of(setting), setting=setting)


def sinks_and_window(setting: Setting) -> BlockPattern:
    return window(setting) | _named("prefix", SINKS, setting=setting)


def strided(setting: Setting) -> BlockPattern:
    """Every n-th block and the own one, n the inverse of the density."""
    pattern = _named("causal_blocks", setting=setting)
    step, count = max(1, round(1 / setting.density)), pattern.num_k_blocks
    own, other = (torch.arange(count, device=setting.shape.device)[at] for at in ((slice(None), None), (None,)))
    mask = (other <= own) & ((own - other) % step == 0)
    return BlockPattern.from_dense(mask[None, None], **sizes_of(setting))


def documents(setting: Setting) -> BlockPattern:
    """Packed documents of equal length, a share of the tokens each."""
    blocks = -(-setting.length // setting.block)
    number = torch.arange(blocks, device=setting.shape.device) // max(1, round(setting.density * blocks))
    mask = (number[:, None] == number) & torch.ones(blocks, blocks, dtype=torch.bool, device=number.device).tril()
    return BlockPattern.from_dense(mask[None, None], **sizes_of(setting))


def shared_random(setting: Setting) -> BlockPattern:
    """One list of random blocks for all heads."""
    blocks = -(-setting.length // setting.block)
    indices = pattern_of_pairs(1, blocks, setting.density, setting.generator())
    return BlockPattern(indices.to(setting.shape.device), **sizes_of(setting))


def _rule(name: str, setting: Setting) -> Callable[[Tensor, Tensor], BlockPattern]:
    """`select_blocks` by a rule: of "top_k" the share, of "threshold" and "cumulative" a fixed amount."""
    amount = {"top_k": setting.density, "threshold": 0.01, "cumulative": 0.5}[name]
    return partial(ops.select_blocks, block_q=setting.block, block_k=setting.block, local=1, **{name: amount})


MASKS = {
    "causal": Mask(lambda setting: _named("causal_blocks", setting=setting)),
    "window": Mask(window),
    "sinks+window": Mask(sinks_and_window),
    "strided": Mask(strided),
    "documents": Mask(documents),
    "random": Mask(random_pattern),
    "shared-random": Mask(shared_random),
    "bidirectional": Mask(partial(random_pattern, causal=False), causal=False),
    "top-k": Mask(select=partial(_rule, "top_k")),
    "threshold": Mask(select=partial(_rule, "threshold")),
    "cumulative": Mask(select=partial(_rule, "cumulative")),
}


def build(mask: Mask, setting: Setting) -> Case:
    """Block-sparse attention on a mask; where a rule chooses, query and key have topics."""
    if mask.pattern is not None:
        return of_pattern(setting, mask.pattern(setting), causal=mask.causal)
    rule, tensors = mask.select(setting), with_topics(setting)
    return of_pattern(setting, rule(*tensors[:2]), causal=mask.causal, select=rule, tensors=tensors)


def with_topics(setting: Setting) -> tuple[Tensor, ...]:
    """Query, key and value; queries and keys share a direction in every run of `TOPIC` tokens."""
    query, key, value = setting.shape.tensors()
    count = -(-setting.length // TOPIC)
    topics = torch.randn(1, 1, count, setting.shape.head_dim, generator=setting.generator())
    topics = topics.repeat_interleave(TOPIC, 2)[:, :, : setting.length].to(query)
    return query + topics, key + topics, value


def mask_jobs(names: Iterable[str], plan: Plan) -> list[Job]:
    """Jobs of masks, short lengths first; masks have no decoding step. Raises ValueError for an unknown name."""
    names = list(names) or list(MASKS)
    for name in names:
        if name not in MASKS:
            raise ValueError(f"no pattern is called {name!r}; there are {', '.join(MASKS)}")
    variants = {path: (path, None) for path in plan.paths or paths_here(plan.device)}
    jobs = []
    for length in plan.lengths:
        for name in names:
            for dtype in plan.dtypes:
                for density in plan.densities:
                    for kind in (p for p in plan.passes if p != "decode"):
                        setting = plan.setting(dtype, length, density, False)
                        row = key_row("mask", name, plan, setting, dtype, kind)
                        jobs.append(Job(row, variants, partial(build, MASKS[name], setting)))
    return jobs
