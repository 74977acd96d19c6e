"""Columns of the compatibility table: what a user does with a model, as a function of the model alone.

A mode runs once on transformers' own attention and once on ours; `table.run_cell` compares what it returns.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import hf_attn
from hf_attn.ops import path_counts, reset_path_counts
from tests.compatibility.families import ATTENTION_DROPOUT, IMAGE_TOKEN, VOCAB, Family, Host

PROMPT = 14
PADDED = 3  # tokens of row 0 that are padding
Results = dict[str, Tensor]


@dataclass
class Subject:
    """A model in a mode: `name` is what it is built with, a mechanism's string or the reference; `model` what ran."""

    family: Family
    host: Host
    model: PreTrainedModel
    name: str
    mechanism: str | None = None
    options: dict[str, Any] | None = None

    def inputs(self, padding: str | None = None, batch: int = 2) -> dict[str, Any]:
        """The prompt, with the padding mask of a side where the model takes one."""
        ids = torch.randint(3, VOCAB - 4, (batch, PROMPT), generator=torch.Generator().manual_seed(2))
        mask = self.mask(padding)
        if mask is not None and mask.shape[1] == PROMPT:
            ids = ids.masked_fill(mask == 0, 0)
        given = self.family.inputs(ids)
        return given if mask is None else {**given, self.host.mask: mask}

    def mask(self, padding: str | None) -> Tensor | None:
        if padding is None or self.host.mask is None:
            return None
        mask = torch.ones(2, PROMPT if self.has_tokens else 17, dtype=torch.long)
        mask[0, slice(0, PADDED) if padding == "left" else slice(-PADDED, None)] = 0
        return mask

    @property
    def has_tokens(self) -> bool:
        return self.host.tokens in self.host.arguments

    def real(self, output: Tensor, padding: str | None) -> Tensor:
        """The outputs at real tokens: those at padding mean nothing."""
        mask = self.mask(padding)
        return output[mask.bool()] if mask is not None and output.shape[:2] == mask.shape else output


def output_of(out: Any) -> Tensor:
    """Logits, or hidden states of models that have none; image encoders give them all."""
    return out.logits if "logits" in out else out.last_hidden_state


def prefill(padding: str | None) -> Callable[[Subject], Results]:
    @torch.no_grad()
    def run(subject: Subject) -> Results:
        out = output_of(subject.model(**subject.inputs(padding)))
        return {"output": subject.real(out, padding)}

    return run


def _packed(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def _tokens_only(subject: Subject) -> dict[str, Any]:
    """One row of text: images do not go into packed rows."""
    given = subject.inputs(batch=1)
    if "pixel_values" in given:
        generator = torch.Generator().manual_seed(2)
        return {"input_ids": torch.randint(3, VOCAB - 4, (1, PROMPT), generator=generator)}
    return given


@torch.no_grad()
def packed_positions(subject: Subject) -> Results:
    """Position ids that restart, no cache: transformers makes sequences of them."""
    no_cache = {"use_cache": False} if subject.host.cache else {}
    options = {subject.host.positions: _packed([6, 8]), **no_cache}
    return {"output": output_of(subject.model(**_tokens_only(subject), **options))}


@torch.no_grad()
def cu_seq_lens(subject: Subject) -> Results:
    """As the flattening collator names them."""
    cu = torch.tensor([0, 6, PROMPT], dtype=torch.int32)
    options = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 8, "max_length_k": 8}
    positions = {subject.host.positions: _packed([6, 8])}
    return {"output": output_of(subject.model(**_tokens_only(subject), **positions, **options))}


@torch.no_grad()
def separate_sequences(subject: Subject) -> Results:
    """What `cu_seq_lens` means: every sequence alone."""
    given, tokens = _tokens_only(subject), subject.host.tokens
    parts = [subject.model(**{**given, tokens: part}) for part in given[tokens].split([6, 8], 1)]
    return {"output": torch.cat([output_of(part) for part in parts], 1)}


# Only the first call of a cached text sees these.
_FIRST_ONLY = {"pixel_values", "image_grid_thw", "token_type_ids", "mm_token_type_ids", "input_features"}


def in_steps(borders: list[int], padding: str | None) -> Callable[[Subject], Results]:
    """The prompt in several calls behind the cache that the model makes itself."""

    @torch.no_grad()
    def run(subject: Subject) -> Results:
        host, given, found, last = subject.host, subject.inputs(padding), [], {}
        for start, end in zip([0, *borders], [*borders, PROMPT], strict=True):
            part = given if not last else {k: v for k, v in given.items() if k not in _FIRST_ONLY}
            part = {k: _columns(k, v, start, end, host) for k, v in part.items()} | last
            if "encoder_outputs" in last and host.tokens != "input_ids":
                part.pop("input_ids", None)
            out = subject.model(**part, use_cache=True)
            last = {host.cache: out[host.cache]}
            if "encoder_last_hidden_state" in out:
                last["encoder_outputs"] = BaseModelOutput(out.encoder_last_hidden_state)
            found.append(output_of(out))
        return {"output": subject.real(torch.cat(found, 1), padding)}

    return run


