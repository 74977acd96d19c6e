"""Block-sparse attention by Triton kernels: tables, configurations and launches. Nothing here waits for the device.

No shape and no branch depends on the data, so calls can be captured in CUDA graphs and recorded from meta tensors. All
sums have a fixed order: results are bit-equal from run to run, the backward included.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..device_sequences import DeviceSequences, Tiles, device_sequences
from ..launch import config, interpreting, launch
from .triton_backward import keys_kernel, queries_kernel
from .triton_common import LOG2E
from .triton_decode import merge_kernel
from .triton_forward import forward_kernel
from .triton_lists import readers, unique_lists

# Calls with at most this many rows a head group share each list between programs, until there are enough of those.
_FEW_ROWS = 64
_ENOUGH_PROGRAMS = 256
_MOST_SPLITS = 128
# Kernels that walk queries for each tile of keys; the others walk keys for each tile of queries.
_KEY_MAJOR = ("block_sparse_backward_keys", "block_sparse_repair")


class _Call(NamedTuple):
    """Shapes and tables of one call, the same for all kernels."""

    query: Tensor
    key: Tensor
    value: Tensor
    lists: Tensor
    sequences: DeviceSequences | None
    key_bias: Tensor | None
    block_q: int
    block_k: int
    causal: bool
    scale: float
    per_sequence: bool

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def list_share(self) -> int:
        """Query heads that use one list."""
        return self.query.shape[1] // self.lists.shape[1]

    @property
    def bias_share(self) -> int:
        """Query heads that use one row of the bias."""
        return 1 if self.key_bias is None else self.query.shape[1] // self.key_bias.shape[1]

    def config(self, kernel: str) -> dict[str, int]:
        """Tile sizes and options of a kernel; EVEN: whether the tokens of a step are consecutive."""
        width = max(_width(self.query), _width(self.value))
        tile = config(kernel, dtype=self.query.dtype, head_dim=width, device=self.query.device)
        step, block = ("BLOCK_M", self.block_q) if kernel in _KEY_MAJOR else ("BLOCK_N", self.block_k)
        # Looking tokens up one by one, or a bias, takes registers: narrower tiles keep the kernel from spilling.
        if self.sequences is not None or self.key_bias is not None or not _step(tile[step], block)[1]:
            tile["BLOCK_N"] = min(tile["BLOCK_N"], 64)
        if self.sequences is not None and kernel in _KEY_MAJOR and width > 64:
            tile["BLOCK_M"] = min(tile["BLOCK_M"], 16)
        tile[step], tile["EVEN"] = _step(tile[step], block)
        return tile

    def meta(self) -> dict[str, Any]:
        """Constexprs of every kernel."""
        return {
            "D": self.query.shape[3], "DV": self.value.shape[3], "WIDTH": _width(self.query),
            "WIDTH_V": _width(self.value), "CAUSAL": self.causal, "PER_SEQUENCE": self.per_sequence,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            "UPCAST": interpreting() and self.query.dtype == torch.bfloat16,
        }  # fmt: skip

    def bias_strides(self) -> tuple[int, int]:
        if self.key_bias is None:
            return 0, 0
        return self.key_bias.stride(0) if self.key_bias.shape[0] > 1 else 0, self.key_bias.stride(1)

    def tables(self, tiles: Tiles | None) -> tuple[Tensor | None, ...]:
        """q_rows, k_rows, count, tiles as the kernels take them."""
        if tiles is None:
            return None, None, None, None
        return self.sequences.q_rows, self.sequences.k_rows, tiles.count, torch.stack(tiles[1:], 1)

    def query_tiles(self) -> Tiles | None:
        return None if self.sequences is None else self.sequences.query_tiles(self.block_q)

    def key_tiles(self) -> Tiles | None:
        return None if self.sequences is None else self.sequences.key_tiles(self.block_k)


@torch.no_grad()
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    index: Tensor | None,
    key_bias: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Nq, Dv] in the query's dtype and lse fp32 [B, Hq, Nq]; arguments as in `op.block_sparse_attention`.

    Block ids that a sequence does not have are ignored. Keys that a row does not see never reach it, not even as NaN; a
    visible value that is not finite may make a whole row of out NaN.
    """
    call = _prepare(query, key, value, indices, index, key_bias, block_q, block_k, causal, scale)
    batch, heads, q_len = query.shape[:3]
    tile, name = _query_tile(call, "block_sparse_forward")
    programs = -(-q_len // call.block_q)
    subs = -(-tile["FOLD"] * call.block_q // tile["BLOCK_M"])
    splits = _splits(call, tile, programs * subs) if name == "block_sparse_decode" else 1

    def results(*leading: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # With sequences some rows may belong to none and are written by nobody.
        make = torch.empty if index is None else torch.zeros
        out = make(*leading, batch, heads, q_len, value.shape[3], dtype=dtype, device=query.device)
        lse = torch.empty(*leading, batch, heads, q_len, dtype=torch.float32, device=query.device)
        return out, lse if index is None else lse.fill_(float("-inf"))

    out, lse = results(splits, dtype=torch.float32 if splits > 1 else query.dtype)
    launch(
        forward_kernel, (programs * subs * splits, heads // tile["FOLD"], batch),
        query, key, value, call.lists, call.key_bias, out, lse, *call.tables(call.query_tiles()),
        *query.stride(), *key.stride(), *value.stride(), *call.bias_strides(),
        q_len, key.shape[2], heads, call.group, call.block_q, call.block_k, call.lists.shape[2], call.lists.shape[0],
        call.lists.shape[1], call.lists.shape[3], call.list_share, call.bias_share, programs, subs, splits,
        scale * LOG2E.value, POSITIVE=scale >= 0, **tile, **call.meta(),
    )  # fmt: skip
    if splits == 1:
        return out[0], lse[0]
    return _merge(call, out, lse)


@torch.no_grad()
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    index: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and key_bias (None without one), contiguous; `out` and `lse` from `forward`."""
    call = _prepare(query, key, value, indices, index, key_bias, block_q, block_k, causal, scale)
    # Rows that belong to no sequence are written by nobody.
    make = torch.empty if index is None else torch.zeros
    dq, dk, dv = (make(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    _launch_queries(call, out, lse, grad_out, grad_lse, dq, delta)
    dbias = _launch_keys(call, lse, delta, grad_out, dk, dv)
    return dq, dk, dv, dbias


def _launch_queries(call: _Call, out, lse, grad_out, grad_lse, dq, delta) -> None:
    query, key, value = call.query, call.key, call.value
    tile, _ = _query_tile(call, "block_sparse_backward_queries")
    programs = -(-query.shape[2] // call.block_q)
    subs = -(-tile["FOLD"] * call.block_q // tile["BLOCK_M"])
    launch(
        queries_kernel, (programs * subs, query.shape[1] // tile["FOLD"], query.shape[0]),
        query, key, value, call.lists, call.key_bias, out, lse, grad_out, grad_lse, dq, delta,
        *call.tables(call.query_tiles()), *query.stride(), *key.stride(), *value.stride(), *grad_out.stride(),
        *call.bias_strides(), query.shape[2], key.shape[2], query.shape[1], call.group, call.block_q, call.block_k,
        call.lists.shape[2], call.lists.shape[0], call.lists.shape[1], call.lists.shape[3], call.list_share,
        call.bias_share, programs, subs, call.scale * LOG2E.value, **tile, **call.meta(),
    )  # fmt: skip


def _launch_keys(call: _Call, lse, delta, grad_out, dk, dv) -> Tensor | None:
    """Writes dk and dv; returns the gradient of the bias."""
    query, key, value = call.query, call.key, call.value
    batch, kv_heads, k_len = key.shape[:3]
    # The bias of a group is summed in the kernel unless each of its heads has its own.
    per_head = call.key_bias is not None and call.bias_share == 1
    dbias = None
    if call.key_bias is not None:
        heads = query.shape[1] if per_head else kv_heads
        dbias = torch.zeros(batch, heads, k_len, dtype=torch.float32, device=key.device)
    k_blocks = -(-k_len // call.block_k)
    entries, starts = readers(call.lists, k_blocks)
    tables = call.tables(call.key_tiles())
    # A hidden query can only spoil the sums of keys that some query of a tile does not see.
    for repair in (False, True) if call.causal or call.key_bias is not None else (False,):
        tile = call.config("block_sparse_repair" if repair else "block_sparse_backward_keys")
        tile["BLOCK_N"] = min(tile["BLOCK_N"], max(16, triton.next_power_of_2(call.block_k)))
        subs = -(-call.block_k // tile["BLOCK_N"])
        launch(
            keys_kernel, (k_blocks * subs, kv_heads, batch),
            query, key, value, entries, starts, call.key_bias, lse, delta, grad_out, dk, dv, dbias,
            *tables, *query.stride(), *key.stride(), *value.stride(), *grad_out.stride(), *call.bias_strides(),
            query.shape[2], k_len, kv_heads, call.group, call.block_q, call.block_k, k_blocks, *entries.shape,
            call.list_share, call.bias_share, k_blocks, subs, call.scale * LOG2E.value, BIAS_PER_HEAD=per_head,
            REPAIR=repair, **tile, **call.meta(),
        )  # fmt: skip
    if dbias is None:
        return None
    rows, heads = call.key_bias.shape[:2]
    if heads == 1 and dbias.shape[1] > 1:
        dbias = dbias.sum(1, keepdim=True)
    return (dbias.sum(0, keepdim=True) if rows == 1 and batch > 1 else dbias).to(call.key_bias.dtype)


def _merge(call: _Call, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    splits, batch, heads, q_len, dim = part_out.shape
    out = torch.empty(batch, heads, q_len, dim, dtype=call.query.dtype, device=part_out.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=part_out.device)
    tile = config("block_sparse_merge", dtype=call.query.dtype, head_dim=_width(call.value), device=part_out.device)
    rows = batch * heads * q_len
    grid = (-(-rows // tile["BLOCK_M"]),)
    launch(merge_kernel, grid, part_out, part_lse, out, lse, rows, splits, DV=dim, WIDTH_V=_width(call.value), **tile)
    return out, lse


def _prepare(query, key, value, indices, index, key_bias, block_q: int, block_k: int, causal: bool, scale: float):
    batch, q_heads, q_len, _ = query.shape
    k_len = key.shape[2]
    block_q, block_k = max(1, min(block_q, q_len)), max(1, min(block_k, k_len))
    rows, heads, q_blocks = indices.shape[:3]
    if rows not in (1, batch) and (batch > 1 or index is None):
        raise ValueError(
            f"the pattern has {rows} rows; allowed are 1, the batch ({batch}), or for one packed row its number of "
            "sequences"
        )
    if q_heads % heads or q_blocks != -(-q_len // block_q):
        raise ValueError(
            f"indices must be [rows, one of 1, {key.shape[1]} or {q_heads} heads, {-(-q_len // block_q)}, selected], "
            f"got {tuple(indices.shape)}"
        )
    if key_bias is not None and key_bias.stride(-1) != 1:
        key_bias = key_bias.contiguous()
    lists = unique_lists(indices, -(-k_len // block_k))
    sequences = None if index is None else device_sequences(index, q_len, k_len, causal)
    per_sequence = batch == 1 and rows > 1
    return _Call(query, key, value, lists, sequences, key_bias, block_q, block_k, causal, scale, per_sequence)


def _query_tile(call: _Call, kernel: str) -> tuple[dict[str, int], str]:
    """Configuration of a query-major kernel with FOLD, the heads in a tile; and the name it has in the table."""
    tile, name = call.config(kernel), kernel
    # Heads with the same keys, list and bias share a tile where one head would not fill it.
    together = min(call.list_share, call.bias_share if call.key_bias is not None else call.group) >= call.group
    fold = call.group if together and call.block_q < tile["BLOCK_M"] else 1
    rows = max(16, triton.next_power_of_2(fold * call.block_q))
    if kernel == "block_sparse_forward" and fold * call.block_q <= _FEW_ROWS:
        name = "block_sparse_decode"
        tile = call.config(name)
    tile["BLOCK_M"] = min(tile["BLOCK_M"], rows)
    if tile["BLOCK_M"] < 64:
        tile["num_warps"] = min(tile["num_warps"], 4)
    return {**tile, "FOLD": fold}, name


def _step(wanted: int, block: int) -> tuple[int, bool]:
    """Tokens a step along a list of blocks, and whether each lies in one block (else tokens are looked up)."""
    aligned = min(wanted, block & -block)
    return (aligned, True) if aligned >= min(wanted, 32) else (wanted, False)


def _splits(call: _Call, tile: dict[str, int], programs: int) -> int:
    """Programs that share a list, from the shapes alone."""
    batch, q_heads, q_len = call.query.shape[:3]
    if q_len * tile["FOLD"] > _FEW_ROWS:
        return 1
    running = programs * batch * (q_heads // tile["FOLD"])
    longest = min(call.lists.shape[3] * call.block_k, call.key.shape[2])
    useful = -(-longest // (2 * tile["BLOCK_N"]))
    return max(1, min(_ENOUGH_PROGRAMS // max(running, 1), useful, _MOST_SPLITS))


def _width(tensor: Tensor) -> int:
    """Columns of a tile that holds the head dimension: a power of two, and what matrix units need."""
    return max(16, triton.next_power_of_2(tensor.shape[3]))
