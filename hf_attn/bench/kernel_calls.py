"""One representative call of every Triton op: compiled ahead of time by the tests, timed by `hf-attn tune`.

To add an op, add a `KernelCall` to `CALLS`. Calls of ops that this version does not have are left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_attn.caches.quantization import KVFormat, absmax_scale
from hf_attn.call import TokenLayout
from hf_attn.ops.hfattn_sparse import launch
from hf_attn.ops.hfattn_sparse.paged.statistics import page_statistics

_KERNELS = "hf_attn.ops.hfattn_sparse"


@dataclass(frozen=True)
class Shape:
    """Sizes and kind of the inputs of a call.

    index: the rows are two packed sequences; bias: an additive key bias where the op takes one. On "meta" there are no
    data, elsewhere they are random.
    """

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    value_dim: int | None = None
    causal: bool = True
    index: bool = False
    bias: bool = False
    q_len: int = 2048
    k_len: int = 2048
    heads: int = 8
    kv_heads: int = 2
    device: str = "meta"

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"D={self.head_dim}"]
        parts += [f"Dv={self.value_dim}"] * (self.value_dim is not None)
        return " ".join(parts + ["causal" if self.causal else "full"] + ["index"] * self.index + ["bias"] * self.bias)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def tensors(self, q_len: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """query, key, value"""
        q_len = self.q_len if q_len is None else q_len
        sizes = ((self.heads, q_len, self.head_dim), (self.kv_heads, self.k_len, self.head_dim))
        sizes += ((self.kv_heads, self.k_len, self.value_dim or self.head_dim),)
        return tuple(torch.randn(1, *size, dtype=self.dtype, device=self.device) for size in sizes)

    def token_index(self, q_len: int | None = None) -> Tensor | None:
        """Two sequences in one row, the first with a quarter of the tokens."""
        if not self.index:
            return None
        q_len = self.q_len if q_len is None else q_len
        cu_q, cu_k = (torch.tensor([0, n // 4, n], device=self.device) for n in (q_len, self.k_len))
        return TokenLayout.packed(cu_q, cu_k, q_len, self.k_len).index

    def key_bias(self) -> Tensor | None:
        return torch.randn(1, 1, self.k_len, device=self.device) if self.bias else None

    def lists(self, rows: int, blocks: int, count: int) -> Tensor:
        """int32 `[1, heads, rows, count]`: different random blocks, ascending; the last of all is among them."""
        rank = torch.rand(1, self.heads, rows, blocks, device=self.device)
        rank[..., -1] = 2
        return rank.topk(min(count, blocks), -1).indices.sort(-1).values.to(torch.int32)


@dataclass(frozen=True)
class KernelCall:
    """A call of one op.

    name: for people; op: "module of the kernels:custom op"; like: the op of the torch path with the same arguments and
    results; arguments: its arguments for a shape; deterministic: under `torch.use_deterministic_algorithms`;
    takes_bias: whether `Shape.bias` means anything to it.
    """

    name: str
    op: str
    like: str
    arguments: Callable[[Shape], tuple[Any, ...]]
    deterministic: bool = False
    takes_bias: bool = False

    @property
    def available(self) -> bool:
        """Whether this version has the op."""
        module, name = self.op.split(":")
        try:
            return hasattr(importlib.import_module(f"{_KERNELS}.{module}"), name)
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith(_KERNELS):
                raise
            return False

    def run(self, shape: Shape, arguments: tuple[Any, ...]) -> Any:
        """Call the op; with a shape on "meta" the function behind it, for the op itself would launch nothing."""
        op = _find(self.op)
        with _determinism(self.deterministic):
            return (op._init_fn if shape.device == "meta" else op)(*arguments)

    def exact(self, arguments: tuple[Any, ...]) -> Any:
        """What the torch path finds in fp32 (fp64 for calls in fp32)."""
        first = next(value for value in arguments if isinstance(value, Tensor))
        wide = torch.float64 if first.dtype == torch.float32 else torch.float32

        def wider(value: Any) -> Any:
            return value.to(wide) if isinstance(value, Tensor) and value.is_floating_point() else value

        return _find(self.like)(*(wider(value) for value in arguments))

    def record(self, shape: Shape, target: str) -> tuple[list[launch.Launch], list[tuple[str, str, int]]]:
        """The launches of a call on `target`, and what it looked up in the table: (kernel, dtype, head_dim)."""
        lookups: list[tuple[str, str, int]] = []
        arguments = self.arguments(shape)
        with launch.recording(target, lookups) as launches:
            self.run(shape, arguments)
        return launches, list(dict.fromkeys(lookups))


def _find(op: str) -> Any:
    module, name = op.split(":")
    return getattr(importlib.import_module(f"{_KERNELS}.{module}"), name)


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _select_blocks(
    rule: str, amount: float, block_k: int = 128, k_len: int | None = None
) -> Callable[[Shape], tuple[Any, ...]]:
    def arguments(shape: Shape) -> tuple[Any, ...]:
        shape = replace(shape, k_len=k_len or shape.k_len)
        query, key, _ = shape.tensors()
        sequences = 2 if shape.index else 1
        rest = (128, block_k, rule, amount, 1, 1, shape.causal, shape.scale, sequences)
        return query, key, shape.token_index(), *rest

    return arguments


def _block_sparse(q_len: int | None = None, block_q: int = 128) -> Callable[[Shape], tuple[Any, ...]]:
    def arguments(shape: Shape) -> tuple[Any, ...]:
        query, key, value = shape.tensors(q_len)
        blocks = -(-shape.k_len // 128)
        lists = shape.lists(-(-query.shape[2] // block_q), blocks, max(2, blocks // 8))
        rest = (lists, shape.token_index(q_len), shape.key_bias(), block_q, 128, shape.causal, shape.scale)
        return query, key, value, *rest

    return arguments


def _routed(q_len: int | None = None, block: int = 128) -> Callable[[Shape], tuple[Any, ...]]:
    def arguments(shape: Shape) -> tuple[Any, ...]:
        query, key, value = shape.tensors(q_len)
        routes = shape.lists(query.shape[2], -(-shape.k_len // block), 8)
        return query, key, value, routes, shape.token_index(q_len), block, shape.causal, shape.scale, False

    return arguments


def _select_routes(top_k: int, q_len: int | None = None, block: int = 128) -> Callable[[Shape], tuple[Any, ...]]:
    def arguments(shape: Shape) -> tuple[Any, ...]:
        query, key, _ = shape.tensors(q_len)
        return query, key, shape.token_index(q_len), block, top_k, shape.causal

    return arguments


def _statistics(shape: Shape) -> tuple[Any, ...]:
    return shape.tensors()[1], 64, 16


def _page_scores(shape: Shape) -> tuple[Any, ...]:
    query, key, _ = shape.tensors(1)
    return query[:, :, 0], page_statistics(key, 64, 16)[0], False


def _paged(format: str | None, per_head: bool) -> Callable[[Shape], tuple[Any, ...]]:
    """One token behind pages of 64: an eighth of them, with one list a query head or one a KV head."""

    def arguments(shape: Shape) -> tuple[Any, ...]:
        query, key, value = shape.tensors(1)
        stored = []
        for x in (key, value):
            scale = absmax_scale(x) if format == "int8-per-tensor" else None
            encoded = KVFormat(format).encode(x, scale)
            stored += encoded.map(lambda t: t[:, :, 0].unflatten(2, (-1, 64)))
        pages = shape.lists(1, shape.k_len // 64, max(shape.k_len // 512, 2))[:, :, 0].long()
        pages = pages if per_head else pages[:, : shape.kv_heads]
        length = torch.full((1,), shape.k_len - 5, device=shape.device)
        newest = (None, None) if format is None else (key[:, :, -1], value[:, :, -1])
        return query[:, :, 0], *stored, pages, length, shape.scale, *newest, None, 0, None

    return arguments


def _ring(shape: Shape) -> tuple[Any, ...]:
    """Two pages of sinks and a ring of five, all of them read as far as the window reaches."""
    given = _paged("int4", False)(replace(shape, k_len=7 * 64))
    pages = torch.arange(7, device=shape.device).expand(1, shape.kv_heads, 7)
    slots = torch.arange(7 * 64, device=shape.device).view(1, 7, 64)
    return *given[:9], pages, *given[10:14], slots, 128, 256


def _sink_window(shape: Shape) -> tuple[Any, ...]:
    return *shape.tensors(), shape.token_index(), 128, 512, shape.scale


def _pyramid(shape: Shape) -> tuple[Any, ...]:
    """Blocks of 128 at random levels, about a quarter of the work."""
    blocks = shape.q_len // 128, shape.k_len // 128
    choice = torch.tensor([0, 0, 1, 4, 8, 8], dtype=torch.uint8, device=shape.device)
    levels = choice[torch.randint(6, (1, shape.heads, *blocks), device=shape.device)]
    return *shape.tensors(), levels, None, 128, 128, shape.causal, shape.scale, "replicate"


def _quantized(qk_bits: int | None, pv_bits: int | None, block: int = 64) -> Callable[[Shape], tuple[Any, ...]]:
    def arguments(shape: Shape) -> tuple[Any, ...]:
        query, key, value = shape.tensors()
        blocks = -(-shape.k_len // block)
        lists = shape.lists(-(-shape.q_len // block), blocks, max(2, blocks // 8))
        mask = torch.ones(1, shape.k_len, dtype=torch.bool, device=shape.device) if shape.bias else None
        return query, key, value, lists, mask, block, block, 32, 64, qk_bits, pv_bits, shape.scale

    return arguments


def _neighborhood(bias: bool) -> Callable[[Shape], tuple[Any, ...]]:
    """An image of 32 rows with windows of 7 x 7; without bias causal along the height where the shape is."""

    def arguments(shape: Shape) -> tuple[Any, ...]:
        tensors = (x.transpose(1, 2) for x in replace(shape, k_len=shape.q_len).tensors())
        rpb = torch.randn(shape.heads, 13, 13, device=shape.device) if bias else None
        causal = [shape.causal and not bias, False]
        return *tensors, rpb, None, [32, shape.q_len // 32], [7, 7], [1, 1], [1, 1], causal, shape.scale, True

    return arguments


def _neighborhood_gradients(shape: Shape) -> tuple[Any, ...]:
    *tensors, space, kernel, stride, dilation, causal, scale, _ = given = _neighborhood(True)(shape)
    out, lse = _find(_NEAR[0])(*given)
    return (
        torch.randn_like(out),
        torch.randn_like(lse),
        *tensors,
        out,
        lse,
        space,
        kernel,
        stride,
        dilation,
        causal,
        scale,
    )


def _head_routed(q_len: int | None = None) -> Callable[[Shape], tuple[Any, ...]]:
    """Two thirds of the heads of every token."""

    def arguments(shape: Shape) -> tuple[Any, ...]:
        query, key, value = shape.tensors(q_len)
        heads = torch.rand(query.shape[:3], device=shape.device) < 0.67
        return query, key, value, heads, shape.token_index(q_len), shape.causal, shape.scale, False

    return arguments


def _head_routed_gradients(shape: Shape) -> tuple[Any, ...]:
    given = _head_routed()(shape)
    out, lse = _find(_HEAD_ROUTED[0])(*given)
    return torch.randn_like(out), *given[:5], out, lse, *given[5:7]


def _linear(shape: Shape) -> tuple[Any, ...]:
    """A slope a head behind an initial state; with `Shape.index` two packed sequences and a slope a token."""
    length = shape.q_len
    query, key, value = replace(shape, k_len=length, kv_heads=shape.heads).tensors()
    borders = torch.tensor([0, length // 4, length], device=shape.device) if shape.index else None
    slopes = torch.rand(*((1, shape.heads, length) if shape.index else (shape.heads,)), device=shape.device)
    state = torch.randn(2 if shape.index else 1, shape.heads, key.shape[3], value.shape[3], device=shape.device)
    return query, key, value, slopes, state, borders, 1.0, 64


def _linear_gradients(shape: Shape) -> tuple[Any, ...]:
    given = _linear(shape)
    out, state = _find(_LINEAR[0])(*given)
    return torch.randn_like(out), torch.randn_like(state), *given


def _backward(op: str, tensors: int, forward: Callable[[Shape], tuple[Any, ...]]) -> Callable[[Shape], tuple[Any, ...]]:
    """Arguments of a backward op: gradients, the first `tensors` arguments of the forward, its results, its options."""

    def arguments(shape: Shape) -> tuple[Any, ...]:
        given = forward(shape)
        out, lse = _find(op)(*given)
        return torch.randn_like(out), torch.randn_like(lse), *given[:tensors], out, lse, *given[tensors:]

    return arguments


_SELECT = "selection.triton_op:select_blocks_triton", "selection.op:select_blocks"
_SPARSE = "block_sparse.triton_op:block_sparse_attention_triton", "block_sparse.op:block_sparse_attention"
_ROUTED = "routed.triton_op:routed_block_attention", "routed.op:routed_block_attention"
_ROUTES = "routed.triton_op:select_routes", "routed.op:select_routes"
_SPARSE_BACKWARD = (
    "block_sparse.triton_op:block_sparse_attention_triton_backward",
    "block_sparse.op:block_sparse_attention_backward",
)
_ROUTED_BACKWARD = "routed.triton_op:routed_block_attention_backward", "routed.op:routed_block_attention_backward"
_PAGED = "paged.triton_op:paged_attention", "paged.op:paged_attention"
_STATISTICS = "paged.triton_op:page_statistics", "paged.op:page_statistics"
_PAGE_SCORES = "paged.triton_op:page_scores", "paged.op:page_scores"
_WINDOW = "windowed.triton_op:sink_window_attention", "windowed.op:sink_window_attention"
_PYRAMID = "pyramid.triton_op:pyramid_attention", "pyramid.op:pyramid_attention"
_QUANTIZED = "quantized.triton_op:quantized_block_attention", "quantized.op:quantized_block_attention"
_NEAR = "neighborhood.triton_op:neighborhood_attention", "neighborhood.op:neighborhood_attention"
_NEAR_BACKWARD = f"{_NEAR[0]}_triton_backward", "neighborhood.triton_op:torch_backward"
_HEAD_ROUTED = "head_routed.triton_op:head_routed_attention", "head_routed.op:head_routed_attention"
_HEAD_ROUTED_BACKWARD = (
    "head_routed.triton_op:head_routed_attention_backward",
    "head_routed.op:head_routed_attention_backward",
)
_LINEAR = "linear.triton_op:linear_attention", "linear.op:linear_attention"
_LINEAR_BACKWARD = "linear.triton_op:linear_attention_backward", "linear.op:linear_attention_backward"
_sparse_gradients = _backward(_SPARSE[0], 6, _block_sparse())
_routed_gradients = _backward(_ROUTED[0], 5, _routed())

CALLS = (
    KernelCall("select blocks: top_k", *_SELECT, _select_blocks("top_k", 4.0)),
    KernelCall("select blocks: density", *_SELECT, _select_blocks("density", 0.1)),
    KernelCall("select blocks: threshold", *_SELECT, _select_blocks("threshold", 0.1)),
    KernelCall("select blocks: cumulative", *_SELECT, _select_blocks("cumulative", 0.9)),
    KernelCall("select blocks: long rows", *_SELECT, _select_blocks("cumulative", 0.9, 8, 40_960)),
    KernelCall("block-sparse attention", *_SPARSE, _block_sparse(), takes_bias=True),
    KernelCall("block-sparse attention: decode", *_SPARSE, _block_sparse(1, 1), takes_bias=True),
    KernelCall("block-sparse attention: backward", *_SPARSE_BACKWARD, _sparse_gradients, takes_bias=True),
    KernelCall("select routes", *_ROUTES, _select_routes(8)),
    KernelCall("select routes: decode", *_ROUTES, _select_routes(8, 1)),
    KernelCall("select routes: several passes", *_ROUTES, _select_routes(300, None, 4)),
    KernelCall("routed attention", *_ROUTED, _routed()),
    KernelCall("routed attention: long blocks", *_ROUTED, _routed(block=256)),
    KernelCall("routed attention: decode", *_ROUTED, _routed(1)),
    KernelCall("routed attention: backward", *_ROUTED_BACKWARD, _routed_gradients),
    KernelCall("routed attention: backward, no atomics", *_ROUTED_BACKWARD, _routed_gradients, deterministic=True),
    KernelCall("page statistics", *_STATISTICS, _statistics),
    KernelCall("page scores", *_PAGE_SCORES, _page_scores),
    KernelCall("paged attention", *_PAGED, _paged(None, True)),
    KernelCall("paged attention: int8", *_PAGED, _paged("int8", True)),
    KernelCall("paged attention: int8, one scale", *_PAGED, _paged("int8-per-tensor", True)),
    KernelCall("paged attention: int4", *_PAGED, _paged("int4", True)),
    KernelCall("paged attention: int4, lists of KV heads", *_PAGED, _paged("int4", False)),
    KernelCall("paged attention: int4, ring", *_PAGED, _ring),
    KernelCall("sink-window attention", *_WINDOW, _sink_window),
    KernelCall("pyramid attention", *_PYRAMID, _pyramid),
    KernelCall("quantised attention: int8 QK", *_QUANTIZED, _quantized(8, None), takes_bias=True),
    KernelCall("quantised attention: int8 QK and PV", *_QUANTIZED, _quantized(8, 8), takes_bias=True),
    KernelCall("head-routed attention", *_HEAD_ROUTED, _head_routed()),
    KernelCall("head-routed attention: decode", *_HEAD_ROUTED, _head_routed(1)),
    KernelCall("head-routed attention: backward", *_HEAD_ROUTED_BACKWARD, _head_routed_gradients),
    KernelCall("neighborhood attention", *_NEAR, _neighborhood(False)),
    KernelCall("neighborhood attention: bias", *_NEAR, _neighborhood(True)),
    KernelCall("neighborhood attention: backward", *_NEAR_BACKWARD, _neighborhood_gradients),
    KernelCall("linear attention", *_LINEAR, _linear),
    KernelCall("linear attention: backward", *_LINEAR_BACKWARD, _linear_gradients),
)


def available_calls() -> list[KernelCall]:
    """The calls of ops that this version has."""
    return [call for call in CALLS if call.available]


def table_head_dims() -> list[int]:
    """Head dimensions up to which some row of the table reaches: shapes of these meet every row."""
    rows = (row for rows in launch.table().values() for row in rows)
    return sorted({min(row["head_dim"], 256) for row in rows if row["target"] != "interpreter"})
