"""Ulysses context parallelism over two processes."""

from __future__ import annotations

import os
import subprocess
import sys


def test_two_processes_compute_what_one_computes(tmp_path):
    command = [sys.executable, "-m", "tests.integrations.diffusers.parallel_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "meet")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    results = [worker.communicate(timeout=300) for worker in workers]
    for out, error in results:
        assert out.strip().endswith("ok"), error[-3000:]
