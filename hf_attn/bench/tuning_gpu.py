"""The GPU that `hf-attn tune` searches on: it compiles in many processes, checks exact results and times graphs."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hf_attn.bench.kernel_calls import available_calls
from hf_attn.bench.runner import measure
from hf_attn.bench.timing import Timing
from hf_attn.bench.tuning import Config, Task, own_launches
from hf_attn.ops.hfattn_sparse import launch


class Gpu:
    """The device at hand. `jobs`: processes that compile."""

    clock = "cuda"  # device of the rounds

    def __init__(self, repeats: int = 7, jobs: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "hf-attn tune needs a CUDA or ROCm device, and found none; `hf-attn tune --check` compiles every "
                "configuration without one"
            )
        self.device = torch.device("cuda")
        import triton

        self.target = launch.target_of(self.device)
        self.name = f"{torch.cuda.get_device_name()}, triton {triton.__version__}"
        self.repeats, self.jobs = repeats, jobs or max(1, (os.cpu_count() or 1) - 1)
        properties = torch.cuda.get_device_properties(self.device)
        self._shared = getattr(properties, "shared_memory_per_block_optin", None) or properties.shared_memory_per_block
        self._inputs: tuple[Task, tuple[Any, ...], list[Tensor]] | None = None
        self._obstacles: dict[str, Future[str | None]] = {}
        self._pool: ProcessPoolExecutor | None = None

    def prepare(self, pairs: list[tuple[Task, Config]]) -> None:
        """Start compiling; `obstacle` waits for its own program only, so that the first task is timed meanwhile."""
        if self._pool is None:
            # A child of fork would share this process's device context.
            self._pool = ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"))
        for t, config in pairs:
            order = (t.kernel, t.dtype, t.head_dim, t.call.name, t.shape, self.target, config, self._shared)
            if (key := f"{t.key} {config}") not in self._obstacles:
                self._obstacles[key] = self._pool.submit(_obstacle_of, order)

    def obstacle(self, task: Task, config: Config) -> str | None:
        future = self._obstacles.get(f"{task.key} {config}")
        return future.result() if future else find_obstacle(task, self.target, config, self._shared)

    def close(self) -> None:
        """Drop what waits to be compiled and end the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def wrong(self, task: Task, configs: list[Config]) -> list[bool]:
        arguments, exact = self._arguments(task)
        errors = [_errors(self._run(task, arguments, config), exact) for config in configs]
        allowed = [2 * (error + margin) for error, margin in errors[0]]
        return [any(error > most for (error, _), most in zip(found, allowed, strict=True)) for found in errors]

    def time(self, task: Task, configs: list[Config]) -> list[Timing]:
        arguments, _ = self._arguments(task)
        runs = {
            str(number): lambda config=config: self._run(task, arguments, config)
            for number, config in enumerate(configs)
        }
        # A sample of a millisecond stands clear of what waiting for the device costs.
        times = measure(runs, self.clock, repeats=self.repeats, launches=False, sample=1e-3)
        return [found.timing for found in times.values()]

    def _arguments(self, task: Task) -> tuple[tuple[Any, ...], list[Tensor]]:
        if self._inputs is None or self._inputs[0] != task:
            self._inputs = None
            torch.manual_seed(0)
            arguments = task.call.arguments(task.shape)
            self._inputs = task, arguments, _tensors(task.call.exact(arguments))
        return self._inputs[1:]

    def _run(self, task: Task, arguments: tuple[Any, ...], config: Config) -> list[Tensor]:
        with launch.forced_config(**{task.kernel: config}):
            return _tensors(task.call.run(task.shape, arguments))


def find_obstacle(task: Task, target: str, config: Config, shared: int) -> str | None:
    """Why a configuration cannot run on a target with `shared` bytes of shared memory a program; None when it can."""
    from hf_attn.ops.hfattn_sparse import aot

    try:
        programs = aot.distinct(own_launches(task, target, config))
    except Exception:  # a path may refuse tiles that do not divide one another
        return "refused"
    for program in programs:
        try:
            built = aot.compile_launch(program)
        except Exception:  # whatever the compiler makes of a candidate, the next one may do
            return "does not compile"
        found = aot.problem(built, limit=shared)
        if found is not None:
            return "spills" if found.startswith("spills") else "shared memory"
    return None


def _obstacle_of(order: tuple[Any, ...]) -> str | None:
    """`find_obstacle` in a process of its own: calls travel by name."""
    kernel, dtype, head_dim, call, shape, target, config, shared = order
    (call,) = (one for one in available_calls() if one.name == call)
    return find_obstacle(Task(kernel, dtype, head_dim, call, shape), target, config, shared)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _errors(got: list[Tensor], exact: list[Tensor]) -> list[tuple[float, float]]:
    """Of every result: the largest error, and one unit in the last place of the largest value.

    Integers err by the share of entries that differ; a last digit of a score may decide one in a thousand.
    """
    found = []
    for result, wanted in zip(got, exact, strict=True):
        if not result.is_floating_point():
            found.append((float((result != wanted).float().mean()), 1e-3))
            continue
        finite = wanted.isfinite()
        error = torch.where(finite, result.to(wanted.dtype) - wanted, 0).abs().nan_to_num(float("inf"))
        scale = torch.where(finite, wanted, 0).abs()
        worst, largest = (float(t.max()) if t.numel() else 0.0 for t in (error, scale))
        found.append((worst, torch.finfo(result.dtype).eps * largest))
    return found
