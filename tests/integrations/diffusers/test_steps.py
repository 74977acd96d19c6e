"""Where the denoising step comes from, and what depends on it."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from diffusers.models.cache_utils import CacheMixin

import hf_attn
from hf_attn.mechanism import observe
from tests.integrations.diffusers.band import SMALL
from tests.integrations.diffusers.tiny import build, close

ALWAYS = {"min_tokens": 0, "block_size": 4, "density": 0.3}


def steps_of(tiny, layer=0):
    """{step: calls} of one layer since the last reset."""
    found = hf_attn.stats(tiny.target)["layers"][layer]["calls_by_step"]
    hf_attn.reset_stats(tiny.target)
    return {int(step): sum(branches.values()) for step, branches in found.items()}


# With contexts that tell the step, contexts that do not, and none at all.
@pytest.mark.parametrize("name", ["wan", "cogvideox", "sd3", "pixart", "dit", "sdxl"])
@pytest.mark.filterwarnings("ignore")
def test_each_step_is_counted_once_in_two_runs(name):
    tiny = build(name)
    hf_attn.apply(tiny.target, "band", **ALWAYS, dense_steps=0)
    for steps in (3, 2):
        tiny.run(num_inference_steps=steps)
        assert steps_of(tiny) == dict.fromkeys(range(steps), tiny.branches)


@pytest.mark.parametrize("dense_steps, dense", [(0, 0), (1, 1), (2, 2), (0.25, 1), (0.5, 2), (1.0, 4), (9, 4)])
def test_dense_steps_are_a_count_or_a_share(dense_steps, dense):
    tiny = build("cogvideox")
    stock = tiny.run(num_inference_steps=4)
    hf_attn.apply(tiny.target, "band", **{**ALWAYS, "dense_steps": dense_steps, "block_size": 2})
    out = tiny.run(num_inference_steps=4)
    totals = hf_attn.stats(tiny.target)["totals"]
    assert (totals["dense_calls"], totals["sparse_calls"]) == (dense * 2, (4 - dense) * 2)
    assert torch.equal(out, stock) == (dense == 4)


def test_a_schedule_gives_a_density_for_each_part_of_the_run():
    tiny = build("flux")
    seen = []
    hf_attn.apply(tiny.target, "band", **{**ALWAYS, "dense_steps": 0, "schedule": [1.0, 0.5, 0.2]})
    with observe(lambda mechanism, call, config: seen.append((call.layer.step, call.layer.num_steps, config.density))):
        tiny.run(num_inference_steps=6)
    assert seen == [(step, 6, density) for step, density in [(2, 0.5), (3, 0.5), (4, 0.2), (5, 0.2)] for _ in range(2)]
    layers = hf_attn.stats(tiny.target)["layers"]
    assert layers[0]["dense_reasons"] == {"schedule: density 1.0 at this step": 2}
    found = layers[0]["density_by_step"]
    assert found["2"] == found["3"] > found["4"] == found["5"]


def test_mechanisms_see_layer_step_and_timestep():
    tiny = build("wan")
    seen = []
    hf_attn.apply(tiny.target, "band", **ALWAYS, dense_steps=0)
    with observe(lambda mechanism, call, config: seen.append(call.layer)):
        tiny.run(num_inference_steps=2)
    assert [(c.index, c.count, c.step, c.num_steps) for c in seen] == [
        (layer, 2, step, 2) for step in range(2) for _ in ("cond", "uncond") for layer in range(2)
    ]
    assert [c.timestep for c in seen[::4]] == tiny.target.scheduler.timesteps.tolist()


def test_a_replaced_scheduler_is_followed_and_the_old_one_released():
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    tiny = build("dit")
    hf_attn.apply(tiny.target, "band", **ALWAYS, dense_steps=0)
    old = tiny.target.scheduler
    tiny.target.scheduler = EulerDiscreteScheduler()
    tiny.run(num_inference_steps=3)
    assert steps_of(tiny) == {0: 1, 1: 1, 2: 1}
    assert "step" not in vars(old)
    tiny.target.scheduler = DDIMScheduler.from_config(tiny.target.scheduler.config)
    tiny.run(num_inference_steps=2)
    assert steps_of(tiny) == {0: 1, 1: 1}
    hf_attn.remove(tiny.target)
    assert not {"step", "set_timesteps"} & set(vars(tiny.target.scheduler))


def test_the_schedulers_signatures_stay_and_a_copy_counts_for_nobody():
    import inspect

    tiny = build("flux")
    before = [inspect.signature(getattr(tiny.target.scheduler, name)) for name in ("step", "set_timesteps")]
    hf_attn.apply(tiny.target, "band", **ALWAYS)
    scheduler = tiny.target.scheduler
    assert [inspect.signature(getattr(scheduler, name)) for name in ("step", "set_timesteps")] == before
    tiny.run(sigmas=[1.0, 0.5])
    twin = copy.deepcopy(scheduler)
    twin.set_timesteps(sigmas=[1.0, 0.7, 0.5])
    assert len(twin.timesteps) == 3
    assert len(scheduler.timesteps) == 2


def test_a_run_that_failed_does_not_shift_the_next_one():
    tiny = build("cogvideox")
    hf_attn.apply(tiny.target, "band", **ALWAYS, dense_steps=0)

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.run(callback_on_step_end=stop)
    hf_attn.reset_stats(tiny.target)
    tiny.run()
    assert steps_of(tiny) == {0: 1, 1: 1}


def test_a_bare_model_counts_changes_of_its_timestep():
    tiny = build("hunyuan15")
    hf_attn.apply(tiny.model, "band", density=0.3, min_tokens=0, dense_steps=1)
    for timestep in (900.0, 900.0, 600.0, 300.0, 900.0):
        tiny.run(timestep=torch.tensor([timestep]))
    assert steps_of(tiny) == {0: 3, 1: 1, 2: 1}


def test_a_bare_model_inside_contexts_follows_them():
    tiny = build("ltx2")
    if "step_index" not in inspect.signature(CacheMixin.cache_context).parameters:
        pytest.skip("contexts of diffusers 0.38 do not tell the step")
    hf_attn.apply(tiny.model, "band", density=0.3, min_tokens=0, dense_steps=0.5)
    for step in range(4):
        with tiny.model.cache_context("cond", step_index=step, num_inference_steps=4):
            tiny.run()
    layer = hf_attn.stats(tiny.model)["layers"][0]
    assert layer["calls_by_step"] == {str(step): {"cond": 1} for step in range(4)}
    assert (layer["dense_calls"], layer["sparse_calls"]) == (2, 2)


def test_an_unknown_number_of_steps_is_said_once():
    tiny = build("ltx2")
    hf_attn.apply(tiny.model, "band", density=0.3, min_tokens=0, dense_steps=0.5)
    with pytest.warns(
        UserWarning, match="number of denoising steps is unknown, so dense_steps as a share does nothing"
    ):
        tiny.run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.run()


def test_short_sequences_and_named_layers_stay_dense():
    tiny = build("wan")
    stock = tiny.run()
    hf_attn.apply(tiny.target, "band", density=0.3)
    assert torch.equal(tiny.run(num_inference_steps=2), stock)
    assert hf_attn.stats(tiny.target)["totals"]["dense_reasons"] == {"fewer than min_tokens=4096 tokens": 8}
    hf_attn.remove(tiny.target)
    hf_attn.apply(tiny.target, "band", density=0.3, layers={0: None, -1: {"density": 1.0}}, **SMALL)
    assert close(tiny.run(), stock)
    layers = hf_attn.stats(tiny.target)["layers"]
    assert layers[0]["dense_reasons"] == {"layers: this layer is set to dense": 4}
    assert layers[1]["density"] == 1.0
