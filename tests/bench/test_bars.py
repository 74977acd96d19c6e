"""`hf-attn bench bars`: bars name figures of their modules, verdicts follow the rule, a run goes on where it was."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
import subprocess
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hf_attn.bench import bars, figures, record
from hf_attn.bench.bar_list import BARS, WHY, Bar
from hf_attn.bench.bars import Figure, Result, Work
from hf_attn.bench.figures import Row
from hf_attn.bench.record import Store, read_rows
from hf_attn.cli.app import app

BAR = Bar("a", "dense", "linear_speed", "4 heads", "forward", 2.0)


def of(bar: Bar, *values: float) -> Result:
    return Result(bar, tuple(Figure(value) for value in values))


def test_every_bar_names_a_figure_that_its_module_gives():
    assert len({bar.name for bar in BARS}) == len(BARS) > 100
    for bar in BARS:
        module = importlib.import_module(f"hf_attn.bench.{shlex.split(bar.command)[0]}")
        assert bar.figure in module.FIGURES, bar
        assert bar.bound > 0 and bar.seconds > 0 and bar.needs in ("", "gpu", "cxx"), bar


@pytest.mark.parametrize("command", sorted({bar.command for bar in BARS}))
def test_commands_are_understood(command, monkeypatch, capsys):
    """Each module's parser takes the arguments of its bars: nothing is measured, as the parse ends the run."""
    module, *arguments = shlex.split(command)
    main = importlib.import_module(f"hf_attn.bench.{module}").main
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"])
    assert stopped.value.code == 0, capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--no-such-option"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "unrecognized arguments: --no-such-option" in error, error


def cases_of(module) -> str:
    """What a module calls its cases, as an expression; the short commands below hold that it does."""
    name = module.__name__.rpartition(".")[2]
    if name == "backbone_speed":
        folder = "hf_attn.bench.backbones"
        return "|".join(f"{f} {p}" for f in module.families() for p in importlib.import_module(f"{folder}.{f}").PRESETS)
    if name == "neighborhood_speed":
        return "|".join(re.escape(f"{setting} {kind}") for setting in module.SETTINGS for kind in ("fwd", "fwd+bwd"))
    if name == "vision_windows_speed":
        spanned = "|".join(f"{side}x{side}" for side, *_ in module.SPANNED)
        mixing = "|".join(f"{h}x{w} K {k} {n} x {dim}" for h, w, k, n, dim in module.MIXING)
        return f"spanned ({spanned})|mixing ({mixing})"
    mechanisms = "(psa|vmoba|vmoba scope=head_global|paroattention)"
    return {
        "block_sparse_speed": "(fp32|bf16) 1/8 of the blocks a row, per head",
        "linear_speed": r"\d heads",
        "decode_layer": rf"\d+ ({'|'.join(getattr(module, 'VARIANTS', ()))})",
        "serving_speed": r"(decode|prefill) \d+",
        "psa_speed": r"(fp32|bf16) 0\.\d+",
        "video_speed": rf"{mechanisms} (0\.\d+|default)",
        "paro_speed": r"(attention|quantized|model) 0\.\d+",
        "head_routed_speed": r"\d+ \d/9",
        "blockrank_speed": r"\d+|\d+ over \d+",
        "selective_speed": r"\d+ \d of 3",
        "memory_speed": "chunks",
        "selective_scan_speed": r"n = \d+",
        "bilevel_speed": "forward",
        "oneformer_speed": "dinat",
        "flex_speed": r"(lower|full) (fp32|bf16) \d+",
        "gpu_bars": r"(block-sparse|MoBA|linear|neighborhood) .*\b(forward|forward\+backward)(, masked)?",
    }.get(name, r"\d+")


@pytest.mark.parametrize("bar", BARS, ids=lambda bar: bar.name)
def test_cases_are_named_as_their_modules_do(bar):
    name, *arguments = shlex.split(bar.command)
    assert re.fullmatch(cases_of(importlib.import_module(f"hf_attn.bench.{name}")), bar.case), bar
    # What a command is told to measure, it is told in the words of the case.
    for option in ("--lengths", "--length", "--density", "--documents", "--dtype", "--sizes"):
        if option in arguments:
            values = list(itertools.takewhile(lambda word: word[:2] != "--", arguments[arguments.index(option) + 1 :]))
            assert any(value in bar.case.split() for value in values) or name == "block_sparse_speed", (bar, values)


