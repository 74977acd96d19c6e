"""PAROAttention on tiny pipelines: every class, calibration and resuming, plans on disk."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import hf_attn
from hf_attn.analysis.paro_calibration import _FILE
from hf_attn.mechanism import observe
from hf_attn.mechanisms.paroattention import attended
from tests.integrations.diffusers.tiny import PIPELINES, build, close

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = {"min_tokens": 0, "dense_steps": 0}


def calibrated(tiny, **settings):
    settings = {"density": 0.5, "block_size": 4, **settings}
    call = dict(tiny.call)
    if tiny.target is not tiny.model:
        call["num_inference_steps"] = tiny.steps
    return hf_attn.calibrate(tiny.target, "paro", calls=[call], **settings)


@pytest.mark.parametrize("name", PIPELINES)
def test_density_one_is_stock_and_sparse_runs_are_masked_attention(name):
    """A calibrated plan at density 1, and without a plan at 0.5 against fp64 on the captured tensors."""
    tiny = build(name)
    stock = tiny.run()
    plan = calibrated(tiny, density=1.0)
    assert torch.equal(tiny.run(), stock)
    hf_attn.apply(tiny.target, "paroattention", plan=plan, strict=True, **OPTIONS)
    assert close(tiny.run(), stock)
    totals = hf_attn.stats(tiny.target)["totals"]
    assert (totals["calls"], totals["fallbacks"], totals["dense_calls"]) == (tiny.calls, 0, 0), totals
    assert totals["density"] == 1.0
    hf_attn.remove(tiny.target)

    seen = []
    hf_attn.apply(tiny.target, "paroattention", density=0.4, block_size=4, **OPTIONS)
    with observe(lambda mechanism, call, config: seen.append((call, config))):
        tiny.run()
    assert len(seen) == tiny.calls
    for call, config in seen:
        mask = attended(call, config, torch.arange(call.q_len))
        expected = scaled_dot_product_attention(
            call.query.double(), call.key.double(), call.value.double(), attn_mask=mask, scale=call.scale
        )
        real = call.tokens.real_keys()
        rows = slice(None) if real is None else real[0]
        got = hf_attn.mechanism.get_mechanism("paroattention").attend(call, config).double()
        assert (got - expected)[:, :, rows].abs().max() <= 1e-5 * call.value.abs().max()
    totals = hf_attn.stats(tiny.target)["totals"]
    assert totals["fallbacks"] == 0 and totals["sparse_calls"] == totals["calls"] == tiny.calls
    assert totals["density"] < 1.0 and (hf_attn.stats(tiny.target)["layers"][0]["density"] or 0) > 0.3


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan", "flux"])
def test_calibrate_generate_and_remove(name):
    tiny = build(name)
    stock = tiny.run()
    plan = calibrated(tiny)
    hf_attn.apply(tiny.target, "paroattention", plan=plan, **OPTIONS)
    sparse = tiny.run()
    assert sparse.isfinite().all() and not torch.equal(sparse, stock)
    found = hf_attn.stats(tiny.target)
    assert found["totals"]["fallbacks"] == found["totals"]["dense_calls"] == 0
    assert all(0.35 < layer["density"] < 1 for layer in found["layers"].values())
    assert json.loads(json.dumps(found))["options"]["plan"] == "in memory"
    hf_attn.remove(tiny.target)
    assert torch.equal(tiny.run(), stock)


@pytest.mark.parametrize("qk_bits, pv_bits", [(8, None), (8, 8), (4, 4)])
def test_quantised_products(qk_bits, pv_bits):
    tiny = build("hunyuan")
    plan = calibrated(tiny)
    hf_attn.apply(tiny.target, "paroattention", plan=plan, **OPTIONS)
    sparse = tiny.run()
    hf_attn.remove(tiny.target)
    hf_attn.apply(tiny.target, "paroattention", plan=plan, qk_bits=qk_bits, pv_bits=pv_bits, **OPTIONS)
    low = tiny.run()
    assert not torch.equal(low, sparse)
    assert (low - sparse).norm() <= (0.2 if qk_bits == 4 else 0.02) * sparse.norm()


class Killed(Exception):
    pass


@pytest.mark.parametrize("rule", ["mass", "paper"])
def test_killed_and_resumed_gives_the_same_plan(rule, tmp_path):
    tiny = build("wan")
    calls = [{**tiny.call, "num_inference_steps": 3}, {**tiny.call, "prompt": "a dog", "num_inference_steps": 3}]
    options = {"density": 0.5, "block_size": 4, "order_rule": rule, "row_sample": 0.7}
    whole = hf_attn.calibrate(tiny.target, "paro", calls=calls, **options)
    ticks = []

    def kill(done, total):
        ticks.append((done, total))
        if done == 7:
            raise Killed

    resumable = {**options, "checkpoint": tmp_path / "work", "checkpoint_seconds": 0}
    with pytest.raises(Killed):
        hf_attn.calibrate(tiny.target, "paro", calls=calls, progress=kill, **resumable)
    assert hf_attn.stats(tiny.target)["mechanism"] is None
    assert (tmp_path / "work" / _FILE).is_file() and {total for _, total in ticks} == {12}
    with pytest.raises(ValueError, match="holds a calibration with other arguments"):
        hf_attn.calibrate(tiny.target, "paro", calls=calls, **{**resumable, "density": 0.4})
    again = hf_attn.calibrate(tiny.target, "paro", calls=calls, **resumable)
    assert torch.equal(again.order, whole.order) and torch.equal(again.block_mask, whole.block_mask)
    assert again.config.timesteps == whole.config.timesteps and not list((tmp_path / "work").iterdir())


def test_save_and_load_bit_for_bit(tmp_path):
    tiny = build("cogvideox")
    plan = calibrated(tiny)
    hf_attn.apply(tiny.target, "paroattention", plan=plan, **OPTIONS)
    sparse = tiny.run()
    hf_attn.save_plan(tiny.target, tmp_path / "repo" / "sparse_attention")
    names = {path.name for path in (tmp_path / "repo" / "sparse_attention").iterdir()}
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= names
    hf_attn.remove(tiny.target)
    loaded = hf_attn.load_plan(tiny.target, tmp_path / "repo", **OPTIONS)
    assert type(loaded) is hf_attn.ParoPlan
    assert torch.equal(loaded.order, plan.order) and torch.equal(loaded.block_mask, plan.block_mask)
    assert loaded.tables().layers == plan.tables().layers and loaded.config.density == 0.5
    assert torch.equal(tiny.run(), sparse)
    assert hf_attn.stats(tiny.target)["options"]["plan"] == str(tmp_path / "repo")


def test_plans_of_something_else_are_refused(tmp_path):
    tiny = build("wan")
    plan = calibrated(tiny)
    hf_attn.save_plan(plan, tmp_path / "plan")
    with pytest.raises(ValueError, match="made for WanTransformer3DModel, but this is CogVideoXTransformer3DModel"):
        hf_attn.load_plan(build("cogvideox").target, tmp_path / "plan")
    with pytest.raises(ValueError, match="the plan has 2 layers, but WanTransformer3DModel has 3"):
        hf_attn.load_plan(build("wan", layers=3).target, tmp_path / "plan")
    with pytest.raises(ValueError, match="density is 0.3, but the plan was made for 0.5"):
        hf_attn.load_plan(tiny.target, tmp_path / "plan", density=0.3)
    with pytest.raises(ValueError, match="block_size is 8, but the plan was made with 4"):
        hf_attn.load_plan(tiny.target, tmp_path / "plan", block_size=8)
    with pytest.raises(ValueError, match="holds no plan"):
        hf_attn.load_plan(tiny.target, tmp_path)
    tiny.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a WanTransformer3DModel, not a ParoPlan"):
        hf_attn.load_plan(tiny.target, tmp_path / "model")
    with pytest.raises(ValueError, match="has no mechanism, so there is nothing to save"):
        hf_attn.save_plan(tiny.target, tmp_path / "x")
    with pytest.raises(TypeError, match="plan must be a ParoPlan"):
        hf_attn.apply(tiny.target, "paroattention", plan="folder")


@pytest.mark.parametrize("strict", [False, True])
def test_another_size_runs_dense_or_raises(strict):
    tiny = build("wan")
    plan = calibrated(tiny)
    stock = tiny.run(height=64)
    hf_attn.apply(tiny.target, "paroattention", plan=plan, strict=strict, **OPTIONS)
    message = "the plan was made for a grid of 3x2x3 tokens, but layer 0 has 3x4x3"
    if strict:
        with pytest.raises(ValueError, match=message):
            tiny.run(height=64)
        return
    assert close(tiny.run(height=64), stock)
    totals = hf_attn.stats(tiny.target)["totals"]
    assert totals["fallbacks"] == totals["calls"] and any(message in reason for reason in totals["fallback_reasons"])


def test_both_transformers_of_a_two_stage_model_have_layers_of_one_plan():
    tiny = build("wan", second=True)
    stock = tiny.run(num_inference_steps=8)
    with pytest.raises(ValueError, match=r"layers \[2, 3\] of 4 were never called"):
        hf_attn.calibrate(tiny.target, "paro", calls=[{**tiny.call, "num_inference_steps": 2}], block_size=4)
    call = {**tiny.call, "num_inference_steps": 8}
    plan = hf_attn.calibrate(tiny.target, "paro", calls=[call], density=1.0, block_size=4)
    assert len(plan.config.layer_shapes) == 4
    hf_attn.apply(tiny.target, "paroattention", plan=plan, strict=True, **OPTIONS)
    assert close(tiny.run(num_inference_steps=8), stock)
    assert hf_attn.stats(tiny.target)["totals"]["fallbacks"] == 0


def test_bad_settings():
    tiny = build("wan")
    for options, message in [
        ({"density": 0}, r"density must be a number in \(0, 1\], got 0"),
        ({"order_rule": "best"}, "order_rule must be one of 'mass', 'paper', got 'best'"),
        ({"scope": "all"}, "scope must be one of"),
        ({"mask_groups": 0}, "mask_groups must be an integer >= 1, got 0"),
        ({"prompts": ["a"]}, "give either calls="),
        ({"calls": []}, "at least one generation"),
    ]:
        with pytest.raises(ValueError, match=message):
            hf_attn.calibrate(tiny.target, "paro", **{"calls": [tiny.call], **options})
    assert hf_attn.stats(tiny.target)["mechanism"] is None


def test_the_command_line_writes_a_plan(tmp_path):
    from typer.testing import CliRunner

    from hf_attn.cli.app import app

    tiny = build("wan")
    tiny.target.save_pretrained(tmp_path / "pipe")
    line = ["calibrate", "paro", str(tmp_path / "pipe"), "--output", str(tmp_path / "plan"), "--size", "32x48x9"]
    line += [
        "--steps",
        "2",
        "--block-size",
        "4",
        "--density",
        "0.5",
        "-c",
        "max_sequence_length=16",
        "-o",
        "scope=head",
    ]
    done = CliRunner().invoke(app, line, env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    assert "calibrate 100%" in done.output and "2 layers x 2 heads, 2 mask sets" in done.output
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "plan"}
    plan = hf_attn.load_plan(tiny.target, tmp_path / "plan", **OPTIONS)
    assert plan.config.base_model == str(tmp_path / "pipe") and plan.config.settings["scope"] == "head"
    tiny.run()
    assert hf_attn.stats(tiny.target)["totals"]["fallbacks"] == 0
    again = CliRunner().invoke(app, line, env={"COLUMNS": "400"})
    assert again.exit_code == 2 and "plan" in again.output
    line[line.index("32x48x9")] = "big"
    line[line.index(str(tmp_path / "plan"))] = str(tmp_path / "other")
    wrong = CliRunner().invoke(app, line, env={"COLUMNS": "400"})
    assert wrong.exit_code == 2 and "--size must be HEIGHTxWIDTH" in wrong.output
