"""`hf-attn tune`: the search on a device of our own, the table it writes, and `--check` for real on one kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_attn.bench import tuning, tuning_gpu
from hf_attn.bench.kernel_calls import CALLS, Shape
from hf_attn.bench.timing import Timing
from hf_attn.cli.app import app
from hf_attn.ops.hfattn_sparse import launch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
run = CliRunner().invoke


class Pretended:
    """Time is the sum of distances to the best configuration; wide chunks do not fit, and 16 is wrong."""

    def __init__(self, best: dict[str, int], interrupt_after: int = 10**9) -> None:
        self.target, self.best, self.left, self.timed = "sm_99", best, interrupt_after, []
        self.name = "a device of our own"

    def prepare(self, pairs):
        self.prepared = getattr(self, "prepared", 0) + len(pairs)

    def obstacle(self, task, config):
        return "shared memory" if config["CHUNK"] > 64 else None

    def wrong(self, task, configs):
        return [config["CHUNK"] == 16 for config in configs]

    def time(self, task, configs):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.timed.append(task.key)
        return [Timing((1 + sum(abs(c[name] - self.best[name]) for name in c),) * 7) for c in configs]


def tune_task(task: tuning.Task, device: Pretended) -> tuning.Outcome:
    """One round around the table's configuration."""
    current = launch.find_row(task.kernel, device.target, task.dtype, task.head_dim)["config"]
    return tuning.tune_task(task, device, tuning.candidates(current, 40))


def tasks(count: int) -> list[tuning.Task]:
    return [tuning.Task("block_means", "bfloat16", dim, CALLS[0], Shape()) for dim in (64, 128, 256)[:count]]