LINEAR_FIGURES = {
    "forward": 7.0, "forward and backward": 6.2, "growth": 15.0, "growth to 16k": 3.5, "over masked form": 40.0,
}  # fmt: skip
# A short form of a command, what it does in a second or two, and the case and figures that a bar would read.
SHORT = {
    "linear_speed --heads 1 --length 64 --repeats 1": (
        "1 heads",
        {"forward", "forward and backward", "growth", "growth to 16k", "over masked form"},
    ),
    "landmark_decode --lengths 600 --repeats 2": ("600", {"speed-up"}),
    "selective_speed --lengths 128 --top-k 2 --repeats 2": ("128 2 of 3", {"speed-up"}),
    "head_routed_speed --lengths 128 --top-k 3 --repeats 2": ("128 6/9", {"speed-up"}),
    "blockrank_speed core --documents 3 --repeats 2": ("3", {"speed-up"}),
    "memory_speed --length 64 --repeats 1": ("chunks", {"speed-up", "growth"}),
    "routed_speed --lengths 512 --repeats 2 --backward": ("512", {"speed-up", "limit", "forward and backward"}),
    "block_sparse_speed --dtype fp32 --length 512 --repeats 2 --pattern all": (
        "fp32 all causal blocks",
        {"speed-up", "limit"},
    ),
    "oneformer_speed --parts dinat --pixels 64": ("dinat mini, 64 px", {"speed-up"}),
    "selective_scan_speed --sizes 1 --length 64 --repeats 1": ("n = 1", {"speed-up"}),
    "video_speed --attention --length 512 --mechanism vmoba --density 0.5 --repeats 1": (
        "vmoba 0.5 layer 2",
        {"speed-up", "of bound", "time"},
    ),
    "video_speed --model small --length 512 --mechanism psa --density 0.5 --repeats 1": (
        "psa 0.5",
        {"speed-up", "of bound", "time"},
    ),
    "decode_layer --lengths 1000 --budget 256 --repeats 1 --variants group_max": (
        "1000 group_max",
        {"speed-up", "selector"},
    ),
    "bilevel_speed --side 14 --channels 32 --repeats 2": ("forward", {"copy", "mask", "blocks"}),
}


# A whole model runs in these.
LONGER = ("selective_scan_speed", "oneformer_speed", "video_speed --model")
RUNS = [pytest.param(c, marks=pytest.mark.slow) if c.startswith(LONGER) else c for c in SHORT]


@pytest.mark.parametrize("command", RUNS)
def test_modules_return_what_they_print(command, capsys):
    case, names = SHORT[command]
    module, *arguments = shlex.split(command)
    rows = importlib.import_module(f"hf_attn.bench.{module}").main(arguments)
    printed = capsys.readouterr().out
    assert all(row.line.strip() in printed for row in rows)
    (row,) = (row for row in rows if row.case == case)
    assert set(row.figures) == names and all(value > 0 for value in row.figures.values()) and not row.problem, row


def test_a_child_process_hands_rows_over():
    (row,) = figures.collect("selective_speed", shlex.split("--lengths 64 --top-k 1 --repeats 1"), timeout=120)
    assert row.case == "64 1 of 3" and row.figures["speed-up"] > 0


@pytest.mark.slow
def test_a_child_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="unrecognized arguments: --no-such-option"):
        figures.collect("selective_speed", ["--no-such-option"], timeout=120)
    with pytest.raises(RuntimeError, match="no result within 0 s"):
        figures.collect("selective_speed", [], timeout=0.01)


def test_a_figure_that_a_module_does_not_name_is_refused(monkeypatch, tmp_path):
    module = importlib.import_module("hf_attn.bench.selective_speed")
    monkeypatch.setattr(module, "main", lambda argv: [Row("a", "", {"warp": 1.0})])
    with pytest.raises(ValueError, match="warp"):
        figures.main([str(tmp_path / "rows.json"), "selective_speed"])


def test_verdicts():
    most = replace(BAR, bound=5.0, most=True)
    assert of(BAR, 2.3, 2.21).verdict == "met, 10 % to spare"
    assert of(BAR, 2.3, 2.1).verdict == "met"
    assert of(BAR, 1.9, 1.8).verdict == "missed"
    assert of(BAR, 1.9, 2.4).verdict == "rejected: runs differ by 26%"
    assert of(BAR, 4.0, 3.0).verdict == "met, 10 % to spare"
    assert of(most, 4.0).verdict == "met, 10 % to spare" and of(most, 5.1).verdict == "missed"
    assert Result(BAR, (Figure(2.5), Figure(None, "restless"))).verdict == "rejected: restless"
    assert Result(BAR, (Figure(None, "skipped: needs a GPU"),)).verdict == "skipped: needs a GPU"
    assert of(BAR).verdict == "not measured"


