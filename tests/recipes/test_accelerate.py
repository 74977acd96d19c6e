"""The configs for `accelerate launch`: accelerate accepts every key, and a recipe runs in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).parents[2]
CONFIGS = {"fsdp": "FSDP", "deepspeed_zero3": "DEEPSPEED", "cpu": "MULTI_GPU"}


def path(name):
    return ROOT / "recipes" / "accelerate" / f"{name}.yaml"


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it(name):
    config = ClusterConfig.from_yaml_file(str(path(name)))  # raises for keys it does not know
    assert config.distributed_type == DistributedType(CONFIGS[name])
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for section in ("fsdp_config", "deepspeed_config"):
        for key in getattr(config, section):
            names = {key, f"fsdp_{key}", f"deepspeed_{key}"}
            assert names & known.keys(), f"{section} has {key}, which accelerate launch does not take"


def test_fsdp_becomes_a_plugin(monkeypatch):
    """From the file to the plugin, by way of the environment that the launcher makes."""
    command = ["--config_file", str(path("fsdp")), "--num_processes", "2", "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith("FSDP_") or key == "ACCELERATE_USE_FSDP":
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and not plugin.cpu_ram_efficient_loading


def test_every_conversion_recipe_names_them():
    for recipe in ("moh", "uoe", "blockrank", "landmark", "moba_convert"):
        assert "recipes/accelerate" in (ROOT / "recipes" / recipe / "README.md").read_text(), recipe


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Two processes of one batch each learn what the recipe shows, and write one result."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(path("cpu"))]
    command += ["--main_process_port", "29533", "recipes/moh/train.py", "--smoke", "--output", str(tmp_path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--variants", "learned"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| learned |") == 1
    found = json.loads((tmp_path / "results.json").read_text())["0"]
    assert found["learned"]["loss"] < found["learned"]["before"] - 0.1
    state = json.loads(next((tmp_path / "learned-0").glob("checkpoint-*/trainer_state.json")).read_text())
    # 32 rows in batches of 4, over two processes: 4 steps an epoch.
    assert state["max_steps"] == 12 and state["epoch"] == pytest.approx(3)
