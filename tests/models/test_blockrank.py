"""BlockRanker: scores, early exit, invariances, decoding behind the mask, checkpoints, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_attn
from hf_attn.bench.models import byte_tokenizer
from hf_attn.call import TokenLayout
from hf_attn.integrations.transformers.masks import document_mask
from hf_attn.mechanisms.blockrank import BlockRankConfig, positions
from hf_attn.models.blockrank import PromptBuilder, RankingPrompt, batch_prompts
from hf_attn.models.blockrank.scoring import captured_scores
from tests.integrations.transformers.tiny import build
from tests.loopback_hub import Hub

DOCUMENTS = ["the seine runs through paris", "bread", "a river in london is the thames", "numbers"]
QUERY = "which river?"
OPTIONS = {"max_block_length": 64, "query_offset": 900, "score_layer": 1}


def tiny(layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ranker():
    return hf_attn.BlockRanker(tiny(), byte_tokenizer(), **OPTIONS)


def test_rank_and_its_other_forms(ranker):
    scores = ranker.score(QUERY, DOCUMENTS)
    assert scores.shape == (4,) and abs(float(scores.sum()) - 1) < 1e-5
    ranked = ranker.rank(QUERY, DOCUMENTS, return_documents=True)
    assert [entry["corpus_id"] for entry in ranked] == scores.argsort(descending=True).tolist()
    assert ranked[0]["text"] == DOCUMENTS[ranked[0]["corpus_id"]] and ranker.rank(QUERY, DOCUMENTS, 2) == [
        {name: entry[name] for name in ("corpus_id", "score")} for entry in ranked[:2]
    ]
    pairs = [(QUERY, DOCUMENTS[0]), ("other", DOCUMENTS[1]), *((QUERY, text) for text in DOCUMENTS[1:])]
    predicted = ranker.predict(pairs)
    torch.testing.assert_close(predicted[[0, 2, 3, 4]], scores, rtol=0, atol=1e-6)
    assert float(predicted[1]) == 1


def test_batches_of_unequal_lists_give_the_scores_of_each_alone(ranker):
    lists = [DOCUMENTS, DOCUMENTS[:1], DOCUMENTS[1:]]
    queries = [QUERY, "a longer query than the others", "bread?"]
    together = ranker.rank(queries, lists, batch_size=3)
    for found, query, documents in zip(together, queries, lists, strict=True):
        assert len(found) == len(documents)
        alone = ranker.score(query, documents)
        for entry in found:
            assert abs(entry["score"] - float(alone[entry["corpus_id"]])) < 1e-5


def test_early_exit_runs_no_layer_above_and_changes_nothing(ranker):
    """Scores equal those of a full forward; layers 0 to l* are called; the model gives the same logits afterwards."""
    model = ranker.model
    batch = ranker.batch([QUERY], [DOCUMENTS])
    with torch.no_grad(), captured_scores(model, batch, [1]) as found:
        before = model(**batch.model_inputs, use_cache=False).logits
    hf_attn.reset_stats(model)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    torch.testing.assert_close(ranker.score(QUERY, DOCUMENTS), ranker.combine(found[1])[0], rtol=0, atol=1e-6)
    assert sorted(hf_attn.stats(model)["layers"]) == [0, 1]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with torch.no_grad():
        assert torch.equal(model(**batch.model_inputs, use_cache=False).logits, before)


def segments_of(lengths: list[int]) -> torch.Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def forward(model, ids, layout, offset=900, **options):
    mask, where = document_mask(layout), positions(layout, offset)
    return model(ids, attention_mask=mask, position_ids=where, output_hidden_states=True, **options)


@torch.no_grad()
def test_documents_do_not_depend_on_each_other_nor_on_their_order(ranker):
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randint(3, 250, (n,), generator=generator) for n in (7, 5, 9, 2, 6)]
    model = ranker.model
    out = forward(model, torch.cat(parts)[None], TokenLayout.documents(segments_of([7, 5, 9, 2, 6])))
    swapped = [parts[i] for i in (0, 3, 1, 2, 4)]
    other = forward(model, torch.cat(swapped)[None], TokenLayout.documents(segments_of([7, 2, 5, 9, 6])))
    torch.testing.assert_close(out.logits[:, -6:], other.logits[:, -6:], rtol=0, atol=1e-5)
    changed = [*parts[:2], parts[2] + 1, *parts[3:]]
    third = forward(model, torch.cat(changed)[None], TokenLayout.documents(segments_of([7, 5, 9, 2, 6])))
    for a, b in zip(out.hidden_states, third.hidden_states, strict=True):
        torch.testing.assert_close(a[:, :12], b[:, :12], rtol=0, atol=1e-6)
        torch.testing.assert_close(a[:, 21:23], b[:, 21:23], rtol=0, atol=1e-6)
    assert (out.logits[:, -1] - third.logits[:, -1]).abs().max() > 1e-4


@torch.no_grad()
def test_padding_inside_and_outside_changes_nothing(ranker):
    """Packed, left-padded blocks of a common length, and rows padded on either side."""
    generator = torch.Generator().manual_seed(3)
    lengths, width = [7, 5, 9, 2, 6], 9
    ids = torch.randint(3, 250, (1, sum(lengths)), generator=generator)
    packed = TokenLayout.documents(segments_of(lengths))
    expected = forward(ranker.model, ids, packed).logits
    valid = torch.cat([torch.arange(width) >= width - n for n in lengths])
    segments = torch.where(valid, torch.arange(5).repeat_interleave(width), -1)
    padded = torch.zeros(1, 5 * width, dtype=torch.int64)
    padded[0, valid] = ids[0]
    got = forward(ranker.model, padded, TokenLayout.documents(segments[None])).logits[:, valid]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_tokens_after_the_prompt_see_everything(ranker):
    """Four tokens behind the cache of a padded batch: their logits are those of the whole row under the mask."""
    generator = torch.Generator().manual_seed(3)
    segments = torch.full((2, 20), -1)
    segments[0], segments[1, 3:] = segments_of([4, 5, 6, 5])[0], segments_of([4, 2, 6, 5])[0]
    ids = torch.randint(3, 250, (2, 20), generator=generator)
    whole = TokenLayout.documents(segments, 4)
    expected = forward(ranker.model, ids, whole).logits[:, -3:]
    first = TokenLayout.documents(segments[:, :17], 4)
    past = forward(ranker.model, ids[:, :17], first, use_cache=True).past_key_values
    rest = whole.query_rows(17, 20, True)
    where = positions(whole, 900)[:, 17:]
    got = ranker.model(ids[:, 17:], attention_mask=document_mask(rest), position_ids=where, past_key_values=past).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_positions_by_hand():
    layout = TokenLayout.documents(torch.tensor([[-1, 0, 0, 1, -1, 1, 2, 3, 3]]))
    assert positions(layout, 50).tolist() == [[0, 0, 1, 2, 0, 3, 2, 50, 51]]
    assert positions(layout, 50, permutation_invariant=False).tolist() == [[0, 0, 1, 2, 0, 3, 4, 5, 6]]
    with pytest.raises(ValueError, match="documents reach position 3, beyond query_offset=3"):
        positions(layout, 3)
    alone = TokenLayout.documents(torch.zeros(1, 3, dtype=torch.long))
    assert positions(alone, 1).tolist() == [[0, 1, 2]]


def test_calibrated_heads(ranker):
    lists = [DOCUMENTS, DOCUMENTS[1:], DOCUMENTS[::-1]]
    found = ranker.calibrate([QUERY] * 3, lists, [0, 1, 2], layers=[0, 1, 2], num_heads=2)
    assert ranker.options.score_heads == found["score_heads"] and ranker.score_layer == found["score_layer"]
    scores = ranker.head_scores(QUERY, DOCUMENTS)[0, found["score_heads"]].mean(0)
    torch.testing.assert_close(ranker.score(QUERY, DOCUMENTS), scores, rtol=0, atol=1e-6)


# -- checkpoints -------------------------------------------------------------------------------------------------------

LOAD = """
import json, sys
import hf_attn
ranker = hf_attn.BlockRanker.from_pretrained(sys.argv[1])
print(json.dumps(ranker.score({query!r}, {documents!r}).tolist()))
"""


def test_push_and_load_in_a_fresh_process(ranker, tmp_path):
    expected = ranker.score(QUERY, DOCUMENTS)
    with Hub() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_dummy", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        ranker.save_pretrained(tmp_path / "ranker")
        push = "import sys, hf_attn; hf_attn.BlockRanker.from_pretrained(sys.argv[1]).push_to_hub('me/ranker')"
        load = LOAD.format(query=QUERY, documents=DOCUMENTS)
        for code, argument in ((push, str(tmp_path / "ranker")), (load, "me/ranker")):
            done = subprocess.run(
                [sys.executable, "-c", code, argument], capture_output=True, text=True, env=environment
            )
            assert done.returncode == 0, done.stderr
        got = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
        card = hub.repos["me/ranker"].files["README.md"].decode()
    assert torch.equal(got, expected)
    assert "pip install hf-attn" in card and "text-ranking" in card


def test_adapter_round_trip_and_the_wrong_base(ranker, tmp_path):
    import peft

    ranker.model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    )
    tuned = hf_attn.BlockRanker(model.eval(), byte_tokenizer(), **OPTIONS)
    expected = tuned.score(QUERY, DOCUMENTS)
    assert (expected - ranker.score(QUERY, DOCUMENTS)).abs().max() > 1e-6
    tuned.save_pretrained(tmp_path / "adapter")
    again = hf_attn.BlockRanker.from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(again.score(QUERY, DOCUMENTS), expected)
    torch.testing.assert_close(
        hf_attn.BlockRanker(model.merge_and_unload(), byte_tokenizer(), **OPTIONS).score(QUERY, DOCUMENTS),
        expected, rtol=0, atol=1e-5,
    )  # fmt: skip
    other = LlamaForCausalLM(base.config)
    with pytest.raises(ValueError, match="was trained on another base"):
        hf_attn.BlockRanker.from_pretrained(str(tmp_path / "adapter"), base_model=other)
    with pytest.raises(ValueError, match="is no adapter of a BlockRanker"):
        hf_attn.BlockRanker.from_pretrained(str(tmp_path / "base"), base_model=other)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_bad_texts(ranker):
    for documents, message in (
        ([], "documents is empty"),
        (["a", " "], r"documents\[1\] must be a text that is not empty"),
        ("one text", "must be a list of texts"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ranker.rank(QUERY, documents)
    with pytest.raises(ValueError, match="query must be a text, got ''"):
        ranker.rank("", DOCUMENTS)
    with pytest.raises(ValueError, match="top_k must be an integer >= 1, got 0"):
        ranker.rank(QUERY, DOCUMENTS, top_k=0)
    with pytest.raises(ValueError, match=r"answers must name documents 0 to 3, got \[4\]"):
        ranker.batch([QUERY], [DOCUMENTS], [[4]])
    with pytest.raises(ValueError, match="beyond query_offset=900"):
        ranker.rank("long " * 200, DOCUMENTS)


def test_long_documents_are_cut_and_counted(ranker):
    with pytest.warns(UserWarning, match="1 of 4 documents were cut to max_block_length=64 tokens"):
        batch = ranker.batch([QUERY], [[*DOCUMENTS[:3], "word " * 40]])
    assert batch.candidates.shape == (1, 4)
    strict = PromptBuilder(byte_tokenizer(), 60, truncate=False)
    with pytest.raises(ValueError, match=r"documents\[1\] has \d+ tokens with its frame of 29"):
        strict.build(QUERY, ["short", "word " * 40])
    with pytest.raises(ValueError, match="more than max_block_length=20"):
        PromptBuilder(byte_tokenizer(), 20).build(QUERY, ["short"])


def test_bad_prompts():
    options = BlockRankConfig(**OPTIONS)
    with pytest.raises(ValueError, match="ranking needs at least one document"):
        batch_prompts([RankingPrompt([[1], [2]], 0)], [[3]], options, 2048)
    with pytest.raises(ValueError, match="completion 0 is empty: its first token is a signal token"):
        batch_prompts([RankingPrompt([[1], [2], [3]], 0)], [[]], options, 2048)
    with pytest.raises(ValueError, match="the prompt needs position 901, the model has 901"):
        batch_prompts([RankingPrompt([[1], [2], [3]], 0)], [[4]], options, 901)


def test_bad_models_and_options():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="needs a causal language model with rotary positions.*GPT2LMHeadModel"):
        hf_attn.BlockRanker(build("gpt2"), tokenizer)
    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, the model has room for 99"):
        hf_attn.BlockRanker(small, tokenizer)
    for options, message in (
        ({"score_layer": 3}, "score_layer must be a layer of the model, 0 to 2, got 3"),
        ({"score_heads": [4]}, "score_heads names head 4, the model has 4"),
        ({"score_heads": []}, "score_heads must be a list of query heads"),
        ({"query_offset": 0}, "query_offset must be an integer >= 1, got 0"),
        ({"max_block_length": 1500}, "leaves no room in 2048 positions"),
        ({"layers": {"1": None}, "score_layer": 1}, "leaves the scoring layer 1 dense"),
        ({"score_head": [1]}, "has no option 'score_head'"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_attn.BlockRanker(tiny(), tokenizer, **options)


def test_a_mask_without_documents_is_an_error(ranker, tiny_model):
    with pytest.raises(ValueError, match="blockrank needs to know the documents of the prompt"):
        ranker.model(torch.ones(1, 5, dtype=torch.long))
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    hf_attn.apply(other, "moba")
    mask = document_mask(TokenLayout.documents(segments_of([2, 2, 1])))
    with pytest.raises(ValueError, match="cannot follow a mask of documents"):
        other(torch.ones(1, 5, dtype=torch.long), attention_mask=mask)


def test_a_tokenizer_of_the_hub_with_a_chat_template(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    text = tokenizer.decode([token for part in PromptBuilder(tokenizer).build("q", ["d"]).segments for token in part])
    assert text.startswith("<u>You get") and text.endswith("</u><a>Final Answer:")
    assert "ID: 0 | CONTENT: d | END ID: 0" in text and text.count("Query: q") == 2
    tokenizer.chat_template = "nothing"
    with pytest.raises(ValueError, match="does not write a user turn exactly once"):
        PromptBuilder(tokenizer)