def _columns(key: str, value: Any, start: int, end: int, host: Host) -> Any:
    """The part of an input that belongs to tokens start to end; masks always start at the first token."""
    if key == host.mask:
        return value[:, :end]
    return value[:, start:end] if key in (host.tokens, "token_type_ids", "mm_token_type_ids") else value


def generate(**options: Any) -> Callable[[Subject], Results]:
    """A left-padded batch through `generate`: the tokens, and the logits of every step."""

    def run(subject: Subject) -> Results:
        given = subject.inputs("left" if subject.host.tokens == "input_ids" else None)
        given.pop("decoder_input_ids", None)
        images = {"suppress_tokens": [95, 96, 97, IMAGE_TOKEN]} if subject.family.multimodal else {}
        torch.manual_seed(7)
        out = GenerationMixin.generate(
            subject.model,
            **given,
            **{"do_sample": False, "max_new_tokens": 6, **images, **options},
            output_logits=True,
            return_dict_in_generate=True,
        )
        return {"tokens": out.sequences, "output": torch.stack(out.logits)}

    return run


def train(checkpointing: bool) -> Callable[[Subject], Results]:
    """Loss and all gradients of one step on a padded batch."""

    def run(subject: Subject) -> Results:
        model = subject.model.train()
        _set_checkpointing(model, checkpointing)
        try:
            loss = _loss(subject)
            loss.backward()
            gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
            return {"loss": loss.detach(), **gradients}
        finally:
            _set_checkpointing(model, False)
            model.zero_grad(set_to_none=True)
            model.eval()

    return run


def _set_checkpointing(model: PreTrainedModel, on: bool) -> None:
    if on and hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()


def _loss(subject: Subject) -> Tensor:
    given = subject.inputs("left")
    if "labels" not in subject.host.arguments:
        return subject.real(output_of(subject.model(**given)), "left").square().mean()
    if not subject.has_tokens:
        return subject.model(**given, labels=torch.tensor([0, 1])).loss
    labels = given[subject.host.tokens]
    mask = subject.mask("left")
    labels = labels if mask is None else labels.masked_fill(mask == 0, -100)
    cache = {"use_cache": False} if subject.host.cache else {}
    return subject.model(**given, labels=labels, **cache).loss


@torch.no_grad()
def bfloat16(subject: Subject) -> Results:
    subject.model = copy.deepcopy(subject.model).bfloat16()
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in subject.inputs().items()}
    return {"output": output_of(subject.model(**given)).float()}


@torch.no_grad()
def compiled(subject: Subject) -> Results:
    """fullgraph, a padded batch; calls inside graphs are not in `stats`, so a plain call beside it must do the same."""
    given, no_cache = subject.inputs("left"), {"use_cache": False} if subject.host.cache else {}
    reset_path_counts()
    subject.model(**given, **no_cache)
    plain = path_counts()
    torch._dynamo.reset()
    graph = torch.compile(subject.model, fullgraph=True, backend="eager")
    reset_path_counts()
    out = output_of(graph(**given, **no_cache))
    assert path_counts() == plain, f"compiled {path_counts()}, not compiled {plain}"
    return {"output": subject.real(out, "left")}


@torch.no_grad()
def saved(subject: Subject) -> Results:
    """`hf_attn.apply`, save_pretrained, from_pretrained: the loaded model runs the mechanism by itself."""
    model = subject.model
    if subject.mechanism is not None:
        model = subject.family.build(subject.family.reference)
        targets = subject.family.targets or tuple(model.config.sub_configs)
        options = {**subject.options, **({"targets": list(targets)} if targets else {})}
        hf_attn.apply(model, subject.mechanism, **options)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            subject.model = model = type(model).from_pretrained(folder)
    return {"output": output_of(model(**subject.inputs()))}


