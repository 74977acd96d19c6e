"""`hf-attn bench decode`: both tables, the file, random layers, failed checks without a speed, clear lines."""

from __future__ import annotations

import csv

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

import hf_attn
from hf_attn.analysis.head_files import save_head_folder
from hf_attn.bench import decode, prefill_speed
from hf_attn.bench.prefill import run_body
from hf_attn.cli.app import app
from hf_attn.cli.decode_tables import decode_notes, decode_table, head_options

# Pages so small that a few hundred tokens are many of them.
SMALL = {
    "page_size": 8, "logical_page_size": 4, "token_budget": 48, "dec_sink": 8, "dec_local": 16, "ctx_sink": 8,
    "ctx_local": 32, "min_seq_len": 0, "heads": [[1, 0]],
}  # fmt: skip
IDS = torch.randint(256, (1, 401), generator=torch.Generator().manual_seed(0))


def run(*arguments: object):
    return CliRunner().invoke(app, ["bench", "decode", *map(str, arguments)], env={"COLUMNS": "250"})


@pytest.fixture(scope="module")
def model(tiny_model):
    """Weights so spread out that attention matters."""
    made = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return made


@pytest.fixture(scope="module")
def heads(tiny_model, model, tmp_path_factory):
    """A folder as hf-attn calibrate writes it."""
    tokenizer, folder = AutoTokenizer.from_pretrained(tiny_model), tmp_path_factory.mktemp("heads") / "heads"
    found = hf_attn.calibrate(model, "lserve", tokenizer=tokenizer, tokens=512, length=256, sink=8, local=32)
    save_head_folder(folder, found, model.config)
    return folder


def measured(model, lengths: list[int], **options) -> list[decode.Row]:
    table = decode.variants("lserve", {**SMALL, **options}, group_max=True)
    prompts = decode.Prompts(model, "lserve", table[2].options, IDS)
    return decode.measure(model, "lserve", table, IDS, prompts, lengths, repeats=2)


@pytest.mark.parametrize("arguments", [[], ["decode"]])
def test_help_has_an_example(arguments):
    result = CliRunner().invoke(app, ["bench", *arguments, "--help"])
    assert result.exit_code == 0 and "hf-attn bench decode --lengths 2048 4096 8192" in result.output


def test_command_with_lengths_beyond_the_model(tiny_model, heads, tmp_path):
    """The whole command: a length of the model, one beyond it on random layers, everything in one file."""
    file = tmp_path / "out" / "bench.csv"
    arguments = ["--lengths", 256, 2100, "--layers", 2, "--prefill-repeats", 1, "--threads", 1, "--csv", file]
    options = [part for name, value in SMALL.items() if name != "heads" for part in ("-o", f"{name}={value}")]
    result = run(tiny_model, *arguments, *options, "--heads", heads)
    assert result.exit_code == 0, result.output
    assert "2 layers with random weights" in result.output and "CHECK FAILED" not in result.output
    assert "load average" in result.output and "1 thread(s)" in result.output and "measured now" not in result.output
    rows = list(csv.DictReader(file.open()))
    decoded = {(row["length"], row["variant"]): row for row in rows if row["table"] == "decode"}
    assert len(decoded) == 10 and len(rows) == 14
    for (length, variant), row in decoded.items():
        assert float(row["seconds"]) > 0 and float(row["over_dynamic_cache"]) > 0 and int(row["steps"]) >= 64
        assert (row["perplexity_ratio"] == "") == (length == "2100") == (row["random_weights"] == "True")
        assert (float(row["density"]) < 1) == variant.startswith("lserve")
    held = [float(decoded["2100", name]["bytes_held"]) for name in ("lserve", "lserve KV8", "lserve KV4")]
    assert held[0] > held[1] > held[2]


