"""`hf-attn bench peer` and `report`: missing peers say so, flex agrees, the page opens."""

from __future__ import annotations

import builtins
import math
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

from hf_attn.bench import peers
from hf_attn.bench.cases import Setting, check
from hf_attn.bench.kernel_calls import Shape
from hf_attn.bench.record import Store, read_rows
from hf_attn.bench.report import crossover
from hf_attn.cli.app import app

SMALL = ["--lengths", "128", "--dtype", "fp32", "--block", "32", "--heads", "2", "--kv-heads", "1", "--head-dim", "16"]


def run(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "250"})


@pytest.mark.parametrize("task", peers.TASKS)
def test_our_side_of_every_task_is_right(task):
    torch.manual_seed(0)
    shape = Shape(torch.float32, 16, q_len=128, k_len=128, heads=4, kv_heads=2, device="cpu")
    case = peers.TASKS[task](Setting(shape, 0.25, 32))
    assert check(case, case.run, "auto", backward=task != "int8").passed


@pytest.mark.parametrize("kind", ["causal", "lower", "full"])
def test_block_masks_of_flex_are_ours(kind):
    """The mask that flex compiles, expanded by flex itself, is the mask of the pattern."""
    from torch.nn.attention.flex_attention import flex_attention

    shape = Shape(torch.float32, 16, q_len=128, k_len=128, heads=2, kv_heads=2, device="cpu")
    setting = Setting(shape, 0.5, 32)
    torch.manual_seed(0)
    case = peers.blocks(kind, setting)
    mask = case.builds["flex"]()
    assert mask.BLOCK_SIZE == (32, 32) and mask.shape[-2:] == (128, 128)
    if kind == "causal":  # without a compiler flex knows the function of the mask alone
        assert int(mask.kv_num_blocks.sum()) == 2 * 4 and int(mask.full_kv_num_blocks.sum()) == 2
        assert mask.mask_mod(0, 0, torch.tensor(3), torch.tensor(3)) and not mask.mask_mod(0, 0, 3, 4)
    else:
        assert int(mask.kv_num_blocks.sum()) == 0
        assert torch.equal(mask.to_dense().bool() | False, case.builds["auto"]().to_dense())
    assert callable(flex_attention)


def test_peers_that_are_missing_say_so_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "cxx_missing", lambda: "not run: needs a C++ compiler")
    arguments = ["--density", "0.5", "--passes", "forward", "--output", tmp_path / "rows.csv"]
    result = run("peer", "flex", "natten", *SMALL, *arguments)
    assert result.exit_code == 0, result.output
    rows = {(row["name"], row["variant"]): row for row in read_rows([tmp_path / "rows.csv"])}
    assert rows["blocks-causal flex", "flex"]["status"] == "not run: needs a C++ compiler"
    for (name, variant), row in rows.items():
        if variant == "auto":
            assert row["ms"] > 0 and row["over_peer"] is None, name
        else:
            assert row["status"].startswith("not run: needs a") and row["ms"] is None
    assert all(peer.missing("cpu").startswith("not run: needs a") for peer in peers.PEERS.values())


def test_a_compiler_that_fails_is_no_compiler(monkeypatch):
    peers.cxx_missing.cache_clear()
    monkeypatch.setenv("CXX", "false")
    assert "needs a C++ compiler" in peers.cxx_missing()
    peers.cxx_missing.cache_clear()


@pytest.mark.slow
@pytest.mark.needs_cxx
def test_flex_is_compiled_and_compared(tmp_path):
    result = run("peer", "flex", *SMALL, "--density", "0.5", "--passes", "forward", "--output", tmp_path / "rows.csv")
    assert result.exit_code == 0, result.output
    rows = {(row["name"], row["variant"]): row for row in read_rows([tmp_path / "rows.csv"])}
    for name in ("blocks-causal flex", "blocks-lower flex", "blocks-full flex"):
        ours, theirs = rows[name, "auto"], rows[name, "flex"]
        assert ours["over_peer"] > 0 and theirs["ms"] > 0 and theirs["error"] <= theirs["allowed"]
        assert ours["build_ms"] > 0 and theirs["build_ms"] > 0


BASE = {
    "level": "op", "name": "a", "variant": "torch", "dtype": "fp32", "pass": "forward", "hardware": "box",
    "shape": "B1 Hq8 Nq1", "status": "ok", "density": 0.25, "torch": "2", "hf_attn": "0",
}  # fmt: skip


def rows_of(*speeds: float) -> list[dict]:
    return [
        BASE | {"length": 1024 << i, "speedup": s, "limit": s / 4, "ms": 1.0, "dense": "sdpa", "dense_ms": s}
        for i, s in enumerate(speeds)
    ]  # fmt: skip


class Page(HTMLParser):
    """Tags that are open, and what was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass


def test_the_page_opens_and_holds_its_plots(tmp_path):
    pytest.importorskip("matplotlib")
    store = Store(tmp_path / "rows.csv")
    for row in rows_of(0.5, 2.0, 4.0):
        store.add(row)
    store.add(BASE | {"name": "<b>", "length": 1024, "status": "check failed: no speed"})
    result = run("report", store.path, "--output", tmp_path / "out" / "page.html")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "page.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open and page.seen.count("svg") == 1 and "script" not in page.seen
    assert not [link for link in page.links if not link.startswith("data:")]
    assert "&lt;b&gt;" in text and "<b>" not in text and "1448" in text  # sqrt(2) of the way from 1024 to 2048
    assert (tmp_path / "out" / "page-1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("limits", [(None,), (None, None), (None, 0.5)])
def test_cases_without_a_limit_have_a_plot_too(tmp_path, limits):
    """Linear attention skips nothing: its rows have no density to draw."""
    pytest.importorskip("matplotlib")
    store = Store(tmp_path / "rows.csv")
    for number, (row, limit) in enumerate(zip(rows_of(1.5, 2.0), limits, strict=False)):
        store.add(row | {"name": f"case {number}", "limit": limit, "density": None if limit is None else 0.25})
    result = run("report", store.path, "--output", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    labels = (tmp_path / "page.html").read_text().count("speed-up x density")
    assert labels == (1 if 0.5 in limits else 0)


def test_crossover_lengths():
    assert crossover(rows_of(0.5, 2.0, 4.0)) == pytest.approx(1024 * math.sqrt(2))
    assert crossover(rows_of(0.5, 0.8)) is None
    assert crossover(rows_of(1.5, 1.8)) == 1024
    assert crossover(rows_of(1.5, 0.5, 2.0)) == pytest.approx(2048 * math.sqrt(2))


def test_report_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest, **options)

    Store(tmp_path / "rows.csv").add(rows_of(1.0)[0])
    monkeypatch.setattr(builtins, "__import__", without)
    result = run("report", tmp_path / "rows.csv", "--output", tmp_path / "page.html")
    assert result.exit_code == 2 and 'pip install "hf-attn[bench]"' in result.output.replace("\n", " ")


BAD = {
    "peer": (["peer", "tpu"], "no peer is called 'tpu'; there are flex, natten"),
    "file": (["report", "missing.csv"], "no such file of results: missing.csv"),
    "page": (["report", __file__, "--output", "page.pdf"], "a report is an .html file, got page.pdf"),
    "table": (["report", __file__, "--output", "page.html"], "is not a file of results"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    arguments, message = BAD[name]
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1