def test_missed_bars_are_explained():
    names = [name.removeprefix(bars.KERNEL_NOTE) for name in WHY]
    assert all(any(bar.name.startswith(name) for bar in BARS) for name in names)
    missed = of(replace(BAR, name="moh-7", bound=1.12), 1.11)
    assert "fused kernel" in missed.why and not of(BAR, 3.0).why
    assert of(replace(BAR, name="no-such-bar"), 1.0).why == "no explanation is recorded"


def test_reading():
    rows = [
        Row("vmoba 0.2 layer 0", "", {"speed-up": 3.0}, 0.01),
        Row("vmoba 0.2 layer 1", "", {"speed-up": 2.5}, 0.02),
        Row("vmoba 0.25 layer 0", "", {"speed-up": 1.0}, 0.02),
        Row("psa 0.2", "", {"speed-up": 1.0}, 0.3),
        Row("wrong", "", {}, problem="check failed"),
    ]
    bar = replace(BAR, case="vmoba 0.2", figure="speed-up")
    assert bars.read(bar, rows) == Figure(2.5)
    assert bars.read(replace(bar, most=True), rows) == Figure(3.0)
    assert "spread by 30%" in bars.read(replace(bar, case="psa 0.2"), rows).problem
    assert bars.read(replace(bar, case="wrong"), rows).problem == "check failed"
    assert "no case 'warp'; there are vmoba" in bars.read(replace(bar, case="warp"), rows).problem
    assert "no figure 'warp'" in bars.read(replace(bar, figure="warp"), rows).problem


def count_calls(monkeypatch, *answers):
    """Commands give these rows in turn; what was called."""
    called = []

    def collect(module, arguments, *, timeout):
        called.append((module, tuple(arguments)))
        answer = answers[min(len(called), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(bars, "collect", collect)
    return called


LINEAR = [Row(f"{n} heads", "", LINEAR_FIGURES, 0.05) for n in (1, 4)]


def test_bars_of_one_command_share_its_runs(monkeypatch):
    called = count_calls(monkeypatch, LINEAR)
    work = Work(bars.chosen(["linear"]), 2)
    work.measure()
    assert called == [("linear_speed", ())] * 2
    verdicts = {result.bar.name: result.verdict for result in work.results()}
    assert verdicts["linear-4"] == "met, 10 % to spare" and verdicts["linear-4-training"] == "met"
    assert len(verdicts) == len(bars.chosen(["linear"])) == 8


def test_a_run_goes_on_where_it_was(monkeypatch, tmp_path):
    store = Store(tmp_path / "bars.csv")
    called = count_calls(monkeypatch, LINEAR, RuntimeError("boom"))
    first = Work(bars.chosen(["linear"]), 2, store)
    first.measure()
    assert {r.verdict for r in first.results()} == {"rejected: boom"} and len(called) == 2
    called = count_calls(monkeypatch, LINEAR)
    second = Work(bars.chosen(["linear"]), 2, Store(store.path))
    assert len(second.todo()) == 1 and second.seconds() == first.bars[0].seconds
    second.measure()
    assert len(called) == 1 and "rejected" not in {r.verdict[:8] for r in second.results()}
    assert not Work(bars.chosen(["linear"]), 2, Store(store.path)).todo()
    assert len(Work(bars.chosen(["linear"]), 2, Store(store.path, again=True), again=True).todo()) == 2
    kept = {r.bar.name: r.values for r in bars.results_of(read_rows([store.path]))}
    assert kept["linear-1"] == (7.0, 7.0)


def test_results_with_and_without_the_cpu_kernel_stand_apart(tmp_path, monkeypatch):
    store = Store(tmp_path / "bars.csv")
    plain, kernel = record.processor_name(), record.processor_name() + record.KERNEL_WORDS
    for machine, values in ((plain, (1.0, 1.1)), (kernel, (3.0, 3.1))):
        monkeypatch.setattr(record, "hardware", lambda device, machine=machine: machine)
        for number, value in enumerate(values):
            row = bars.record_of(BARS[0], number, 2) | {"status": "ok", "speedup": value}
            store.add(row)
    found = bars.results_of(read_rows([store.path]))
    assert [(r.hardware, r.values) for r in found] == [(plain, (1.0, 1.1)), (kernel, (3.0, 3.1))]


@pytest.mark.needs_cxx
def test_the_cpu_kernel_is_a_part_of_the_machine(native_kernel, monkeypatch):
    assert record.KERNEL_WORDS in record.hardware("cpu")
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    assert record.hardware("cpu") == record.processor_name()


def test_only_measured_code_makes_figures_stale(tmp_path, monkeypatch):
    def git(*arguments):
        person = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *person, *arguments], check=True, capture_output=True)

    def version():
        record.git_version.cache_clear()
        return record.git_version()

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    monkeypatch.setattr(record.hf_attn, "__file__", str(tmp_path / "hf_attn" / "__init__.py"))
    git("init")
    for name in ("hf_attn/ops/a.py", "docs/a.md", "hf_attn/bench/results/a.csv", "kernels/k/a.cpp"):
        write(name, "1")
    git("add", "-A")
    git("commit", "-m", "first")
    first = version()
    for name in ("docs/a.md", "hf_attn/bench/results/a.csv"):
        write(name, "2")
    assert version() == first and first
    git("commit", "-am", "second")
    assert version() == first
    write("kernels/k/a.cpp", "2")
    assert version() == first + "-dirty"
    git("commit", "-am", "third")
    assert version() not in (first, first + "-dirty")
    monkeypatch.undo()
    record.git_version.cache_clear()


