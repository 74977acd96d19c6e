"""Whole models with a mechanism against the same weights without it: the level `model` of `hf-attn bench`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import hf_attn
from hf_attn.bench.cases import Checked
from hf_attn.bench.levels import DTYPES, Plan, figures_row, judged
from hf_attn.bench.models import load_language_model
from hf_attn.bench.record import Row, Store, environment
from hf_attn.bench.runner import Function, backend, measure, peak_memory
from hf_attn.integrations.transformers.cache import cache_argument

# Passes of a language model; a video transformer has one call.
PASSES = ("prefill", "decode", "train")
VIDEO = ("wan", "small")
# Tokens of the check, which forms dense masks, and what is allowed: of fp32, and in the resolution of other dtypes.
CHECKED_TOKENS, TOLERANCE, RESOLUTIONS = 1024, 5e-4, 16.0


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the weights of the model and nothing else."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def checked(model: nn.Module, call: Callable[[nn.Module], Tensor], dtype: torch.dtype, device: str) -> Checked:
    """Largest difference of a result from the same model with every op by its reference, over its largest magnitude.

    The fast path is forced where that is possible: left alone, short prompts go dense.
    """
    with torch.no_grad():
        try:
            with backend("triton" if device.startswith("cuda") else "torch"):
                got = call(model).double()
        except RuntimeError:  # an op without a Triton path
            with backend("auto"):
                got = call(model).double()
        with backend("reference"):
            expected = call(model).double()
    scale = float(expected.abs().max()) or 1.0
    error = float((got - expected).abs().nan_to_num(float("inf")).max()) / scale
    return Checked(error, max(TOLERANCE, RESOLUTIONS * torch.finfo(dtype).eps))


def model_rows(
    name: str | None,
    mechanism: str,
    options: dict[str, Any],
    plan: Plan,
    passes: Sequence[str],
    store: Store,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[Row]:
    """Rows of a model: "wan" or "small", or a causal language model by Hub id, folder or .gguf file (None: SmolLM2).

    What the store has is not measured again. Raises ValueError for an unknown pass or a length the model cannot reach.
    """
    unknown = set(passes) - set(PASSES)
    if unknown:
        raise ValueError(f"a model has the passes {', '.join(PASSES)}, got {', '.join(sorted(unknown))}")
    hf_attn.mechanism.get_mechanism(mechanism)
    video = name in VIDEO
    if video:
        if plan.device != "cpu":
            raise ValueError(f"{name} is timed on a CPU alone; use --device cpu")
        passes = ("call",)
    total, done = len(plan.dtypes) * sum(plan.lengths) * len(passes), 0
    for dtype in plan.dtypes:
        dense = None
        for length in plan.lengths:
            for kind in passes:
                row = _key(name, mechanism, options, plan, dtype, kind, length)
                if not store.has(row):
                    dense = dense or _load(name, DTYPES[dtype], plan.device, max(plan.lengths))
                    found = row | _measured(dense, mechanism, options, plan, length, kind, DTYPES[dtype])
                    store.add(found)
                    yield found
                done += length
                progress(done, total)


def _key(
    name: str | None, mechanism: str, options: dict[str, Any], plan: Plan, dtype: str, kind: str, length: int
) -> Row:
    given = " ".join(f"{key}={value}" for key, value in options.items())
    return environment(plan.device, plan.run) | {
        "level": "model", "name": name or "SmolLM2-135M-Instruct", "variant": mechanism, "dtype": dtype, "pass": kind,
        "length": length, "shape": "B1", "requested": options.get("density", ""), "options": given,
    }  # fmt: skip


def _load(name: str | None, dtype: torch.dtype, device: str, longest: int) -> nn.Module:
    if name in VIDEO:
        from hf_attn.bench.video_speed import wan

        return wan(name).to(dtype)
    model = load_language_model(name, dtype)[0].to(device)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(f"--lengths asks for {longest} tokens, but this model ends at {limit}")
    return model


def _measured(
    dense: nn.Module, mechanism: str, options: dict[str, Any], plan: Plan, length: int, kind: str, dtype: torch.dtype
) -> Row:
    """The cells of one pass; a wrong result has no times."""
    sparse = hf_attn.apply(twin(dense), mechanism, **options)
    if kind == "call":
        make = partial(_video_call, length=length, dtype=dtype)
        call, short = make, None
    else:
        ids = random_ids(dense, length, plan.device)
        make = partial({"prefill": _prefill, "decode": _decode, "train": _train}[kind], ids=ids)
        call, short = partial(_prefill, ids=ids), partial(_prefill, ids=ids[:, :CHECKED_TOKENS])
    verdict = checked(sparse, lambda model: (short or call)(model)(), dtype, plan.device)
    if not verdict.passed:
        return judged(verdict) | {"repeats": plan.repeats}
    for model in (dense, sparse):
        model.train(kind == "train")
    functions: dict[str, Function] = {"dense": make(dense), mechanism: make(sparse)}
    for function in functions.values():
        function()
    # A cache grows from call to call, which a captured graph would not.
    times = measure(functions, plan.device, repeats=plan.repeats, graphs=False)
    density = hf_attn.stats(sparse)["totals"]["density"]
    density = None if density is None else float(density)
    row = figures_row(times[mechanism], times["dense"], "the model's own", density, {})
    row.pop("limit", None)  # a model is more than its attention
    row["peak_mib"], row["dense_peak_mib"] = (
        peak_memory(functions[name], plan.device) / 2**20 for name in (mechanism, "dense")
    )
    dense.eval()
    return row | {"repeats": plan.repeats, "error": verdict.error, "allowed": verdict.allowed}


def random_ids(model: nn.Module, length: int, device: str) -> Tensor:
    """Random tokens `[1, length]`: what a text says does not change what its length costs."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator).to(device)


def _prefill(model: nn.Module, ids: Tensor) -> Function:
    """The body of the model over a prompt, with a cache; gives the hidden states."""

    def run() -> Tensor:
        with torch.inference_mode():
            return model.base_model(input_ids=ids, use_cache=True).last_hidden_state

    return run


def _decode(model: nn.Module, ids: Tensor) -> Function:
    """One token behind a prompt; the cache grows by one token a call, with and without the mechanism alike."""
    with torch.inference_mode():
        result = model.base_model(input_ids=ids, use_cache=True)
    # transformers 5.24 renamed the field and the argument.
    cache = result["cache" if "cache" in result else "past_key_values"]
    argument, token = cache_argument(model), ids[:, -1:]

    def run() -> Tensor:
        with torch.inference_mode():
            return model(input_ids=token, use_cache=True, **{argument: cache}).logits

    return run


def _train(model: nn.Module, ids: Tensor) -> Function:
    """Forward, loss and gradients of all weights, without an optimizer's step."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def _video_call(model: nn.Module, length: int, dtype: torch.dtype) -> Function:
    """One call of a Wan transformer."""
    from hf_attn.bench.video_speed import GRIDS, inputs

    if length not in GRIDS:
        raise ValueError(f"--lengths of a video must be of {', '.join(map(str, GRIDS))}, got {length}")
    latents, step, text = inputs(GRIDS[length])

    def run() -> Tensor:
        with torch.inference_mode():
            return model(latents.to(dtype), step, text.to(dtype)).sample

    return run
