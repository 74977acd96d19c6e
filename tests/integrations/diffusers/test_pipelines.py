"""Every class of the model table, on its tiny pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.nn.functional import scaled_dot_product_attention

import hf_attn
from hf_attn.mechanism import get_mechanism, observe
from tests.integrations.diffusers.band import SMALL
from tests.integrations.diffusers.tiny import PIPELINES, build, close

pytestmark = pytest.mark.filterwarnings("ignore")

# Mechanisms whose sparse run is exactly attention under a mask, with small options.
MECHANISMS = {"band": SMALL, "vmoba": {"min_tokens": 0, "dense_steps": 0}}


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", PIPELINES)
def test_density_one_is_stock_and_every_layer_step_and_branch_is_seen_once(name, mechanism):
    tiny = build(name)
    stock = tiny.run()
    assert torch.isfinite(stock).all()
    assert hf_attn.apply(tiny.target, mechanism, density=1.0, **MECHANISMS[mechanism]) is tiny.target
    assert close(tiny.run(), stock)
    found = hf_attn.stats(tiny.target)
    totals = found["totals"]
    assert (totals["calls"], totals["fallbacks"], totals["dense_calls"]) == (tiny.calls, 0, 0), totals
    assert totals["density"] == 1.0
    assert sorted(found["layers"]) == list(range(tiny.sites))
    bare = tiny.target is tiny.model
    for layer in found["layers"].values():
        assert len(layer["calls_by_step"]) == (1 if bare else tiny.steps)
        for branches in layer["calls_by_step"].values():
            assert len(branches) == tiny.branches
            assert set(branches.values()) == {tiny.samples}


@pytest.mark.parametrize("applied", MECHANISMS)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_sparse_run_equals_masked_attention_in_fp64_on_the_captured_tensors(name, applied):
    tiny = build(name)
    seen = []
    hf_attn.apply(tiny.target, applied, density=0.3, **MECHANISMS[applied])
    with observe(lambda mechanism, call, config: seen.append((call, config))):
        tiny.run()
    assert len(seen) == tiny.calls
    for call, config in seen:
        grid = call.tokens.grid
        if name != "sdxl":  # its levels have grids of their own
            assert grid.shape == tiny.grid
        assert grid.length == call.q_len
        if name not in ("mochi", "sd3"):  # padding removed, image-only attention
            assert grid.text == tiny.text
        mask = get_mechanism(applied).attended(call, config, torch.arange(call.q_len))
        expected = scaled_dot_product_attention(
            call.query.double(), call.key.double(), call.value.double(), attn_mask=mask, scale=call.scale
        )
        real = call.tokens.real_keys()
        rows = slice(None) if real is None else real[0]
        got = get_mechanism(applied).attend(call, config).double()
        error = (got - expected)[:, :, rows].abs().max()
        assert error <= 1e-5 * call.value.abs().max()
    densities = [layer["density"] for layer in hf_attn.stats(tiny.target)["layers"].values()]
    assert all(0.2 < density < 1.0 for density in densities), densities
    assert hf_attn.stats(tiny.target)["totals"]["fallbacks"] == 0


@pytest.mark.parametrize("name", PIPELINES)
def test_remove_restores_everything(name):
    tiny = build(name)
    stock = tiny.run()
    before = _footprint(tiny)
    keys = list(tiny.model.state_dict())
    hf_attn.apply(tiny.target, "band", density=0.3, **SMALL)
    assert _footprint(tiny) != before
    assert list(tiny.model.state_dict()) == keys
    assert not torch.equal(tiny.run(), stock)
    assert hf_attn.remove(tiny.target) is tiny.target
    assert _footprint(tiny) == before
    assert torch.equal(tiny.run(), stock)
    assert hf_attn.stats(tiny.target)["mechanism"] is None
    assert hf_attn.remove(tiny.target) is tiny.target


def _footprint(tiny):
    """Processor objects, hooks, attributes of the model and the scheduler, and diffusers' active backend."""
    model, scheduler = tiny.model, getattr(tiny.target, "scheduler", None)
    return (
        {name: id(m.processor) for name, m in model.named_modules() if hasattr(m, "processor")},
        {name: len(m._forward_pre_hooks) for name, m in model.named_modules()},
        sorted(key for key in vars(model) if key != "_diffusers_hook"),
        "hf_attn_step" in getattr(getattr(model, "_diffusers_hook", None), "hooks", {}),
        sorted(key for key in vars(scheduler or object) if key in ("step", "set_timesteps")),
        _AttentionBackendRegistry._active_backend,
    )