def test_what_a_machine_lacks_is_skipped_and_shown(monkeypatch):
    called = count_calls(monkeypatch, LINEAR)
    monkeypatch.setattr(bars, "cxx_missing", lambda: "not run: needs a C++ compiler (install g++, or set CXX)")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    work = Work(bars.chosen(["flex", "gpu"]), 1)
    assert work.seconds() == 0
    work.measure()
    verdicts = {result.verdict for result in work.results()}
    assert verdicts == {"skipped: needs a GPU", "skipped: needs a C++ compiler (install g++, or set CXX)"}
    assert not called


def test_command(monkeypatch, tmp_path):
    slow = [replace(row, figures={**row.figures, "forward": 5.5}) if row.case[0] == "1" else row for row in LINEAR]
    count_calls(monkeypatch, slow)
    file, page = tmp_path / "bars.jsonl", tmp_path / "bars.html"
    arguments = ["bench", "bars", "--only", "linear", "--output", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    for text in (
        "2 processes to run",
        "met, 10 % to spare",
        "7 7",
        "missed",
        "fresh pages",
        "load average",
        "1 missed",
    ):
        assert text in words, (text, words)
    assert "python -m hf_attn.bench.linear_speed" in words
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(kept) == 16 and {row["level"] for row in kept} == {"bar"}
    result = CliRunner().invoke(app, [*arguments, "--report", str(page)])
    assert result.exit_code == 0 and "0 processes to run" in result.output, result.output
    text = page.read_text()
    assert "Speed bars" in text and "linear-4-growth" in text and "fresh pages" in text


def test_list_measures_nothing(monkeypatch):
    called = count_calls(monkeypatch, LINEAR)
    for only in (["--only", "paro", "uoe"], ["--only", "paro", "--only", "uoe"], ["--only", "paro,uoe"]):
        result = CliRunner().invoke(app, ["bench", "bars", *only, "--list"])
        assert result.exit_code == 0 and "paro-int8-fp32" in result.output and "uoe-2" in result.output and not called


def test_an_unknown_bar_is_one_clear_line():
    result = CliRunner().invoke(app, ["bench", "bars", "--only", "warp"])
    assert result.exit_code == 2 and "no bar is called 'warp'" in result.output
    assert "names begin with block, moba" in result.output and "--list" in result.output


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_serving_speed(what, tiny_model, capsys):
    """Both baselines of decoding, both figures of a prefill, on a tiny model."""
    serving = importlib.import_module("hf_attn.bench.serving_speed")
    sizes = ["--lengths", "300", "--repeats", "1", "--threads", "1", "--calibration-tokens", "400"]
    (row,) = serving.main([what, "--model", str(tiny_model), *sizes])
    names = {"decode": ("over DynamicCache", "over own dense"), "prefill": ("end to end", "attention")}[what]
    assert row.case == f"{what} 300" and tuple(row.figures) == names and not row.problem
    assert all(value > 0 for value in row.figures.values()) and row.line in capsys.readouterr().out
    with pytest.raises(SystemExit):
        serving.main([what, "--model", str(tiny_model), "--lengths", "1000000"])
    assert "where this model ends" in capsys.readouterr().err


def test_rows_of_gpu_bars():
    gpu_bars = importlib.import_module("hf_attn.bench.gpu_bars")
    found = {
        "case": "MoBA 8k forward",
        "own ms": 2.0,
        "selection ms": 0.3,
        "speed-up": 1.5,
        "limit": 0.3,
        "dense spread": 0.01,
    }
    row = gpu_bars.row_of(found)
    assert row.figures == {"speed-up": 1.5, "limit": 0.3, "selection": 0.15} and row.spread == 0.01
    assert gpu_bars.row_of({"case": "a", "wrong": "error 3 times what is allowed"}).problem.startswith("error 3")
