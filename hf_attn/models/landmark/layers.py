"""Landmark attention in transformers' decoder models: what every family with it shares.

Three mixins go before a family's own Attention, Model and ForCausalLM; a finished model's parts change class, as the
host's constructors name their own. The base model takes and gives sequences without landmarks: it puts them in, runs
the layers, and takes their rows out again.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaForCausalLM, apply_rotary_pos_emb

from hf_attn import ops
from hf_attn.caches.landmark import LandmarkStore
from hf_attn.call import TokenLayout
from hf_attn.integrations.transformers.cache import cache_argument
from hf_attn.integrations.transformers.landmark_cache import LandmarkCache
from hf_attn.integrations.transformers.stats import stats_of
from hf_attn.mechanisms._landmark import Chunk, Retrieval, Rotary, attend_chunk
from hf_attn.models.checkpoint import CardOnPush
from hf_attn.models.host import HostAttention
from hf_attn.models.key_convolution import neighbours
from hf_attn.models.landmark.configuration_landmark import check, chunk_tokens
from hf_attn.models.landmark.insertion import Expanded, chunks, expand


@dataclass(frozen=True, slots=True)
class DenseStep:
    """A call without cache: every token sees all earlier blocks.

    Args:
        block_size: distance of the landmarks; None when `landmarks` bool `[B, N]` names them.
        tokens: rows, padding and packing; None for full rows of one sequence.
    """

    block_size: int | None
    landmarks: Tensor | None
    tokens: TokenLayout | None


@dataclass(frozen=True, slots=True)
class CachedStep:
    """A chunk behind a cache; `stores` are the layers' shares of it."""

    chunk: Chunk
    stores: list[LandmarkStore]
    rotary: Rotary
    retrieval: Retrieval


class LandmarkAttention(HostAttention):
    """Attention with a grouped softmax, over whole rows or over retrieved blocks and a chunk."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        landmark_step: DenseStep | CachedStep | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the host's; `landmark_step` comes from the base model, padding and caches are in it."""
        if landmark_step is None:
            raise ValueError("a landmark layer runs inside its model, which tells it where landmarks are")
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        out = self._attend(query, key, value, position_embeddings, landmark_step)
        return self.o_proj(out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, rotation: Any, step: DenseStep | CachedStep) -> Tensor:
        stats = None if torch.compiler.is_compiling() else stats_of(self)
        if isinstance(step, DenseStep):
            query, key = apply_rotary_pos_emb(query, key, *rotation)
            if stats is not None:
                stats.begin(query.shape[2], key.shape[2])
                stats.record(path="grouped softmax", reason="no cache: every block is read")
            return ops.grouped_softmax_attention(
                query, key, value, step.landmarks, block_size=step.block_size, scale=self.scaling, tokens=step.tokens
            )
        store = step.stores[self.layer_idx]
        out, counts = attend_chunk(
            query, key, value, store, step.chunk, step.rotary, step.retrieval, scale=self.scaling
        )
        if stats is not None:
            stats.begin(query.shape[2], max(store.lengths, default=0) + query.shape[2])
            stats.record(path="retrieval", counts=counts)
        return out