# A convolution before the first attention mixes the positions of a U-Net.
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "sdxl"])
def test_a_changed_latent_changes_exactly_the_predicted_token(name):
    tiny = build(name)
    inputs = []
    handle = tiny.model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    tiny.run()
    handle.remove()
    hf_attn.apply(tiny.target, "band", density=1.0, **SMALL)
    args, kwargs = inputs[0]
    latent = args[0] if args else kwargs["hidden_states"]

    def first_call(latent):
        seen = []
        given = ((latent, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": latent})
        with observe(lambda mechanism, call, config: seen.append(call)), torch.no_grad():
            tiny.model(*given[0], **given[1])
        return seen[0]

    where = _position(latent, channels_first=name != "cogvideox")
    moved = latent.clone()
    moved[where] += 1.0
    before, after = first_call(latent), first_call(moved)
    changed = (before.query - after.query).abs().amax((1, 3))[0] > 1e-6
    grid = before.tokens.grid
    assert changed.nonzero().flatten().tolist() == [grid.text_before + _token(latent, where, grid, name)]


def _position(latent, channels_first):
    """An index of one latent position, not on a border of the patch grid."""
    if latent.dim() == 3:
        return (0, latent.shape[1] - 2)
    if latent.dim() == 4:
        return (0, slice(None), latent.shape[2] - 3, latent.shape[3] - 1)
    if channels_first:
        return (0, slice(None), latent.shape[2] - 1, latent.shape[3] - 3, latent.shape[4] - 1)
    return (0, latent.shape[1] - 1, slice(None), latent.shape[3] - 3, latent.shape[4] - 1)


def _token(latent, where, grid, name):
    numbers = [number for number in where[1:] if isinstance(number, int)]
    if len(numbers) == 1:
        return numbers[0]
    frame, row, column = [0, *numbers][-3:]
    frames = 1 if latent.dim() == 4 else latent.shape[1 if name == "cogvideox" else 2]
    patch = frames // grid.frames, latent.shape[-2] // grid.height, latent.shape[-1] // grid.width
    return (frame // patch[0] * grid.height + row // patch[1]) * grid.width + column // patch[2]


@pytest.mark.parametrize("name", ["wan", "cogvideox", "flux", "mochi"])
def test_several_videos_at_once(name):
    tiny = build(name)
    count = {"num_videos_per_prompt": 3} if name != "flux" else {"num_images_per_prompt": 3}
    stock = tiny.run(**count)
    hf_attn.apply(tiny.target, "band", density=1.0, **SMALL)
    assert close(tiny.run(**count), stock)
    assert hf_attn.stats(tiny.target)["totals"]["fallbacks"] == 0


def test_both_transformers_of_a_two_stage_model_share_one_state():
    tiny = build("wan", second=True)
    stock = tiny.run(num_inference_steps=4)
    hf_attn.apply(tiny.target, "band", density=1.0, dense_steps=1, min_tokens=0)
    assert close(tiny.run(num_inference_steps=4), stock)
    found = hf_attn.stats(tiny.target)
    assert set(found["layers"]) == {0, 1, "transformer_2.0", "transformer_2.1"}
    steps = {key: sorted(layer["calls_by_step"]) for key, layer in found["layers"].items()}
    assert sorted(steps[0] + steps["transformer_2.0"]) == ["0", "1", "2", "3"]
    assert found["totals"]["calls"] == 2 * 2 * 4
    assert found["totals"]["dense_reasons"] == {"dense_steps=1": 4}
    assert hf_attn.stats(tiny.target.transformer_2)["mechanism"] == "band"
    hf_attn.remove(tiny.target)
    assert torch.equal(tiny.run(num_inference_steps=4), stock)


@pytest.mark.parametrize("name", ["hunyuan", "qwen"])
def test_padded_text_gives_what_unpadded_text_gives(name):
    tiny = build(name)
    hf_attn.apply(tiny.target, "band", density=1.0, **SMALL)
    padded = tiny.run()
    key = "prompt_attention_mask" if name == "hunyuan" else "prompt_embeds_mask"
    valid = int(tiny.call[key].sum())
    shorter = {"prompt_embeds": tiny.call["prompt_embeds"][:, :valid], key: tiny.call[key][:, :valid]}
    assert close(tiny.run(**shorter), padded)


def test_reference_images_are_tokens_beside_the_lattice():
    tiny = build("flux")
    hf_attn.apply(tiny.target, "band", density=0.3, **SMALL)
    target, reference = torch.zeros(4 * 6, 3), torch.zeros(2 * 2, 3)
    for ids, width in ((target, 6), (reference, 2)):
        ids[:, 1], ids[:, 2] = torch.arange(len(ids)) // width, torch.arange(len(ids)) % width
    reference[:, 0] = 1
    seen = []
    with torch.no_grad(), observe(lambda mechanism, call, config: seen.append(call.tokens.grid)):
        tiny.model(
            hidden_states=torch.randn(1, 28, 4), encoder_hidden_states=torch.randn(1, 5, 32),
            pooled_projections=torch.randn(1, 32), timestep=torch.tensor([0.5]),
            img_ids=torch.cat([target, reference]), txt_ids=torch.zeros(5, 3),
        )  # fmt: skip
    assert {(grid.shape, grid.text_before, grid.text_after) for grid in seen} == {((1, 4, 6), 5, 4)}
