"""BlockRanker: ranks documents for a query with one partial forward pass of a language model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn.checks import require_int
from hf_attn.integrations.transformers.config import mechanism_options
from hf_attn.integrations.transformers.masks import COMPACT_OK
from hf_attn.integrations.transformers.model import apply
from hf_attn.mechanisms.blockrank import BlockRankConfig
from hf_attn.models.blockrank import files
from hf_attn.models.blockrank.prompt import PromptBatch, PromptBuilder, batch_prompts
from hf_attn.models.blockrank.scoring import first_layer_scores


class BlockRanker:
    """Ranks documents by the attention a query pays them (BlockRank, arXiv 2510.05396), without decoding.

    All documents of a query stand in one prompt, so a score is a share of attention among them: the scores of a query
    sum to 1, and are not comparable between queries or with other lists.

    Args:
        model: a causal language model of transformers, or a PeftModel of one. It gets `hf_attn_blockrank` for good
            (`hf_attn.remove(model)` takes it off).
        tokenizer: its tokenizer.
        options: of `BlockRankConfig`; they win over those in `model.config.hf_attn`.

    Raises ValueError for models that blockrank cannot serve, and options that do not fit the model.
    """

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        base = _base(model)
        _check_model(base, tokenizer)
        options = {**mechanism_options(base.config.hf_attn, "blockrank"), **options}
        config = BlockRankConfig.from_dict(options)
        config.check_layer_count(base.config.num_hidden_layers)
        for head in config.score_heads or ():
            if head >= base.config.num_attention_heads:
                raise ValueError(f"score_heads names head {head}, the model has {base.config.num_attention_heads}")
        config.offset_of(base.config.max_position_embeddings)
        apply(base, "blockrank", **options)
        self.model, self.tokenizer = model, tokenizer

    # -- ranking -------------------------------------------------------------------------------------------------------

    def rank(
        self,
        query: str | Sequence[str],
        documents: Sequence[str] | Sequence[Sequence[str]],
        top_k: int | None = None,
        *,
        return_documents: bool = False,
        batch_size: int = 1,
    ) -> list[Any]:
        """Documents of a query, best first: `[{"corpus_id": number, "score": share}, ...]`.

        Args:
            query: a text, or a list of them.
            documents: texts; one list for each query where `query` is a list.
            top_k: how many to return, >= 1; all when None.
            return_documents: add `"text"` to every entry.
            batch_size: prompts in one forward pass.

        Returns one list, or one for each query. Ties go to the earlier document.
        """
        if top_k is not None:
            require_int("top_k", top_k, 1)
        several = not isinstance(query, str)
        queries: list[Any] = list(query) if several else [query]
        lists: list[Any] = list(documents) if several else [documents]
        ranked = []
        for scores, texts in zip(self._all_scores(queries, lists, batch_size), lists, strict=True):
            order = scores.argsort(descending=True, stable=True)[:top_k].tolist()
            found = [{"corpus_id": number, "score": float(scores[number])} for number in order]
            if return_documents:
                found = [{**entry, "text": texts[entry["corpus_id"]]} for entry in found]
            ranked.append(found)
        return ranked if several else ranked[0]

    def score(self, query: str, documents: Sequence[str]) -> Tensor:
        """Score of every document, fp32 `[N]` in the order given; they sum to 1."""
        return self._all_scores([query], [documents], 1)[0]

    def predict(self, pairs: Sequence[tuple[str, str]], *, batch_size: int = 1) -> Tensor:
        """Score of every (query, document) pair, fp32 `[pairs]`, as a CrossEncoder's `predict`.

        Pairs of the same query are one list, ranked together; a query with a single pair gets 1.

        Raises ValueError for entries that are no pair.
        """
        groups: dict[str, list[int]] = {}
        for number, pair in enumerate(pairs):
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"pairs[{number}] must be (query, document), got {pair!r}")
            groups.setdefault(pair[0], []).append(number)
        out = torch.zeros(len(pairs))
        lists = [[pairs[number][1] for number in numbers] for numbers in groups.values()]
        for scores, numbers in zip(self._all_scores(list(groups), lists, batch_size), groups.values(), strict=True):
            out[numbers] = scores
        return out

    @torch.inference_mode()
    def head_scores(self, query: str, documents: Sequence[str], layers: Sequence[int] | None = None) -> Tensor:
        """What every head says, fp32 `[layers, heads, N]`; default the scoring layer alone."""
        layers = [self.score_layer] if layers is None else list(layers)
        batch = self.batch([query], [documents])
        found = first_layer_scores(self.model, batch, layers)
        return torch.stack([found[layer][0] for layer in layers]).cpu()

    def _all_scores(self, queries: list[str], lists: Sequence[Sequence[str]], batch_size: int) -> list[Tensor]:
        require_int("batch_size", batch_size, 1)
        if len(queries) != len(lists):
            raise ValueError(f"{len(queries)} queries need as many lists of documents, got {len(lists)}")
        scores: list[Tensor] = []
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for start in range(0, len(queries), batch_size):
                    some = slice(start, start + batch_size)
                    batch = self.batch(queries[some], lists[some])
                    found = first_layer_scores(self.model, batch, [self.score_layer])[self.score_layer]
                    rows = self.combine(found).cpu()
                    scores += [row[: len(texts)] for row, texts in zip(rows, lists[some], strict=True)]
        finally:
            self.model.train(training)
        return scores

    # -- pieces --------------------------------------------------------------------------------------------------------

    @property
    def options(self) -> BlockRankConfig:
        """The mechanism's options of the model now."""
        return BlockRankConfig.from_dict(mechanism_options(_base(self.model).config.hf_attn, "blockrank"))

    @property
    def score_layer(self) -> int:
        return self.options.layer_of(_base(self.model).config.num_hidden_layers)

    def combine(self, scores: Tensor) -> Tensor:
        """`[B, heads, N]` -> `[B, N]`: mean over the scoring heads."""
        heads = self.options.score_heads
        return (scores if heads is None else scores[:, heads]).mean(1)

    def batch(
        self, queries: Sequence[str], lists: Sequence[Sequence[str]], answers: Sequence[Sequence[int]] | None = None
    ) -> PromptBatch:
        """Prompts of several queries on the model's device; with `answers` their completions are labels.

        Warns once when documents were cut. Raises ValueError for answers that are no document of their query.
        """
        options = self.options
        builder = PromptBuilder(self.tokenizer, options.max_block_length)
        prompts = [builder.build(query, documents) for query, documents in zip(queries, lists, strict=True)]
        if cut := sum(prompt.truncated for prompt in prompts):
            total = sum(prompt.num_documents for prompt in prompts)
            warnings.warn(
                f"{cut} of {total} documents were cut to max_block_length={options.max_block_length} tokens",
                stacklevel=3,
            )
        completions = [[builder.signal]] * len(prompts)
        if answers is not None:
            for found, documents in zip(answers, lists, strict=True):
                if not found or not all(0 <= answer < len(documents) for answer in found):
                    raise ValueError(f"answers must name documents 0 to {len(documents) - 1}, got {list(found)}")
            completions = [builder.completion(found) for found in answers]
        positions = _base(self.model).config.max_position_embeddings
        batch = batch_prompts(prompts, completions, options, positions, labelled=answers is not None)
        return batch.to(next(self.model.parameters()).device)

    def calibrate(
        self,
        queries: Sequence[str],
        lists: Sequence[Sequence[str]],
        answers: Sequence[int],
        *,
        layers: Sequence[int] | None = None,
        num_heads: int = 1,
    ) -> dict[str, Any]:
        """Choose the heads that rank labelled queries best, and set `score_heads` (and `score_layer`) to them.

        Args:
            queries, lists, answers: some labelled queries; `answers` numbers the right document of each.
            layers: where to look; default the scoring layer alone.
            num_heads: how many of the best heads of the best layer are averaged, >= 1.

        Returns {"score_layer", "score_heads", "accuracy"}: the share of these queries that the heads rank right.
        """
        require_int("num_heads", num_heads, 1)
        layers = [self.score_layer] if layers is None else list(layers)
        shares = [self.head_scores(query, texts, layers) for query, texts in zip(queries, lists, strict=True)]
        right = [share.argmax(-1) == answer for share, answer in zip(shares, answers, strict=True)]
        accuracy = torch.stack(right).float().mean(0)  # [layers, heads]
        best = accuracy.sort(dim=1, descending=True, stable=True)
        row = int(best.values[:, :num_heads].mean(1).argmax())
        heads = sorted(best.indices[row, :num_heads].tolist())
        together = [int(share[row, heads].mean(0).argmax()) == a for share, a in zip(shares, answers, strict=True)]
        self.set_options(score_layer=layers[row], score_heads=heads)
        return {"score_layer": layers[row], "score_heads": heads, "accuracy": sum(together) / len(together)}

    def set_options(self, **options: Any) -> None:
        """Change single options from the next call on."""
        base = _base(self.model)
        merged = {**mechanism_options(base.config.hf_attn, "blockrank"), **options}
        BlockRankConfig.from_dict(merged).check_layer_count(base.config.num_hidden_layers)
        base.config.hf_attn = {"mechanism": "blockrank", **merged}

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str, *, base_model: Any = None, **options: Any) -> BlockRanker:
        """A ranker from a folder or Hub repository: a model, or an adapter that `save_pretrained` wrote.

        Args:
            source: folder or Hub id.
            base_model: for an adapter: its base, as a model or an id; default the one the adapter names.
            options: of `BlockRankConfig`; the rest (`dtype`, `device_map`, `revision`, ...) goes to transformers.

        Raises ValueError for an adapter on a base it was not trained on.
        """
        model, tokenizer, stored, options = files.load(source, base_model, options)
        return cls(model, tokenizer, **{**stored, **options})

    def save_pretrained(self, folder: str, *, metrics: dict[str, float] | None = None) -> None:
        """Model (an adapter alone where the model is a PeftModel), tokenizer, options and a model card."""
        files.save(self, str(folder), metrics)

    def push_to_hub(self, repo_id: str, *, metrics: dict[str, float] | None = None, **options: Any) -> Any:
        """`save_pretrained`, then upload; `private` goes to `create_repo`, other options to `upload_folder`."""
        return files.push(self, repo_id, metrics, options)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_model(model: Any, tokenizer: Any) -> None:
    """Raise ValueError for a model whose attention or positions blockrank cannot steer, and for a foreign tokenizer."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    if kind not in COMPACT_OK or not rotary or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"BlockRanker needs a causal language model with rotary positions whose attention goes through "
            f"transformers' AttentionInterface (Llama, Qwen2, Qwen3, Mistral, ...), got {type(model).__name__}"
        )
    if (size := len(tokenizer)) > (room := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(
            f"the tokenizer has {size} tokens, the model has room for {room}; load the tokenizer of this model, or "
            "call model.resize_token_embeddings"
        )
