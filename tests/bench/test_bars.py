"""`hf-attn bench bars`: bars read what their commands print, and the verdict follows the rule."""

from __future__ import annotations

import importlib.util
import shlex

import pytest
from typer.testing import CliRunner

from hf_attn.bench import bars
from hf_attn.bench.bars import BARS, Bar, Result
from hf_attn.cli.app import app

# What the commands print, line by line; the figure that the bar must read.
PRINTED = {
    "block-sparse": (
        "fp32  1/8 of the blocks a row, per head       0.222     498.3     179.4      "
        " 3%      2.76     61.0%", 61,
    ),
    "moba-16k": ("  16384    0.118     gathered     800.1      20.3     300.2    2.41        0.28", 2.41),
    "linear": ("| 4 | 120.1 | 19.40 | 6.19x | 400.0 | 70.00 | 5.71x | 16.2 |", 6.19),
    "lserve-32k": (
        "  32768       per query head     20.11      9.01      5.02      6.01    3.35   "
        " 16.6%     90.1", 3.35,
    ),
    "lserve-selector": (
        "  32768       per query head     20.11      9.01      5.02      6.01    3.35   "
        " 16.6%     90.1", 16.6,
    ),
    "neighborhood-image": (
        "56x56 K=7x7                  fwd           8.01     200.1      70.1         -  "
        "   24.9x     8.7x     13.7%  >=8x, >=5x met", 24.9,
    ),
    "neighborhood-plain": (
        "56x56 K=7x7                  fwd           8.01     200.1      70.1         -  "
        "   24.9x     8.7x     13.7%  >=8x, >=5x met", 8.7,
    ),
    "landmark-16k": ("| 16384 | 4.03 | 1.00 | 4.0 |", 4.0),
    "blockrank-20": ("       20    1408        17.5           5.6      3.11", 3.11),
    "moh-4096": ("   4096 6/9         gathered   1.2e-06     210.0     190.0      1.11      0.74", 1.11),
    "uoe-1": ("| 4096 | 1 of 3 | 100.0 | 20.1 | 4.98 |", 4.98),
    "titans": ("chunks 4.5x faster; time(4096) / time(1024) = 4.10", 4.5),
    "titans-growth": ("chunks 4.5x faster; time(4096) / time(1024) = 4.10", 4.1),
    "lamamba-scan-16": ("| 16 | 120.0 | 60.11 | 2.0x | 200.0 | 1e-06 |", 2.0),
    "psa-bf16-0.2": ("bf16      0.2     0.200     182.0      80.0      12.0      2.28     45.5%", 2.28),
    "paro-0.25": ("   0.250     300.0     130.0      10.0      3.3%      2.31     57.8%", 2.31),
    "vmoba-0.2": (
        "vmoba (blocks)                                0.2    0.201     300     110 "
        " 1.00     2.72   4.98    55%", 2.72,
    ),
    "biformer": ("forward                50.10     12.00     4.17x     14.00     3.58x", 4.17),
    "emov2-window": (
        "spanned 32x32 window 8 dim 160         8.10      2.00    4.1x     20.00     "
        " 6.00    3.3x      3%", 4.1,
    ),
    "overlock-mixing": (
        "mixing 28x28 K 13 4 x 16              20.10      5.00    4.0x     40.00    "
        " 15.00    2.7x      3%", 4.0,
    ),
    "dinat": ("dinat backbone, 512 px                        1.0e-06      900.0       95.0    9.47x", 9.47),
    "flex-causal-fp32-4096-1t": ("lower   fp32     4096     100.0      40.0      55.0    0.60    1.38  ok", 1.38),
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_figures_are_read(name):
    line, value = PRINTED[name]
    (bar,) = (bar for bar in BARS if bar.name == name)
    found = bars.read(bar, [(f"head of the table\n{line}\nload average 1.0", "")])
    assert found.values == (value,), found


def test_bars_are_unique_and_their_modules_exist():
    assert len({bar.name for bar in BARS}) == len(BARS) > 50
    for bar in BARS:
        assert importlib.util.find_spec(f"hf_attn.bench.{shlex.split(bar.command)[0]}") is not None, bar


def test_verdicts():
    bar, most = Bar("a", "", "x", "", 2.0), Bar("b", "", "x", "", 5.0, most=True)
    assert Result(bar, (2.3, 2.21)).verdict == "met, 10 % to spare"
    assert Result(bar, (2.3, 2.1)).verdict == "met"
    assert Result(bar, (1.9, 1.8)).verdict == "missed"
    assert Result(bar, (1.9, 2.4)).verdict == "rejected: runs differ by 26%"
    assert Result(bar, (4.0, 3.0)).verdict == "met, 10 % to spare"
    assert Result(most, (4.0,)).verdict == "met, 10 % to spare" and Result(most, (5.1,)).verdict == "missed"
    assert Result(bar, (), "restless").verdict == "rejected: restless"


def test_what_went_wrong_is_said():
    (bar,) = bars.chosen(["linear"])
    assert bars.read(bar, [("", "the command failed: boom")]).verdict == "rejected: the command failed: boom"
    assert "CHECK FAILED" in bars.read(bar, [("x CHECK FAILED: differs", "")]).verdict
    assert "no such figure" in bars.read(bar, [("nothing", "")]).verdict


@pytest.mark.slow
def test_a_command_that_fails_says_why():
    text, problem = bars.run("linear_speed --no-such-option")
    assert not text and "unrecognized arguments" in problem


def test_a_restless_run_is_rejected():
    bar = next(bar for bar in BARS if bar.name.startswith("flex"))
    line = PRINTED["flex-causal-fp32-4096-1t"][0].replace("ok", "rejected: dense spread 20%")
    assert bars.read(bar, [(line, "")]).verdict == "rejected: restless dense or peer run"


def test_command(monkeypatch, tmp_path):
    monkeypatch.setattr(bars, "run", lambda command: (PRINTED["linear"][0], ""))
    file = tmp_path / "bars.txt"
    result = CliRunner().invoke(app, ["bench", "bars", "--only", "linear", "--output", str(file)])
    assert result.exit_code == 0, result.output
    for text in (result.output, file.read_text()):
        assert "met, 10 % to spare" in text and "6.19 6.19" in text and "load average" in text
    assert "python -m hf_attn.bench.linear_speed --heads 4" in file.read_text()


def test_an_unknown_bar_is_one_clear_line():
    result = CliRunner().invoke(app, ["bench", "bars", "--only", "warp"])
    assert result.exit_code == 2 and "no bar is called 'warp'; there are block-sparse" in result.output