class LandmarkModel(CardOnPush):
    """The base model: sequences without landmarks in, their hidden states out."""

    attention_class: type

    def __init__(self, config: Any) -> None:
        check(config)
        super().__init__(config)
        self.use_landmarks()

    def use_landmarks(self) -> None:
        """Turn the attention modules into `attention_class`."""
        for layer in self.layers:
            layer.self_attn.__class__ = self.attention_class

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the host's.

        Without a cache every token attends to all earlier blocks (training, short inputs). With one (`use_cache=True`,
        or what `generate` makes) the input is fed in chunks and every query reads `landmark_top_k` blocks.

        Args:
            attention_mask: `[B, past + T]`, 1 = real; padding may stand anywhere and counts for no block.
            position_ids: read for one thing, the borders of packed rows (no mask, no cache); positions are counted here
                as landmarks have one too.

        Raises ValueError for landmarks in the input, inputs_embeds, masks of another kind and caches of others.
        """
        cache = past_key_values if cache is None else cache
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("landmark models take input_ids: landmarks are inserted between tokens, not embeddings")
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() != 2):
            raise ValueError("attention_mask must be [B, past + T] with 1 for real tokens; landmarks need to know them")
        if cache is None and use_cache:
            cache = LandmarkCache(self.config)
        if cache is not None:
            return self._cached(input_ids, attention_mask, cache, kwargs)
        segment = _segments(input_ids, attention_mask, position_ids, kwargs.pop("cu_seq_lens_q", None))
        if not self.config.landmark_insert:
            return self._given(input_ids, segment, kwargs)
        self._refuse_landmarks(input_ids)
        size = self.config.landmark_block_size
        zero = input_ids.new_zeros(input_ids.shape[0])
        full = expand(input_ids, segment, zero, size, self.config.landmark_token_id)
        out = self._layers(full.ids, full.positions, DenseStep(size, None, _layout(full)), kwargs)
        where = full.source[..., None].expand(-1, -1, out.last_hidden_state.shape[-1])
        out.last_hidden_state = out.last_hidden_state.gather(1, where)
        return out

    def _given(self, ids: Tensor, segment: Tensor, kwargs: dict[str, Any]) -> Any:
        """Landmarks are in the input, anywhere."""
        real = segment >= 0
        place = real.cumsum(1) - 1
        starts = real & torch.cat([torch.ones_like(real[:, :1]), segment[:, 1:] != segment[:, :-1]], 1)
        positions = (place - torch.where(starts, place, 0).cummax(1).values).clamp(min=0)
        full = Expanded(ids, positions, segment, positions, real.sum(1).tolist())
        landmarks = (ids == self.config.landmark_token_id) & real
        return self._layers(ids, positions, DenseStep(None, landmarks, _layout(full)), kwargs)

    def _cached(self, ids: Tensor, mask: Tensor | None, cache: Any, kwargs: dict[str, Any]) -> Any:
        """Feed a batch in chunks; every row has its own, and each is what it would be for the row alone."""
        if not isinstance(cache, LandmarkCache):
            raise TypeError(
                f"landmark models need a LandmarkCache, got {type(cache).__name__}; leave the cache out (generate "
                "makes one), or pass hf_attn.integrations.transformers.landmark_cache.LandmarkCache(model.config)"
            )
        if not self.config.landmark_insert:
            raise ValueError("landmark_insert=False runs without a cache; pass use_cache=False, or set it to True")
        self._refuse_landmarks(ids)
        size, chunk = self.config.landmark_block_size, chunk_tokens(self.config)
        segment = _segments(ids, mask, None, None)
        before = torch.tensor(cache.regular_lengths(ids.shape[0]), device=ids.device)
        full = expand(ids, segment, before, size, self.config.landmark_token_id)
        starts = cache.lengths(ids.shape[0])
        plans = [chunks(n, start % size, size, chunk) for n, start in zip(full.lengths, starts, strict=True)]
        out, hidden, fed = None, None, [0] * ids.shape[0]
        for number in range(max(map(len, plans))):
            counts = [plan[number] if number < len(plan) else 0 for plan in plans]
            part = Chunk(counts, max(counts), ids.device)
            where = part.columns(fed).clamp(min=0)
            step = CachedStep(part, cache.stores, Rotary.of(self.rotary_emb), Retrieval.of(self.config))
            out = self._layers(full.ids.gather(1, where), full.positions.gather(1, where), step, kwargs)
            cache.commit(part)
            hidden = _put(hidden, out.last_hidden_state, part.columns(fed), part.real, full.ids.shape[1])
            fed = [done + count for done, count in zip(fed, counts, strict=True)]
        cache.count_slots(ids.shape[1])
        assert out is not None and hidden is not None  # a prompt is at least one chunk
        out.last_hidden_state = hidden.gather(1, full.source[..., None].expand(-1, -1, hidden.shape[-1]))
        out["cache" if hasattr(out, "cache") else "past_key_values"] = cache
        return out

    def _layers(self, ids: Tensor, positions: Tensor, step: DenseStep | CachedStep, kwargs: dict[str, Any]) -> Any:
        """The host's forward. A mask with four dimensions passes through it untouched, and ours is in the step."""
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        kwargs = {**kwargs, "landmark_step": step, "use_cache": False, "return_dict": True}
        return super().forward(input_ids=ids, attention_mask=nothing, position_ids=positions, **kwargs)

    def _refuse_landmarks(self, ids: Tensor) -> None:
        if bool((ids == self.config.landmark_token_id).any()):
            raise ValueError(
                f"the input holds the landmark (id {self.config.landmark_token_id}), but the model inserts landmarks "
                "by itself; strip them (hf_attn.training.landmark.strip_landmarks), or set config.landmark_insert=False"
            )


