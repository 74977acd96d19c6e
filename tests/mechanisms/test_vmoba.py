"""VMoBA by itself: patterns, partitions, densities, text, batches, gradients, bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.grid import TokenGrid
from hf_attn.mechanisms.vmoba import MECHANISM, VMoBAConfig, blocks_of

GRID = TokenGrid(4, 6, 8)
BLOCKS = {"temporal_block": 1, "spatial_block": (2, 4), "st_block": (2, 3, 4)}
SCOPES = ("query_head", "head_global", "block", "overall")


def make(grid=GRID, *, batch=1, heads=2, dtype=torch.float32, layer=0, seed=0, index=None, kv_heads=None):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, kv_heads or heads, kv_heads or heads)
    tensors = [torch.randn(batch, h, grid.length, 8, generator=generator, dtype=torch.float64) for h in shapes]
    tokens = TokenLayout(batch, grid.length, grid.length, index, grid=grid)
    return AttentionCall(*(x.to(dtype) for x in tensors), 0.3, False, tokens, LayerContext(index=layer))


def config(**options):
    return VMoBAConfig(**{"min_tokens": 0, **options})


def realised(call, options):
    seen = {}
    MECHANISM(replace(call, layer=replace(call.layer, record=seen.update)), options)
    return float(seen["computed"]) / float(seen["visible"]), seen["path"]


def masked(call, options):
    mask = MECHANISM.attended(call, options, torch.arange(call.q_len))
    tensors = (x.double() for x in (call.query, call.key, call.value))
    return scaled_dot_product_attention(*tensors, attn_mask=mask, scale=call.scale, enable_gqa=True)


def test_layers_cycle_through_the_patterns():
    def names(**options):
        return [config(**options).pattern(layer) for layer in range(7)]

    assert names() == ["1d", "2d", "3d", "1d", "2d", "3d", "1d"]
    assert names(first_full_layer=2) == [None, None, "1d", "2d", "3d", "1d", "2d"]
    assert names(pattern_counts=(2, 0, 1)) == ["1d", "1d", "3d", "1d", "1d", "3d", "1d"]
    assert names(pattern_counts=(0, 0, 1)) == ["3d"] * 7
    assert config().pattern(None) == "1d"


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_choosing_everything_is_dense_attention(layer, scope):
    call = make(layer=layer)
    dense = scaled_dot_product_attention(call.query, call.key, call.value, scale=call.scale)
    every = [config(select="threshold", scope=scope, tau=1.0, **BLOCKS)]
    if scope != "block":
        every += [config(scope=scope, top_k=(4, 6, 8), **BLOCKS), config(scope=scope, density=1.0)]
    for options in every:
        assert (MECHANISM(call, options) - dense).abs().max() <= 1e-5
        assert realised(call, options)[0] == 1.0


def test_one_block_is_block_diagonal_attention():
    call = make(TokenGrid(3, 4, 5))
    out = MECHANISM(call, config(top_k=1, temporal_block=2))  # blocks of 40 and 20 tokens
    for rows in (slice(0, 40), slice(40, 60)):
        parts = (x[:, :, rows] for x in (call.query, call.key, call.value))
        assert (out[:, :, rows] - scaled_dot_product_attention(*parts, scale=call.scale)).abs().max() <= 1e-5


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("shape, blocks", [
    ((4, 6, 8), BLOCKS), ((5, 7, 3), {"temporal_block": 2, "spatial_block": (7, 1), "st_block": (5, 1, 3)}),
    ((1, 6, 5), {}), ((3, 1, 1), {}), ((1, 1, 1), {}), ((3, 4, 6), {"temporal_block": 0.5}),
])  # fmt: skip
@pytest.mark.parametrize("text", [(0, 0), (3, 0), (0, 5), (2, 3)])
@pytest.mark.parametrize("rule", [
    {"density": 0.4}, {"select": "threshold", "scope": "block", "tau": 0.5}, {"scope": "head_global", "top_k": 2},
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:hf_attn")
def test_sparse_calls_are_masked_attention_on_odd_grids_with_text(shape, blocks, text, rule, kv_heads):
    grid = TokenGrid(*shape, *text)
    for layer in range(3):
        call, options = make(grid, batch=2, layer=layer, kv_heads=kv_heads), config(**rule, **blocks)
        assert (MECHANISM(call, options) - masked(call, options)).abs().max() <= 2e-6
        share = MECHANISM.attended(call, options, torch.arange(grid.length)).double().mean()
        assert realised(call, options)[0] == pytest.approx(float(share), abs=1e-9)


def test_padded_text_is_not_read_and_may_hold_anything():
    grid = TokenGrid(4, 4, 4, text_after=6)
    segment = torch.zeros(2, grid.length, dtype=torch.int32)
    segment[0, -2:] = segment[1, -4:] = -1
    position = torch.arange(grid.length, dtype=torch.int32).repeat(2)
    index = torch.stack([segment.repeat(1, 2), position.expand(2, -1)], 1)
    call, options = make(grid, batch=2, index=index), config(density=0.6)
    want = masked(call, options)
    for x in (call.key, call.value):
        x[0, :, -2:], x[1, :, -4:] = torch.inf, torch.nan
    got = MECHANISM(call, options)
    for row, real in ((0, 68), (1, 66)):
        assert (got[row, :, :real] - want[row, :, :real]).abs().max() <= 2e-6
    assert realised(call, options)[0] < 1


@pytest.mark.parametrize("scope", SCOPES)
def test_samples_of_a_batch_do_not_meet(scope):
    options = config(select="threshold", scope=scope, tau=0.3, **BLOCKS)
    for layer in range(3):
        call = make(batch=3, layer=layer)
        whole = MECHANISM(call, options)
        for row in range(3):
            tensors = {name: getattr(call, name)[row : row + 1] for name in ("query", "key", "value")}
            one = replace(call, **tensors, tokens=TokenLayout(1, 192, 192, grid=GRID))
            assert (MECHANISM(one, options) - whole[row : row + 1]).abs().max() <= 1e-6


@pytest.mark.parametrize("scope", ["query_head", "head_global", "overall"])
@pytest.mark.parametrize("text", [0, 100])
def test_the_density_is_met(scope, text):
    grid = TokenGrid(8, 16, 16, text_before=text)
    for density in (0.125, 0.2, 0.25, 0.5):
        for layer in range(3):
            got, path = realised(make(grid, layer=layer, heads=1), config(density=density, scope=scope))
            if text and density == 0.125:  # text alone takes 0.09, the own block the rest
                assert got < 0.21
            else:
                assert abs(got - density) <= 0.01, (density, path)


def test_gradients_with_a_fixed_choice():
    call = make(TokenGrid(2, 2, 4), heads=1, dtype=torch.float64, layer=2)
    options = config(st_block=(1, 2, 2), top_k=2)
    leaves = [x.requires_grad_() for x in (call.query, call.key, call.value)]

    def run(query, key, value):
        return MECHANISM(replace(call, query=query, key=key, value=value), options)

    # Steps of 1e-6 do not move a choice here.
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("text", [(0, 0), (2, 3)])
def test_gradients_are_those_of_masked_attention(text):
    grid = TokenGrid(4, 4, 4, *text)
    call, options = make(grid, layer=1, dtype=torch.float64), config(select="threshold", scope="head_global", tau=0.4)
    leaves = [x.requires_grad_() for x in (call.query, call.key, call.value)]
    want = torch.autograd.grad(masked(call, options).sin().sum(), leaves)
    got = torch.autograd.grad(MECHANISM(call, options).sin().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_a_prime_axis_picks_another_partition_and_says_so():
    from hf_attn.mechanisms import vmoba

    vmoba._suggested.cache_clear()
    call, options = make(TokenGrid(5, 31, 29), heads=1, layer=2), config(density=0.25)
    with pytest.warns(UserWarning, match="3D blocks that divide 5x31x29 give .* 1D blocks of .* tokens instead"):
        MECHANISM(call, options)
    assert abs(realised(call, options)[0] - 0.25) <= 0.01


def test_calls_that_stay_dense_say_why():
    call = make()
    seen = {}
    call = replace(call, layer=replace(call.layer, record=seen.update))
    dense = scaled_dot_product_attention(call.query, call.key, call.value, scale=call.scale)
    assert torch.equal(MECHANISM(call, VMoBAConfig()), dense) and seen["reason"] == "fewer than min_tokens=4096 tokens"
    assert torch.equal(MECHANISM(call, config(first_full_layer=1)), dense) and seen["reason"] == "first_full_layer=1"


@pytest.mark.parametrize("options, text", [
    ({"scope": "head"}, "scope must be one of 'query_head'"),
    ({"select": "best"}, "select must be one of 'top_k', 'threshold', got 'best'"),
    ({"tau": 0.0}, r"tau must be a number in \(0, 1\], got 0.0"),
    ({"select": "threshold", "tau": 1.1}, r"tau must be a number in \(0, 1\], got 1.1"),
    ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
    ({"top_k": (1, 2)}, r"top_k must be 3 integers, got \(1, 2\)"),
    ({"top_k": (1, 0, 2)}, r"top_k\[1\] must be an integer >= 1, got 0"),
    ({"scope": "block"}, "scope='block' has no top_k"),
    ({"select": "threshold", "density": 0.2}, "follows tau=0.25 alone"),
    ({"select": "threshold", "schedule": [0.2]}, "follows tau=0.25 alone"),
    ({"temporal_block": 0}, "temporal_block must be a number of frames > 0, got 0"),
    ({"spatial_block": (2, 0)}, r"spatial_block\[1\] must be an integer >= 1, got 0"),
    ({"st_block": (2, 2)}, r"st_block must be 3 integers, got \(2, 2\)"),
    ({"pattern_counts": (0, 0, 0)}, "pattern_counts must name a layer at least"),
    ({"first_full_layer": -1}, "first_full_layer must be an integer >= 0, got -1"),
    ({"blocks": 3}, "VMoBAConfig has no option 'blocks'"),
])  # fmt: skip
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        VMoBAConfig.from_dict(options)


def test_bad_calls():
    call = make(layer=1)
    with pytest.raises(
        ValueError, match=r"block \(4, 4\) does not divide the grid 4x6x8: height 6 % 4 = 2; sizes that"
    ):
        MECHANISM(call, config(spatial_block=(4, 4)))
    with pytest.raises(ValueError, match="needs the latent grid"):
        MECHANISM(replace(call, tokens=TokenLayout.full(1, 192)), config())
    with pytest.raises(ValueError, match="this layer is causal"):
        MECHANISM(replace(call, causal=True), config())
    wrong = replace(call.tokens, grid=TokenGrid(4, 6, 7))
    with pytest.raises(ValueError, match="describes 168 tokens, but the sequence has 192"):
        MECHANISM(replace(call, tokens=wrong), config())
    with pytest.raises(ValueError, match="holds no token"):
        MECHANISM(replace(call, layer=LayerContext(index=0)), config(temporal_block=0.001))


def test_blocks_by_density():
    """A small density needs more blocks, or a query would read its own alone."""
    grid = TokenGrid(16, 16, 32)
    counts = [blocks_of(grid, config(density=density), "1d").num_blocks for density in (0.5, 0.25, 0.2, 0.125, 0.1)]
    assert counts[0] == 8 and all(
        count * d >= 1.5 for count, d in zip(counts, (0.5, 0.25, 0.2, 0.125, 0.1), strict=True)
    )
