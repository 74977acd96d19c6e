"""PSA as a mechanism: grids, text, padding, presets, causal prefill in a model, and its error against keep/drop."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import hf_attn
from hf_attn import ops
from hf_attn.bench import psa_quality
from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.grid import TokenGrid, hilbert_permutation
from hf_attn.mechanisms.psa import DEFAULT_DENSITY, MECHANISM, PRESETS, PSAConfig, choose_levels
from tests.integrations.transformers.tiny import assert_close, build, tokens

ROOT = Path(__file__).resolve().parents[2]
GRID = TokenGrid(4, 6, 8)
SMALL = {"block_size": 16, "min_tokens": 0}
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def video_call(grid=GRID, batch=1, heads=2, dim=16, seed=0, index=None, **layer) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, batch, heads, grid.length, dim, generator=generator)
    layout = TokenLayout(batch, grid.length, grid.length, index, grid=grid)
    return AttentionCall(query, key, value, dim**-0.5, False, layout, LayerContext(**layer))


def padding_index(real: torch.Tensor) -> torch.Tensor:
    """Token index of rows in which some tokens are not real, bool [B, N]."""
    segment = torch.where(real, 0, -1).int().repeat(1, 2)
    position = torch.arange(real.shape[1], dtype=torch.int32).repeat(2).expand_as(segment)
    return torch.stack([segment, position], 1)


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 5, 7), TokenGrid(1, 9, 9, 5, 0), TokenGrid(4, 6, 8, 0, 11)])
@pytest.mark.parametrize("reorder", ["hilbert", "none", None])
def test_everything_at_level_one_is_dense(grid, reorder, sparse_path):
    call = video_call(grid)
    config = PSAConfig(bounds=(1.0, 1.0, 1.0, 1.0), reorder=reorder, **SMALL)
    expected = scaled_dot_product_attention(call.query, call.key, call.value)
    torch.testing.assert_close(MECHANISM(call, config), expected, **TOLERANCE)
    assert ops.path_counts()["pyramid_attention | torch"] == 1


def test_it_walks_the_hilbert_curve(sparse_path):
    call = video_call()
    config = PSAConfig(density=0.3, **SMALL)
    order = hilbert_permutation(GRID)
    moved = [order.apply(x) for x in (call.query, call.key, call.value)]
    plain = AttentionCall(*moved, call.scale, False, TokenLayout.full(1, GRID.length))
    levels = choose_levels(plain, config)
    assert set(levels.unique().tolist()) > {1, 8}
    expected = order.undo(ops.pyramid_attention(*moved, levels, block_q=16, block_k=16))
    torch.testing.assert_close(MECHANISM(call, config), expected, **TOLERANCE)
    row_major = MECHANISM(call, PSAConfig(density=0.3, reorder="none", **SMALL))
    assert (row_major - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "grid", [TokenGrid(4, 6, 8, 20, 0), TokenGrid(4, 6, 8, 0, 20), TokenGrid(4, 6, 8, 7, 9)], ids=str
)
@pytest.mark.parametrize("reorder", ["hilbert", "none"])
def test_text_is_exact_wherever_it_is(grid, reorder, sparse_path):
    """Text queries give the dense result; text keys are read in full by everybody."""
    call = video_call(grid)
    config = PSAConfig(mode="quantile", bounds=(0.0, 0.0, 0.0, 0.01), reorder=reorder, **SMALL)
    out = MECHANISM(call, config)
    dense = scaled_dot_product_attention(call.query, call.key, call.value)
    text = torch.ones(grid.length, dtype=torch.bool)
    text[grid.lattice] = False
    torch.testing.assert_close(out[:, :, text], dense[:, :, text], **TOLERANCE)
    assert (out[:, :, ~text] - dense[:, :, ~text]).abs().max() > 1e-2
    read = MECHANISM.attended(call, config, torch.arange(grid.length))
    assert read[..., text].all() and not read[:, :, ~text][..., ~text].all()


@pytest.mark.parametrize(("before", "after", "reorder"), [(0, 20, "none"), (0, 20, "hilbert"), (20, 0, "hilbert")])
def test_padded_text_equals_shorter_text(before, after, reorder, sparse_path):
    """Rows with hidden text tokens: outputs of real tokens are those of the sequence without them."""
    grid, short = TokenGrid(4, 6, 8, before, after), TokenGrid(4, 6, 8, min(before, 12), min(after, 12))
    hidden = slice(12, 20) if before else slice(grid.length - 8, grid.length)
    real = torch.ones(2, grid.length, dtype=torch.bool)
    real[1, hidden] = False
    call = video_call(grid, batch=2, index=padding_index(real))
    # Levels that do not depend on the sample: everything pooled by 8, but for the text.
    config = PSAConfig(mode="quantile", bounds=(0.0, 0.0, 0.0, 1.0), reorder=reorder, **SMALL)
    kept = [x[1:, :, real[1]] for x in (call.query, call.key, call.value)]
    layout = TokenLayout(1, short.length, short.length, grid=short)
    expected = MECHANISM(AttentionCall(*kept, call.scale, False, layout), config)
    for x in (call.query, call.key, call.value):
        x[1, :, hidden] = float("nan")
    out = MECHANISM(call, config)
    torch.testing.assert_close(out[1:, :, real[1]], expected, **TOLERANCE)
    assert (out[1, :, hidden] == 0).all()


def test_seed_layer_step_and_head_choose_the_samples():
    config = PSAConfig(density=0.3, reorder="none", **SMALL)
    state = torch.get_rng_state()
    first = MECHANISM(video_call(index=None), config)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(MECHANISM(video_call(), config), first)
    levels = [choose_levels(video_call(step=s), config) for s in (0, 1)]
    assert not torch.equal(*levels)
    call = video_call(heads=4)
    half = [x[:, 2:] for x in (call.query, call.key, call.value)]
    part = AttentionCall(*half, call.scale, False, call.tokens, LayerContext(head_offset=2))
    assert torch.equal(choose_levels(part, config), choose_levels(call, config)[:, 2:])


def test_realised_density_is_recorded_and_met():
    seen = {}
    call = video_call(TokenGrid(8, 16, 16), record=lambda **facts: seen.update(facts))
    for density in (None, 0.2, 0.4):
        MECHANISM(call, PSAConfig(density=density, min_tokens=0, block_size=32))
        wanted = DEFAULT_DENSITY if density is None else density
        assert abs(float(seen["computed"] / seen["visible"]) - wanted) <= 0.01
    MECHANISM(call, PSAConfig())
    assert seen["path"] == "dense" and seen["reason"] == "fewer than min_tokens=4096 tokens"


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = PSAConfig.from_dict({"preset": name, "seed": 7})
    assert config.seed == 7
    assert PSAConfig.from_dict(config.to_dict()) == config
    causal = name == "qwen2.5-vl"
    assert config.rule(causal)[2] is None, "published bounds are not fitted to a density"


BAD_CALLS = {
    "causal": ({"reorder": "hilbert"}, True, GRID, "reorder='hilbert' would let tokens see the future"),
    "no grid": ({"reorder": "hilbert"}, False, None, "reorder='hilbert' needs the latent grid"),
    "wrong grid": ({}, False, TokenGrid(4, 6, 7), "describes 168 tokens, but the sequence has 192"),
    "unequal blocks": ({"block_k": 8}, True, None, "causal levels need block_q == block_k, got 16 and 8"),
    "schedule": ({"schedule": [0.5, 0.2]}, True, None, "schedule needs denoising steps"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    options, causal, grid, message = BAD_CALLS[name]
    query = torch.randn(1, 2, 192, 8)
    call = AttentionCall(query, query, query, 1.0, causal, TokenLayout(1, 192, 192, grid=grid))
    with pytest.raises(ValueError, match=re.escape(message)):
        MECHANISM(call, PSAConfig(**SMALL, **options))


# -- causal prefill in a model ---------------------------------------------------------------------------------------

PREFILL = {"block_size": 8, "stride": 4, "text_length": 0, "min_tokens": 0}


def test_greedy_tokens_equal_dense_at_level_one(sparse_path):
    ids, options = tokens(2, 37), {"max_new_tokens": 8, "do_sample": False}
    want = build("llama").generate(ids, **options)
    model = hf_attn.apply(build("llama"), "psa", bounds=(1.0, 1.0, 1.0, 1.0), **PREFILL)
    assert torch.equal(model.generate(ids, **options), want)
    totals = hf_attn.stats(model)["totals"]
    assert totals["sparse_calls"] == 2 and totals["density"] == 1


@torch.no_grad()
def test_decoding_after_a_prefill_reads_the_whole_cache():
    """Behind the sparse prompt new tokens are dense over all cached keys: steps equal one dense call of them all."""
    model = hf_attn.apply(build("llama"), "psa", bounds=(0.3, 0.4, 0.5, 0.6), **PREFILL)
    ids = tokens(1, 45)
    first = model(ids[:, :40], use_cache=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == 40
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 45)]
    again = model(ids[:, :40], use_cache=True).past_key_values
    assert_close(torch.cat(steps, 1), model(ids[:, 40:], past_key_values=again).logits)
    assert 0.1 < hf_attn.stats(model)["totals"]["density"] < 0.9


@torch.no_grad()
def test_left_padded_rows_equal_single_runs():
    model = hf_attn.apply(build("llama"), "psa", bounds=(0.4, 0.5, 0.6, 0.8), tail="exact", **PREFILL)
    ids, mask = tokens(3, 41), torch.ones(3, 41, dtype=torch.long)
    mask[0, :13], mask[2, :30] = 0, 0
    got = model(ids, attention_mask=mask).logits
    for row in range(3):
        real = mask[row].bool()
        assert_close(got[row, real], model(ids[row, real][None]).logits[0])


@torch.no_grad()
def test_packed_rows_equal_separate_ones():
    model = hf_attn.apply(build("llama"), "psa", bounds=(0.4, 0.5, 0.6, 0.8), **PREFILL)
    ids, lengths = tokens(1, 60), [25, 3, 32]
    want = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    assert_close(model(ids, position_ids=positions, use_cache=False).logits, want)


@pytest.mark.parametrize("packed", [False, True])
def test_padded_and_packed_rows_compile_to_one_graph(packed, sparse_path):
    """The number of sequences of a packed row is only known when it runs."""
    mechanism, config = MECHANISM, PSAConfig(bounds=(0.4, 0.5, 0.6, 0.8), **PREFILL)
    bounds, starts = torch.tensor([0, 30, 50, 70]), torch.tensor([5, 0])
    layout = TokenLayout.packed(bounds, bounds, 70, 70) if packed else TokenLayout.padded(starts, 70 - starts, 70, 70)
    batch = layout.batch
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(batch, 4, 70, 12, generator=generator), torch.randn(batch, 2, 70, 12, generator=generator)

    def run(query, key, index):
        call = AttentionCall(query, key, key, 0.3, True, TokenLayout(batch, 70, 70, index), LayerContext())
        return mechanism(call, config)

    leaf = query.clone().requires_grad_()
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(leaf, key, layout.index)
    torch.testing.assert_close(out, run(query, key, layout.index), **TOLERANCE)
    out.sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0


def test_example(tiny_model):
    command = [
        sys.executable,
        "examples/psa_prefill.py",
        "--model",
        tiny_model,
        "--tokens",
        "300",
        "--block-size",
        "32",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"psa: perplexity [\d.]+ \([\d.]+ times dense\), density 0\.\d+", done.stdout), done.stdout


# -- quality ---------------------------------------------------------------------------------------------------------


def test_error_on_the_golden_file_is_at_most_0_6_of_keep_drop():
    for result in psa_quality.golden(str(ROOT / "tests/golden/psa.safetensors")).values():
        assert result["error"] <= 0.6 * result["keep/drop error"]


@pytest.mark.parametrize("density", [0.22, 0.25])
def test_error_on_smooth_fields_and_on_noise(density):
    """At equal realised density: five very smooth fields at most 0.6 of keep/drop, white noise at most as large."""
    for width, allowed in ((psa_quality.VERY_SMOOTH, 0.6), (0.0, 1.0)):
        for seed in range(5):
            result = psa_quality.compare(psa_quality.smooth_field(width, seed), density)
            assert abs(result["density"] - result["keep/drop density"]) <= 0.005
            assert result["error"] <= allowed * result["keep/drop error"]