@torch.no_grad()
def user_mask(subject: Subject) -> Results:
    """A 4-D mask of the user's own: causal, but one more key is hidden."""
    size = PROMPT if subject.has_tokens else 17
    mask = torch.ones(size, size, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    mask[:, :, 7, 2] = False
    return {"output": output_of(subject.model(**{**subject.inputs(), subject.host.mask: mask}))}


@torch.no_grad()
def with_attentions(subject: Subject) -> Results:
    out = subject.model(**subject.inputs(), output_attentions=True)
    weights = [value for key in ("attentions", "decoder_attentions") if (value := getattr(out, key, None))]
    return {"output": output_of(out), **{f"weights {i}": w for i, w in enumerate(t for v in weights for t in v)}}


def dropout_in_training(subject: Subject) -> Results:
    """Random by nature, so it can only be refused; the reference is a plain forward."""
    if subject.mechanism is not None:
        subject.model = subject.family.build(subject.family.implementation(subject.name), dropout=0.1).train()
    return {"output": output_of(subject.model(**subject.inputs()))}


def lacks(subject: Subject, need: str) -> str | None:
    """Why transformers itself has no such mode for this model, read from the model; `None` when it has."""
    host = subject.host
    config = subject.model.config
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    return {
        "mask": None if host.mask else "its forward takes no padding mask",
        "positions": None if host.positions else "its forward takes no position ids for its tokens",
        "cache": None if host.cache else "its forward takes no cache",
        "generate": None if host.generates else "it cannot generate",
        "checkpointing": None if host.checkpoints else "it has no gradient checkpointing",
        "dropout": None
        if any(hasattr(part, option) for part in parts for option in ATTENTION_DROPOUT)
        else "its config has no attention dropout",
    }[need]


@dataclass(frozen=True)
class Mode:
    """One column.

    Args:
        group: its table; name: its head there; about: what it is, for the list above the tables.
        run: what happens, on any model.
        needs: what the host must offer, see `lacks`.
        reference: what runs on transformers' own attention instead of `run`.
        judge: how results are compared: "close", "bf16" (error budget against float32) or "training" (twice the
            difference between sdpa and eager).
        text_only: multimodal models get no image, so that only their text model is called.
    """

    group: str
    name: str
    about: str
    run: Callable[[Subject], Results]
    needs: tuple[str, ...] = ()
    reference: Callable[[Subject], Results] | None = None
    judge: str = "close"
    text_only: bool = False

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


FORWARD, GENERATION, TRAINING = "One forward", "Caches and generation", "Training"
GROUPS = (FORWARD, GENERATION, TRAINING)

MODES = [
    Mode(FORWARD, "forward", "a plain forward of two rows", prefill(None)),
    Mode(FORWARD, "left padding", "row 0 padded at the left", prefill("left"), ("mask",)),
    Mode(FORWARD, "right padding", "row 0 padded at the right", prefill("right"), ("mask",)),
    Mode(FORWARD, "packed", "position ids that restart, `use_cache=False`", packed_positions, ("positions",),
         text_only=True),
    Mode(FORWARD, "cu_seq_lens", "packed rows named by `cu_seq_lens_q`; compared with each sequence alone", cu_seq_lens,
         ("positions",), separate_sequences, text_only=True),
    Mode(FORWARD, "bf16", "bfloat16, within twice the error of transformers' own", bfloat16, judge="bf16"),
    Mode(FORWARD, "compile", "`torch.compile(fullgraph=True)`, padded batch", compiled),
    Mode(FORWARD, "apply, save, load", "`hf_attn.apply`, `save_pretrained`, `from_pretrained`, forward", saved),
    Mode(FORWARD, "4-D mask", "a mask of the user's own", user_mask, ("mask",)),
    Mode(FORWARD, "output_attentions", "`model(..., output_attentions=True)`; right: the model keeps the wish to "
         "itself and returns no weights, as with SDPA", with_attentions),
    Mode(GENERATION, "chunked", "a prompt in three calls behind the model's own cache", in_steps([9, 12], None),
         ("cache",)),
    Mode(GENERATION, "decode", "a left-padded prompt, then token by token", in_steps([11, 12, 13], "left"), ("cache",)),
    Mode(GENERATION, "greedy", "`generate`, left-padded batch; tokens and the logits of every step", generate(),
         ("generate",)),
    Mode(GENERATION, "sampled", "the same with `do_sample=True`, seeded", generate(do_sample=True, top_k=0),
         ("generate",)),
    Mode(GENERATION, "beam", "the same with `num_beams=3`", generate(num_beams=3), ("generate",)),
    Mode(GENERATION, "static", "the same with `cache_implementation='static'`",
         generate(cache_implementation="static"), ("generate",)),
    Mode(GENERATION, "no cache", "the same with `use_cache=False`", generate(use_cache=False), ("generate",)),
    Mode(TRAINING, "train", "loss and gradients of a padded batch, within twice sdpa-vs-eager", train(False),
         judge="training"),
    Mode(TRAINING, "checkpointing", "the same with gradient checkpointing", train(True), ("checkpointing",),
         train(False), judge="training"),
    Mode(TRAINING, "dropout", "attention dropout", dropout_in_training, ("dropout",), prefill(None)),
]  # fmt: skip