class LandmarkForCausalLM(CardOnPush):
    """The language model around a base model with landmarks."""

    model_class: type

    def __init__(self, config: Any) -> None:
        check(config)
        super().__init__(config)
        self.model.__class__ = self.model_class
        self.model.use_landmarks()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the host's: logits and labels are those of the given tokens, in which there is no landmark.

        The landmark's logit is the lowest number of its dtype, so that it is never sampled (not with
        `landmark_insert=False`, where landmarks are tokens like others).
        """
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        if self.config.landmark_insert:
            out.logits[..., self.config.landmark_token_id] = torch.finfo(out.logits.dtype).min
        if labels is not None:
            loss_arguments = {key: value for key, value in kwargs.items() if key != "logits_to_keep"}
            loss = self.loss_function(
                logits=out.logits, labels=labels, vocab_size=self.config.vocab_size, **loss_arguments
            )
            out = type(out)(**{"loss": loss, **out})
        return out.to_tuple() if return_dict is False else out

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A `LandmarkCache`, unless the user brought one or wants none."""
        name = cache_argument(self)
        if model_kwargs.get(name) is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} cannot hold landmarks; leave it "
                    "out, and set config.landmark_offload=True to keep blocks on the CPU"
                )
            model_kwargs[name] = LandmarkCache(self.config)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


# generate reads the names of arguments (which of `cache` and `past_key_values` this version has, logits_to_keep).
setattr(LandmarkForCausalLM.forward, "__signature__", inspect.signature(LlamaForCausalLM.forward))  # noqa: B010


def _segments(ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Sequence ids int64 `[B, T]` of the new tokens, -1 for padding."""
    length = ids.shape[1]
    found = neighbours(length, mask, position_ids, cu_seqlens) if length > 1 else None
    if found is None:
        found = torch.zeros_like(ids)
        if mask is not None:
            found = torch.where(mask[:, -length:].bool(), found, -1)
    return found.expand_as(ids)


def _layout(full: Expanded) -> TokenLayout | None:
    """Rows, padding and packing of a call without cache; None for full rows of one sequence."""
    if bool((full.segment == full.segment[:, :1]).all()) and bool((full.segment >= 0).all()):
        return None
    index = torch.stack([full.segment, full.positions], 1).repeat(1, 1, 2).to(torch.int32)
    rows, width = full.ids.shape
    return TokenLayout(rows, width, width, index)


def _put(whole: Tensor | None, part: Tensor, columns: Tensor, real: Tensor, width: int) -> Tensor:
    """Write the rows of a chunk `[B, M, C]` to their columns of `[B, width, C]`."""
    if whole is None:
        if part.shape[1] == width and bool(real.all()):
            return part
        whole = part.new_zeros(part.shape[0], width + 1, part.shape[2])
    where = torch.where(real, columns, whole.shape[1] - 1)
    return whole.scatter(1, where[..., None].expand(-1, -1, part.shape[2]), part)
