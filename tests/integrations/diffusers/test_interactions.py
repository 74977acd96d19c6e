"""What else users do to a pipeline: caches, offload, LoRA, fused projections, copies, saving, guidance, training."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import hf_attn
from hf_attn.mechanism import observe
from tests.integrations.diffusers.band import SMALL
from tests.integrations.diffusers.tiny import PIPELINES, build, close

pytestmark = pytest.mark.filterwarnings("ignore")
DENSE = {"density": 1.0, **SMALL}
SPARSE = {"density": 0.3, **SMALL}


def caches():
    import diffusers

    return {
        "first block": diffusers.FirstBlockCacheConfig(threshold=10.0),
        "mag": diffusers.MagCacheConfig(threshold=10.0, num_inference_steps=4, retention_ratio=0.25,
                                        mag_ratios=torch.ones(4)),
        "pab": diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2,
                                                         spatial_attention_timestep_skip_range=(0, 1001)),
        "taylor": diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    }  # fmt: skip


@pytest.mark.parametrize("cache", ["first block", "mag", "pab", "taylor"])
@pytest.mark.parametrize("first", ["apply", "cache"])
def test_caches_skip_sites_and_the_step_stays_right(cache, first):
    tiny = build("flux", layers=2)
    config = caches()[cache]
    if cache == "pab":
        config.current_timestep_callback = lambda: tiny.target._current_timestep
    tiny.model.enable_cache(config)
    stock = tiny.run(num_inference_steps=4)
    if first == "apply":
        tiny.model.disable_cache()
    hf_attn.apply(tiny.target, "band", **DENSE)
    if first == "apply":
        tiny.model.enable_cache(config)
    assert close(tiny.run(num_inference_steps=4), stock)
    calls = {key: row["calls"] for key, row in hf_attn.stats(tiny.target)["layers"].items()}
    assert min(calls.values()) < 4 and max(calls.values()) <= 4  # the cache did skip
    for row in hf_attn.stats(tiny.target)["layers"].values():
        assert set(row["calls_by_step"]) <= {"0", "1", "2", "3"}
        assert all(sum(branches.values()) == 1 for branches in row["calls_by_step"].values())
    tiny.model.disable_cache()
    hf_attn.remove(tiny.target)


@pytest.mark.skipif(
    torch.accelerator.current_accelerator() is None and version("diffusers").startswith("0.38."),
    reason="group offloading of diffusers 0.38 needs an accelerator",
)
@pytest.mark.parametrize("name", ["wan", "cogvideox", "flux"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(name, kind):
    tiny = build(name)
    hf_attn.apply(tiny.target, "band", **SPARSE)
    expected = tiny.run()
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    tiny.model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **options)
    assert torch.equal(tiny.run(), expected)
    assert hf_attn.stats(tiny.target)["totals"]["sparse_calls"] == 2 * tiny.calls


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_layerwise_casting_and_lower_precision(name):
    tiny = build(name)
    hf_attn.apply(tiny.target, "band", **SPARSE)
    tiny.model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert torch.isfinite(tiny.run()).all()
    assert hf_attn.stats(tiny.target)["totals"]["sparse_calls"] == tiny.calls
    tiny = build(name)
    hf_attn.apply(tiny.target.to(torch.bfloat16), "band", **SPARSE)
    out = tiny.run()
    assert out.isfinite().all()
    assert hf_attn.stats(tiny.target)["totals"]["sparse_calls"] == tiny.calls


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_lora(name):
    from peft import LoraConfig

    tiny = build(name)
    hf_attn.apply(tiny.target, "band", **DENSE)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    tiny.model.add_adapter(lora)
    with_us = tiny.run()
    assert hf_attn.stats(tiny.target)["totals"]["sparse_calls"] == tiny.calls
    hf_attn.remove(tiny.target)
    assert close(with_us, tiny.run())


def test_fused_projections_keep_the_processors_of_dispatched_models():
    tiny = build("wan")
    hf_attn.apply(tiny.target, "band", **SPARSE)
    expected = tiny.run()
    tiny.model.fuse_qkv_projections()
    assert close(tiny.run(), expected)
    assert hf_attn.stats(tiny.target)["totals"]["sparse_calls"] == 2 * tiny.calls


@pytest.mark.parametrize("name", PIPELINES)
def test_a_deep_copied_model_keeps_its_mechanism_and_its_own_grid(name):
    tiny = build(name)
    hf_attn.apply(tiny.target, "band", **SPARSE)
    expected = tiny.run()
    twin = copy.deepcopy(tiny.model)
    component = next((key for key in ("transformer", "unet") if hasattr(tiny.target, key)), None)
    if component is None:
        tiny.target = twin
    else:
        setattr(tiny.target, component, twin)
    tiny.model, original = twin, tiny.model
    hf_attn.reset_stats(original)
    assert torch.equal(tiny.run(), expected)
    assert hf_attn.stats(original)["totals"]["sparse_calls"] == tiny.calls
    ours = [m.processor for m in twin.modules() if hasattr(getattr(m, "processor", None), "handle")]
    theirs = [m.processor for m in original.modules() if hasattr(getattr(m, "processor", None), "handle")]
    assert len(ours) == tiny.sites and not {id(p.numbers) for p in ours} & {id(p.numbers) for p in theirs}
    if name != "sdxl":
        assert len({id(p.numbers) for p in ours}) == 1


def test_a_copy_can_be_freed_alone():
    tiny = build("dit")
    stock = tiny.run()
    hf_attn.apply(tiny.target, "band", **SPARSE)
    twin = copy.deepcopy(tiny.model)
    assert hf_attn.remove(twin) is twin
    assert hf_attn.stats(twin)["mechanism"] is None
    assert hf_attn.stats(tiny.target)["mechanism"] == "band"
    tiny.run()
    assert hf_attn.stats(tiny.target)["totals"]["sparse_calls"] == tiny.calls
    tiny.target.transformer = twin
    assert torch.equal(tiny.run(), stock)


def test_tensor_parallelism_tells_which_heads_a_process_has():
    from types import SimpleNamespace

    tiny = build("wan")
    hf_attn.apply(tiny.target, "band", **SPARSE)
    mesh = SimpleNamespace(get_local_rank=lambda: 3)
    tiny.model._parallel_config = SimpleNamespace(tensor_parallel_config=SimpleNamespace(_mesh=mesh))
    seen = []
    with observe(lambda mechanism, call, config: seen.append(call.layer.head_offset)):
        tiny.run()
    assert set(seen) == {3 * 2}


def test_saving_leaves_no_trace(tmp_path):
    from diffusers import WanPipeline

    tiny = build("wan")
    tiny.target.save_pretrained(tmp_path / "stock")
    hf_attn.apply(tiny.target, "band", **SPARSE)
    tiny.target.save_pretrained(tmp_path / "ours")
    files = sorted(path.relative_to(tmp_path / "stock") for path in (tmp_path / "stock").rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*") if p.is_file())
    for path in files:
        assert (tmp_path / "stock" / path).read_bytes() == (tmp_path / "ours" / path).read_bytes(), path
    loaded = WanPipeline.from_pretrained(tmp_path / "ours")
    assert hf_attn.stats(loaded)["mechanism"] is None


def test_a_pickled_model_is_the_stock_model_and_needs_no_mechanism(tmp_path):
    tiny = build("cogvideox")
    hf_attn.apply(tiny.target, "band", **SPARSE)
    torch.save(tiny.model, tmp_path / "model.pt")
    code = (
        "import torch, sys; m = torch.load(sys.argv[1], weights_only=False); "
        "print(type(m.transformer_blocks[0].attn1.processor).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "CogVideoXAttnProcessor2_0", done.stderr
    buffer = io.BytesIO()
    torch.save(tiny.model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    args = (torch.randn(1, 3, 4, 4, 6), torch.randn(1, 16, 16), torch.tensor([10]))
    rotary = (torch.randn(18, 16), torch.randn(18, 16))
    hf_attn.remove(tiny.target)
    with torch.no_grad():
        got, expected = (m(*args, image_rotary_emb=rotary)[0] for m in (loaded, tiny.model))
    assert torch.equal(got, expected)


def test_guiders_find_our_processors_by_their_base():
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    tiny = build("flux")
    stock = tiny.model.transformer_blocks[0].attn.processor
    hf_attn.apply(tiny.target, "band", **SPARSE)
    ours = tiny.model.transformer_blocks[0].attn.processor
    assert AttentionProcessorRegistry.get(type(ours)) is AttentionProcessorRegistry.get(type(stock))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_gradients_are_those_of_the_stock_model(name, checkpointing):
    tiny = build(name)
    inputs = []
    handle = tiny.model.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    tiny.run()
    handle.remove()

    def gradients():
        tiny.model.zero_grad()
        tiny.model(**inputs[0])[0].square().mean().backward()
        return torch.cat([p.grad.flatten() for p in tiny.model.parameters() if p.grad is not None])

    tiny.model.train()
    stock = gradients()
    hf_attn.apply(tiny.model, "band", **DENSE)
    if checkpointing:
        tiny.model.enable_gradient_checkpointing()
    assert close(gradients() / stock.abs().max(), stock / stock.abs().max())
    assert hf_attn.stats(tiny.model)["totals"]["sparse_calls"] == tiny.sites * (1 + checkpointing)
