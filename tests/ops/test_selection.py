"""select_blocks: the rules against plain loops, torch against the reference, layouts, ties, widths, errors."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.call import TokenLayout
from hf_attn.ops.hfattn_sparse.selection import op as selection
from hf_attn.pattern import BlockPattern


def chosen_by_loops(query: Tensor, key: Tensor, block_q: int, block_k: int, rule: str, amount: float, **o) -> set:
    """Blocks of one query head `[Nq, D]`, as (query block, key block) pairs, written from the words of the docs."""
    causal, sinks, local, scale = o["causal"], o["sinks"], o["local"], o["scale"]
    q_len, k_len, chosen = query.shape[0], key.shape[0], set()
    offset, blocks = k_len - q_len, math.ceil(k_len / block_k)
    for row in range(math.ceil(q_len / block_q)):
        queries = range(row * block_q, min((row + 1) * block_q, q_len))
        at = [max(i + offset, 0) // block_k for i in queries]
        seen = [j for j in range(blocks) if not causal or j * block_k <= queries[-1] + offset]
        near = range(min(at) - local + 1, max(at) + (1 if causal else local)) if local else ()
        forced = [j for j in seen if j < sinks or j in near]
        mean = query[list(queries)].mean(0)
        score = {j: float(mean @ key[j * block_k : (j + 1) * block_k].mean(0)) * scale for j in seen}
        total = sum(math.exp(score[j]) for j in seen)
        weight = {j: math.exp(score[j]) / total for j in seen}
        order = sorted(seen, key=lambda j: (j in forced, score[j], j), reverse=True)
        count = 0
        if rule == "top_k":
            count = amount if isinstance(amount, int) else math.ceil(round(amount * len(seen), 9))
        elif rule == "threshold":
            count = sum(weight[j] >= amount for j in seen)
            order = sorted(seen, key=lambda j: (score[j], j), reverse=True) if count else order
        else:
            while count < len(order) and (amount == 1 or sum(weight[j] for j in order[:count]) < amount):
                count += 1
        chosen |= {(row, j) for j in [*order[: max(count, 1)], *forced]}
    return chosen


RULES = [("top_k", 1), ("top_k", 3), ("top_k", 0.25), ("top_k", 1.0), ("threshold", 0.0), ("threshold", 0.12)]
RULES += [("threshold", 1.0), ("cumulative", 0.3), ("cumulative", 0.8), ("cumulative", 1.0)]


@pytest.mark.parametrize("path", ["reference", "torch"])
@pytest.mark.parametrize(("rule", "amount"), RULES)
def test_rules_are_those_of_the_words(rule, amount, path, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", path)
    pick = random.Random(str((rule, amount)))
    for _ in range(12):
        k_len = pick.choice([1, 2, 3, 7, 16, 33, 50])
        q_len = pick.choice([k_len, max(1, k_len // 3), k_len + 5])
        query, key = torch.randn(1, 6, q_len, 8).double(), torch.randn(1, 2, k_len, 8).double()
        sizes = {"block_q": pick.choice([1, 4, 5]), "block_k": pick.choice([1, 3, 8])}
        options = {"causal": pick.random() < 0.6, "sinks": pick.choice([0, 0, 2]), "local": pick.choice([0, 1, 2])}
        options["scale"] = pick.choice([0.4, 2.0])
        pattern = ops.select_blocks(query, key, **sizes, **options, **{rule: amount})
        for head in range(6):
            expected = chosen_by_loops(
                query[0, head], key[0, head // 3], sizes["block_q"], sizes["block_k"], rule, amount, **options
            )
            got = {tuple(pair) for pair in pattern.to_dense()[0, head].nonzero().tolist()}
            assert got == expected, (q_len, k_len, sizes, options)
        again = BlockPattern.from_indices(pattern.indices, **sizes, q_len=q_len, k_len=k_len)
        assert torch.equal(again.indices, pattern.indices), "lists must be ascending, -1 padded, without repeats"


def draw(number: int, exact: bool) -> tuple[tuple[Tensor, Tensor], dict]:
    """A random call. `exact`: block means and scores are exact in fp32 and full of ties."""
    pick, generator = random.Random(number), torch.Generator().manual_seed(number)
    k_len = pick.choice([1, 2, 7, 31, 64, 65, 130])
    layout = pick.choice(["full", "full", "padded", "packed"])
    q_len = pick.choice([k_len, k_len, max(1, k_len // 2), k_len + 3]) if layout == "full" else k_len
    batch, kv_heads, group, dim = pick.choice([1, 2]), pick.choice([1, 2]), pick.choice([1, 3, 8]), pick.choice([8, 24])
    batch = 1 if layout == "packed" else batch
    dtype = torch.float32 if exact else pick.choice([torch.float32, torch.float16, torch.bfloat16])
    query = torch.randn(batch, kv_heads * group, q_len, dim, generator=generator).to(dtype)
    key = torch.randn(batch, kv_heads, k_len, dim, generator=generator).to(dtype)
    options = {"block_q": pick.choice([1, 4, 16] if exact else [1, 5, 16]), "block_k": pick.choice([1, 4, 32])}
    if exact:
        query, key, options["scale"] = query.round() / 2, key.round(), 0.25
    if layout == "padded":
        options["key_start"] = torch.randint(0, k_len, (batch,), generator=generator)
    elif layout == "packed":
        cuts = sorted(pick.choices(range(k_len + 1), k=2))
        options["cu_seqlens_q"] = torch.tensor([0, *cuts, k_len])
    if exact and layout != "full":  # partial blocks of odd sizes divide inexactly
        options["block_q"] = options["block_k"] = 1
    rules = {"top_k": [1, 2, 5, 0.1, 0.5], "threshold": [0.02, 0.2], "cumulative": [0.1, 0.5, 0.9]}
    rule = pick.choice(["top_k"] if exact else list(rules))
    options[rule] = pick.choice(rules[rule])
    options |= {"causal": pick.random() < 0.6, "sinks": pick.choice([0, 0, 2]), "local": pick.choice([0, 0, 1, 2])}
    return (query, key), options


@pytest.mark.parametrize("exact", [False, True], ids=["random", "ties"])
def test_torch_path_equals_the_reference(exact, monkeypatch):
    for number in range(150):
        tensors, options = draw(number, exact)
        monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
        expected = ops.select_blocks(*tensors, **options)
        monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
        assert torch.equal(ops.select_blocks(*tensors, **options).indices, expected.indices), (number, options)


def test_rows_of_scores_taken_in_steps_give_the_same(monkeypatch):
    from hf_attn.ops.hfattn_sparse.selection import torch_path

    query, key = torch.randn(2, 4, 100, 8), torch.randn(2, 2, 100, 8)
    whole = ops.select_blocks(query, key, block_q=4, block_k=4, cumulative=0.5)
    monkeypatch.setattr(torch_path, "_SCORES_PER_STEP", 700)
    assert torch.equal(ops.select_blocks(query, key, block_q=4, block_k=4, cumulative=0.5).indices, whole.indices)


def test_later_block_wins_a_tie():
    query, key = torch.ones(1, 1, 8, 4), torch.ones(1, 1, 8, 4)
    for path in ("reference", "torch"):
        rows = ops.select_blocks(query, key, block_q=2, block_k=2, top_k=2).indices[0, 0].tolist()
        assert rows == [[0, -1], [0, 1], [1, 2], [2, 3]], path
        rows = ops.select_blocks(query, key, block_q=8, block_k=2, cumulative=0.5, causal=False).indices[0, 0].tolist()
        assert rows == [[2, 3, -1, -1]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.7, 1.0])
def test_density_is_what_was_asked_for(density, causal):
    query, key = torch.randn(1, 2, 2048, 8), torch.randn(1, 2, 2048, 8)
    pattern = ops.select_blocks(query, key, block_q=16, block_k=16, top_k=density, causal=causal, local=1)
    # At most one block a row more, from rounding up.
    assert 0 <= pattern.density(causal=causal) - density < 1 / 60


def test_left_padding_is_no_padding_and_nan_in_it_is_never_read():
    query, key = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8)
    alone = ops.select_blocks(query, key, block_q=8, block_k=4, cumulative=0.6, sinks=1, local=1)
    start = torch.tensor([13, 0])
    wide = [torch.full((2, t.shape[1], 63, 8), float("nan")) for t in (query, key)]
    for padded, tensor in zip(wide, (query, key), strict=True):
        padded[0, :, 13:], padded[1] = tensor[0], 1.0
    found = ops.select_blocks(*wide, block_q=8, block_k=4, cumulative=0.6, sinks=1, local=1, key_start=start)
    assert torch.equal(found.indices[0, :, :7, :13], alone.indices[0]) and bool((found.indices[0, :, 7:] == -1).all())


def test_packed_is_separate_and_serves_attention():
    """An empty sequence in between has no row of the pattern."""
    lengths, cu = [20, 0, 33, 7], torch.tensor([0, 20, 20, 53, 60])
    query, key, value = (torch.randn(1, h, 60, 8) for h in (4, 2, 2))
    options = {"block_q": 8, "block_k": 4, "top_k": 3, "local": 1}
    pattern = ops.select_blocks(query, key, **options, cu_seqlens_q=cu)
    assert pattern.indices.shape[:3] == (4, 4, 8)
    out = ops.block_sparse_attention(query, key, value, pattern, causal=True, cu_seqlens_q=cu)
    for number, start in enumerate((0, 20, 53)):
        rows = slice(start, start + [n for n in lengths if n][number])
        parts = [t[:, :, rows] for t in (query, key, value)]
        alone = ops.select_blocks(*parts[:2], **options)
        got = pattern.indices[number : number + 1, :, : alone.num_q_blocks, : alone.indices.shape[3]]
        assert torch.equal(got, alone.indices)
        expected = ops.block_sparse_attention(*parts, alone, causal=True)
        torch.testing.assert_close(out[:, :, rows], expected)


def test_density_one_is_dense_attention():
    query, key, value = torch.randn(2, 4, 37, 8), torch.randn(2, 2, 37, 8), torch.randn(2, 2, 37, 8)
    pattern = ops.select_blocks(query, key, block_q=8, block_k=5, top_k=1.0)
    out = ops.block_sparse_attention(query, key, value, pattern, causal=True)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense)


def test_scores_that_are_not_finite_do_not_stop_the_rules():
    key = torch.randn(1, 1, 24, 8)
    key[0, 0, 4:8], key[0, 0, 8:12] = float("nan"), float("inf")
    query = torch.ones(1, 1, 24, 8)
    for rule in ({"top_k": 2}, {"threshold": 0.5}, {"cumulative": 0.9}):
        rows = ops.select_blocks(query, key, block_q=24, block_k=4, causal=False, **rule).indices
        assert 2 in rows and 1 not in rows, rule


@pytest.mark.parametrize("rule", [{"top_k": 2}, {"top_k": 0.3}, {"threshold": 0.1}, {"cumulative": 0.8}])
def test_empty_and_width(rule):
    """The width depends on sizes only."""
    width = {2: 2, 0.3: 3, 0.1: 10, 0.8: 10}[next(iter(rule.values()))]
    for scale in (0.0, 100.0):
        query, key = torch.randn(1, 2, 37, 8), torch.randn(1, 2, 37, 8)
        found = ops.select_blocks(query, key, block_q=4, block_k=4, scale=scale, **rule)
        assert found.indices.shape == (1, 2, 10, width)
    for q_len, k_len in ((0, 5), (5, 0), (0, 0)):
        found = ops.select_blocks(
            torch.randn(1, 2, q_len, 8), torch.randn(1, 2, k_len, 8), block_q=4, block_k=4, **rule
        )
        assert bool((found.indices == -1).all()) and found.num_q_blocks == found.indices.shape[2]


def test_forced_blocks_beyond_top_k_are_kept():
    query, key = torch.randn(1, 1, 64, 8), torch.randn(1, 1, 64, 8)
    found = ops.select_blocks(query, key, block_q=8, block_k=4, top_k=1, sinks=2, local=2)
    assert found.indices[0, 0, -1].tolist()[:5] == [0, 1, 13, 14, 15]


def test_custom_op():
    query, key = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8)
    index = TokenLayout.padded(torch.tensor([0, 3]), torch.tensor([20, 17]), 20, 20).index
    for rule, amount in (("top_k", 2.0), ("density", 0.3), ("cumulative", 0.5)):
        arguments = (query, key, index, 4, 4, rule, amount, 1, 1, True, 0.5, 1)
        torch.library.opcheck(selection.select_blocks, arguments)


def test_compiles_once_for_all_lengths():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def selected(query, key):
        return ops.select_blocks(query, key, block_q=8, block_k=8, top_k=0.3, sinks=1).indices

    for length in (40, 64, 97):
        query, key = torch.randn(1, 2, length, 8), torch.randn(1, 1, length, 8)
        assert torch.equal(
            selected(query, key), ops.select_blocks(query, key, block_q=8, block_k=8, top_k=0.3, sinks=1).indices
        )
    assert len(graphs) == 1


def call(**options):
    query, key = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 10, 8)
    options = {"block_q": 4, "block_k": 4, "top_k": 2} | options
    return ops.select_blocks(query, key, **options)


def two_sequences(batch: int) -> TokenLayout:
    index = TokenLayout.packed(torch.tensor([0, 4, 10]), torch.tensor([0, 4, 10]), 10, 10).index
    return TokenLayout(batch, 10, 10, index.expand(batch, -1, -1).contiguous())


BAD = {
    "block_q": ({"block_q": 0}, "block_q must be an integer >= 1, got 0"),
    "block_k": ({"block_k": 2.0}, "block_k must be an integer >= 1, got 2.0"),
    "no rule": ({"top_k": None}, "exactly one of top_k, threshold and cumulative, got none"),
    "two rules": ({"threshold": 0.1}, "exactly one of top_k, threshold and cumulative, got top_k, threshold"),
    "top_k": ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
    "top_k bool": ({"top_k": True}, "top_k must be an integer >= 1, got True"),
    "density": ({"top_k": 1.5}, "top_k must be an integer >= 1 or a share in (0, 1], got 1.5"),
    "threshold": ({"top_k": None, "threshold": -0.1}, "threshold must be a number in [0, 1], got -0.1"),
    "cumulative": ({"top_k": None, "cumulative": 0}, "cumulative must be a number in (0, 1], got 0"),
    "nan": ({"top_k": None, "cumulative": float("nan")}, "cumulative must be a number in (0, 1], got nan"),
    "sinks": ({"sinks": -1}, "sinks must be an integer >= 0, got -1"),
    "local": ({"local": 0.5}, "local must be an integer >= 0, got 0.5"),
    "batch": ({"tokens": two_sequences(2)}, "batch rows hold up to 2 sequences; got batch 2"),
    "too many": ({"tokens": two_sequences(2), "max_sequences": 1}, "a batch row holds more sequences"),
    "max_sequences": ({"max_sequences": 0}, "max_sequences must be an integer >= 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**options)


def test_compiled_code_cannot_count_sequences():
    function = torch.compile(lambda tokens: call(tokens=tokens).indices, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="pass max_sequences"):
        function(TokenLayout.padded(torch.tensor([0, 3]), torch.tensor([10, 7]), 10, 10))


def test_the_bench_checks_and_prints_the_share(capsys, monkeypatch):
    from hf_attn.bench import selection_speed

    arguments = ["--lengths", "300", "--repeats", "1", "--block", "32", "--cumulative", "0.5"]
    selection_speed.main(arguments)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("300")]
    assert line.endswith("%") and 0 < float(line.split()[1]) < 1
    monkeypatch.setattr(selection_speed, "agrees", lambda *_: False)
    selection_speed.main(arguments)
    assert "CHECK FAILED" in capsys.readouterr().out


def test_timing_waits_for_the_device_around_each_call():
    from hf_attn.bench.timing import interleaved

    events = []
    functions = {name: lambda name=name: events.append(name) for name in "ab"}
    interleaved(functions, repeats=1, warmup=0, synchronize=lambda: events.append("wait"))
    assert events == ["wait", "a", "wait", "wait", "b", "wait"]