def test_candidates_are_neighbours_the_current_one_first():
    found = tuning.candidates({"BLOCK_M": 16, "num_warps": 1, "num_stages": 1}, 100)
    assert found[0] == {"BLOCK_M": 16, "num_warps": 1, "num_stages": 1}
    assert {c["BLOCK_M"] for c in found} == {16, 32} and {c["num_warps"] for c in found} == {1, 2}
    assert {c["num_stages"] for c in found} == {1, 2} and len(found) == 8
    assert len(tuning.candidates({"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}, 40)) == 40


def test_search_takes_the_fastest_that_fits_and_is_right():
    device = Pretended({"CHUNK": 128, "num_warps": 8})
    outcome = tune_task(tasks(1)[0], device)
    assert outcome.config == {"CHUNK": 64, "num_warps": 8} and outcome.milliseconds < outcome.current_milliseconds
    # CHUNK 32 is the current one; 64 fits; 16 computes wrongly in each of three numbers of warps.
    assert outcome.current == {"CHUNK": 32, "num_warps": 4} and outcome.dropped == {"wrong results": 3}
    with launch.forced_config():
        current = tune_task(tasks(1)[0], Pretended({"CHUNK": 32, "num_warps": 4}))
    assert current.config == current.current


def test_no_change_for_what_repeats_differ_by():
    class Even(Pretended):
        def time(self, task, configs):
            return [Timing((1 - 0.001 * number,) * 7) for number in range(len(configs))]

    outcome = tune_task(tasks(1)[0], Even({}))
    assert outcome.config == outcome.current and outcome.milliseconds == outcome.current_milliseconds


def test_a_wrong_or_impossible_current_configuration_is_an_error():
    class Wrong(Pretended):
        def wrong(self, task, configs):
            return [True] * len(configs)

    class Impossible(Pretended):
        def obstacle(self, task, config):
            return "shared memory"

    with pytest.raises(RuntimeError, match="block_means bfloat16 64 computes wrongly"):
        tune_task(tasks(1)[0], Wrong({}))
    with pytest.raises(RuntimeError, match="cannot run: shared memory"):
        tune_task(tasks(1)[0], Impossible({}))


def test_an_interrupted_run_goes_on_and_the_table_keeps_other_rows(tmp_path):
    output = tmp_path / "new" / "table.json"
    other = {"target": "gfx942", "dtype": "*", "head_dim": 64, "config": {"CHUNK": 16, "num_warps": 2}}
    old = {"target": "sm_99", "dtype": "bfloat16", "head_dim": 64, "config": {"CHUNK": 16, "num_warps": 1}}
    tuning.write_table(output, {"block_means": [other, old], "another": [other]})
    best = {"CHUNK": 64, "num_warps": 8}
    first, second = Pretended(best, interrupt_after=2), Pretended(best)
    with pytest.raises(KeyboardInterrupt):
        list(tuning.tune(tasks(3), first, output))
    assert first.timed == ["block_means bfloat16 64", "block_means bfloat16 128"]
    ended = [search.task.head_dim for search in tuning.tune(tasks(3), second, output)]
    assert ended == [64, 128, 256] and second.timed == ["block_means bfloat16 256"]

    rows = launch.read_table(output)
    assert rows["another"] == [other] and rows["block_means"][0] == other
    assert [(r["head_dim"], r["config"]) for r in rows["block_means"][1:]] == [(n, best) for n in (64, 128, 256)]
    assert [p.name for p in output.parent.iterdir()] == ["table.json"], "nothing is left behind"
    assert len(output.read_text().splitlines()) == 2 + 2 + 2 + 5, "one row a line"


def test_rounds_walk_until_nothing_improves(tmp_path):
    """From 32 to 64 chunks and from 4 warps to 1, one step a round; then the search has settled."""
    device = Pretended({"CHUNK": 64, "num_warps": 1})
    (search,) = tuning.tune(tasks(1), device, tmp_path / "table.json", limit=5, rounds=9)
    assert search.best == {"CHUNK": 64, "num_warps": 1} and search.end == "settled" and 2 < search.rounds < 9
    assert search.outcome.current == {"CHUNK": 32, "num_warps": 4} == search.start
    assert search.outcome.current_milliseconds == pytest.approx(36e3) and search.outcome.milliseconds == 1e3
    assert len(search.tried) == len({str(c) for c in search.tried}) and device.prepared >= search.outcome.tried
    (last,) = tuning.tune(tasks(1), Pretended(device.best), tmp_path / "other.json", limit=5, rounds=1)
    assert last.rounds == 1 and last.best != search.best


def test_a_failing_task_does_not_end_the_others(tmp_path):
    class Broken(Pretended):
        def wrong(self, task, configs):
            return [task.head_dim == 64] * len(configs)

    output = tmp_path / "table.json"
    found = list(tuning.tune(tasks(2), Broken({"CHUNK": 64, "num_warps": 8}), output))
    assert found[0].end.startswith("failed: block_means bfloat16 64 computes wrongly") and found[1].end == "settled"
    assert [row["head_dim"] for row in launch.read_table(output)["block_means"]] == [128]
    assert list(tuning.tune(tasks(1), Pretended({}), tmp_path / "none.json", seconds=-1)) == []
    again = Pretended({"CHUNK": 64, "num_warps": 8})
    assert [search.end for search in tuning.tune(tasks(2), again, output)] == ["settled"] * 2
    assert again.timed == ["block_means bfloat16 64"], "what failed runs again, what was done does not"


def test_own_table_comes_before_the_committed_one(tmp_path, monkeypatch):
    path = tmp_path / "own.json"
    row = {"target": "interpreter", "dtype": "float32", "head_dim": 64, "config": {"CHUNK": 48, "num_warps": 1}}
    tuning.write_table(path, {"block_means": [row]})
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    committed = launch.config("block_means", head_dim=64, **options)
    monkeypatch.setenv(launch.TABLE_VARIABLE, str(path))
    assert launch.config("block_means", head_dim=64, **options) == row["config"]
    assert launch.config("block_means", head_dim=65, **options) == committed
    broken = tmp_path / "broken.json"
    broken.write_text("[]")
    for wrong in (broken, tmp_path / "none.json"):
        monkeypatch.setenv(launch.TABLE_VARIABLE, str(wrong))
        with pytest.raises(ValueError, match=f"{wrong.name} is not a launch table"):
            launch.config("block_means", head_dim=64, **options)


def test_output_of_a_checkout_and_of_an_installed_package(monkeypatch, tmp_path):
    assert tuning.default_output() == launch.TABLE
    monkeypatch.setattr(launch, "TABLE", tmp_path / "a" / "b" / "c" / "launch_table.json")
    with pytest.raises(ValueError, match="give --output FILE, and set HF_ATTN_LAUNCH_TABLE=FILE"):
        tuning.default_output()
    monkeypatch.setenv(launch.TABLE_VARIABLE, "mine.json")
    assert tuning.default_output() == Path("mine.json")


def test_only_the_launches_of_the_kernel_are_its_own():
    task = tasks(1)[0]
    found = tuning.own_launches(task, "sm_90", {"CHUNK": 16, "num_warps": 2})
    assert [one.kernel.__name__ for one in found] == ["block_means", "block_means"]
    assert all(one.meta["CHUNK"] == 16 and one.options == {"num_warps": 2} for one in found)


def test_errors_are_counted_where_the_exact_result_is_finite():
    exact = torch.tensor([1.0, float("-inf"), 4.0], dtype=torch.float64)
    got = torch.tensor([1.5, float("-inf"), 4.0])
    ((worst, unit),) = tuning_gpu._errors([got], [exact])
    assert worst == 0.5 and unit == torch.finfo(torch.float32).eps * 4
    assert tuning_gpu._errors([got * float("nan")], [exact])[0][0] == float("inf")
    assert tuning_gpu._errors([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == [(0.5, 1e-3)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_names_check():
    result = run(app, ["tune"], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1
    assert "found none; `hf-attn tune --check` compiles every configuration" in result.output


BAD = {
    "target": (["--check", "--target", "sm_12"], "--target must be one of 'sm_80', 'sm_90', 'gfx942', got 'sm_12'"),
    "target without check": (["--target", "sm_80"], "--target goes with --check"),
    "dtype": (["--check", "--dtype", "int8"], "--dtype must be one of 'bf16', 'fp16', 'fp32', got 'int8'"),
    "kernel": (["--check", "--kernel", "nothing"], "no kernel is called nothing; there are block_means"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    arguments, message = BAD[name]
    result = run(app, ["tune", *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and message in result.output and len(result.output.strip().splitlines()) == 1


def test_help_has_an_example():
    result = run(app, ["tune", "--help"])
    assert result.exit_code == 0 and "hf-attn tune --check" in result.output


def test_check_compiles_for_real(tmp_path):
    """In a process of its own: here kernels may be interpreted ones. A table that cannot work is found out."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "COLUMNS": "300"}
    command = [sys.executable, "-c", "from hf_attn.cli import main; main()", "tune", "--check", "--target", "sm_90"]
    command += ["--kernel", "block_means", "--dtype", "bf16"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "block_means" in line]
    assert "CHUNK=32 num_warps=4" in line and "232448" in line and "ok" in line

    bad = tmp_path / "bad.json"
    row = {"target": "sm_90", "dtype": "*", "head_dim": 256, "config": {"CHUNK": 33, "num_warps": 4}}
    bad.write_text(json.dumps({"block_means": [row]}))
    environment[launch.TABLE_VARIABLE] = str(bad)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "does not compile" in done.stdout, done.stdout + done.stderr


def test_the_device_at_hand_compares_and_times(monkeypatch):
    """The class for GPUs, on the interpreter: the call under each configuration, against the exact result."""
    if not launch.interpreting():
        pytest.skip("needs the interpreter")
    device = object.__new__(tuning_gpu.Gpu)
    device.target, device.repeats, device._inputs = "interpreter", 7, None
    monkeypatch.setattr(tuning_gpu.Gpu, "clock", "cpu")
    shape = Shape(torch.float32, 8, q_len=130, k_len=260, heads=1, kv_heads=1, device="cpu")
    task = tuning.Task("block_means", "float32", 8, CALLS[0], shape)
    configs = [{"CHUNK": 64, "num_warps": 4}, {"CHUNK": 128, "num_warps": 4}]
    assert device.wrong(task, configs) == [False, False]
    assert [len(timing.samples) for timing in device.time(task, configs)] == [7, 7]
    original = tuning_gpu.Gpu._run

    def broken(self, task, arguments, config):
        results = original(self, task, arguments, config)
        return [r + 1 for r in results] if config == configs[1] else results

    monkeypatch.setattr(tuning_gpu.Gpu, "_run", broken)
    assert device.wrong(task, configs) == [False, True]