def test_heads_are_measured_where_none_are_given(tiny_model, model, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    options = head_options(model, tokenizer, None, 0.25, tokens=400)
    assert "head classes: measured now on 400 tokens" in capsys.readouterr().out
    retrieval = [hf_attn.LServeConfig(**options).retrieval(layer) for layer in range(2)]
    assert sum(map(sum, retrieval)) == 3 and options["static_sparsity"] == 0.25


def test_rows_say_what_was_read(model):
    """Perplexity from real logits, pages of the budget, bytes of the formats, one step for all variants."""
    rows = {row.name: row for row in measured(model, [200, 400]) if row.length == 400}
    dense, own = rows[decode.HOST], rows[decode.OWN]
    assert all(len(row.losses) == len(dense.losses) >= decode.MIN_STEPS and row.passed for row in rows.values())
    # Two layers, keys and values, two heads of eight numbers of four bytes.
    assert (
        abs(own.perplexity_ratio(dense) - 1) < 1e-5 and dense.bytes_read == dense.bytes_held == 400 * 2 * 2 * 2 * 8 * 4
    )
    # 48 tokens are six pages; a step in the middle of a reuse interval may have opened one more.
    assert 6 <= rows["lserve"].pages_read < 7 and rows["lserve"].pages_held == 50
    assert rows["lserve"].selector_share is not None and own.selector_share is None
    assert rows["lserve group_max"].bytes_read < rows["lserve"].bytes_read < dense.bytes_read
    assert rows["lserve"].perplexity_ratio(dense) != 1
    with torch.inference_mode():
        logits = model(IDS[:, :-1]).logits[0, -len(dense.losses) :].float()
    count = len(dense.losses)
    expected = torch.nn.functional.cross_entropy(logits, IDS[0, -count:], reduction="none")
    torch.testing.assert_close(torch.tensor(dense.losses), expected, rtol=1e-4, atol=1e-4)


def test_a_shorter_prompt_is_the_head_of_a_longer_one(model):
    """Why one prefill serves all lengths, with streaming heads too."""
    for dense in (True, False):
        decode.switch(model, "lserve", None if dense else SMALL)
        long, short = run_body(model, IDS[:, :300])[1], run_body(model, IDS[:, :120])[1]
        for a, b in zip(long.layers, short.layers, strict=True):
            torch.testing.assert_close(a.keys[:, :, :120], b.keys)
            torch.testing.assert_close(a.values[:, :, :120], b.values)
    hf_attn.remove(model)


def test_a_wrong_result_has_no_speed(model, monkeypatch):
    """A path that reads other pages than the reference fails its check, and the table shows no ratio for it."""
    from hf_attn.ops.hfattn_sparse.paged import torch_path
    from hf_attn.ops.hfattn_sparse.paged.kept import KeptPages

    original = torch_path.paged_attention

    def wrong(query, key, value, pages, *rest):
        return original(query, key, value, pages[..., 1:], *rest)

    monkeypatch.setattr(torch_path, "paged_attention", wrong)
    choose = KeptPages.choose

    def fewer(self, key, value, pages, *rest):
        choose(self, key, value, pages[..., 1:], *rest)
        self.pages = pages

    monkeypatch.setattr(KeptPages, "choose", fewer)
    rows = measured(model, [300])
    failed = {row.name for row in rows if not row.passed}
    assert failed == {"lserve", "lserve KV8", "lserve KV4", "lserve group_max"}
    table = decode_table(rows)
    assert list(table.columns[2].cells)[2:] == ["CHECK FAILED"] * 4 and list(table.columns[3].cells)[2:] == ["-"] * 4
    assert sum("CHECK FAILED" in note for note in decode_notes(rows, SMALL)) == 4


def test_noise_is_marked():
    rows = [
        decode.Row(64, name, rounds=[1.0, 1.0, 1.4, 1.5], steps=1, losses=[1.0]) for name in (decode.HOST, decode.OWN)
    ]
    assert rows[0].noisy and set(decode_table(rows).columns[-1].cells) == {"noisy"}
    assert any("noisy" in note for note in decode_notes(rows, {}))


def test_prefill_rows(model):
    """The attention calls are a part of the whole, the ceiling is Amdahl's, and the host's functions are put back."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_ATTENTION_FUNCTIONS["hf_attn_lserve"].func
    dense, sparse = prefill_speed.measure(model, "lserve", SMALL, IDS, [300], repeats=2)
    assert all(0 < a < s for row in (dense, sparse) for a, s in zip(row.attention, row.seconds, strict=True))
    assert sparse.passed and sparse.streaming == 0.5 and 0.5 < sparse.density < 0.7
    assert sparse.ceiling(dense) == pytest.approx(1 / (1 - dense.attention_share / 2))
    assert before == (ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_ATTENTION_FUNCTIONS["hf_attn_lserve"].func)


BAD = {
    "mechanism": (["--mechanism", "moba"], "must have a cache of its own (lserve), got 'moba'"),
    "option": (["-o", "page_siz=64"], "did you mean 'page_size'?"),
    "lengths": (["--lengths", "2k"], "--lengths must be comma-separated integers, got '2k'"),
    "short": (["--lengths", "64"], "--lengths must be at least 256 tokens, got 64"),
    "room": (["--lengths", "256", "-o", "reuse_interval=64"], "must be more than"),
    "beyond": (["--lengths", "4096"], "this model ends at 2048; pass --layers N"),
    "heads": (["--heads", "/no/such/folder"], "no such file: /no/such/folder"),
    "model": (["/no/such/model"], "/no/such/model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name, tiny_model):
    arguments, message = BAD[name]
    result = run(*([] if name == "model" else [tiny_model]), *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1
