"""From the host's masks to TokenLayout: the mask function registered with every hf_attn name, and its reader.

This is the only file that knows the private names of `transformers.masking_utils`. A mask that is not exactly
understood falls to the dense path, which is always right and only larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from hf_attn.call import TokenLayout

# Model types whose compact masks the tests compare with SDPA. Types outside the list get dense masks: some models read
# the mask inside their own code (indexers, Doge) and would misread a compact one.
COMPACT_OK = frozenset(
    {
        "bart",
        "bert",
        "clip_text_model",
        "cohere",
        "cohere2",
        "deepseek_v3",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_neox",
        "granite",
        "helium",
        "llama",
        "mistral",
        "mixtral",
        "moba_hybrid",
        "moba_llama",
        "moba_mistral",
        "moba_qwen2",
        "moba_qwen3",
        "moh_llama",
        "moh_mistral",
        "moh_qwen2",
        "moh_qwen3",
        "moh_vit",
        "modernbert",
        "olmo",
        "olmo2",
        "olmo3",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
        "vit",
        "whisper",
    }
)

# Types that also serve as the text half of a model with bidirectional image blocks. Compiled code cannot look inside an
# `and_mask`, so an unpadded, cacheless call of theirs stays dense there.
_MAY_HOLD_IMAGE_BLOCKS = frozenset({"gemma3_text"})

_INNER = ".<locals>.inner_mask"
_CAUSAL, _BIDIRECTIONAL, _AND = "causal_mask_function", "bidirectional_mask_function", "and_mask"
_WINDOWS = ("sliding_window_overlay" + _INNER, "sliding_window_bidirectional_overlay" + _INNER)


def index_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of an hf_attn layer, linear in the number of tokens; arguments as transformers' `sdpa_mask`.

    Returns one of
        None: full rows, queries aligned with the last keys.
        int32 `[B, 1, R, q_length + kv_length]`, queries first, then keys: row 0 sequence id (-1 not real), row 1
            position, row 2 lowest and row 3 highest visible position (query columns only). The kind is in the shape, so
            reading it needs no device sync: R=1 bidirectional (no positions), R=2 causal, R=3 causal with a window,
            R=4 bidirectional with a window.
        uint8 `[B, 1, q_length, kv_length]`: a pattern that segments and windows cannot express.
        bool of the same shape: the same for model types outside `COMPACT_OK`, which may read it themselves.
    """
    model_type = getattr(config, "model_type", None)
    static = isinstance(q_offset, Tensor)
    tracing = static or torch.compiler.is_compiling()
    aligned = not static and q_offset + q_length == kv_offset + kv_length
    compact = (
        model_type in COMPACT_OK
        and not use_vmap
        and (attention_mask is None or attention_mask.dim() == 2)
        and _understood(mask_function, local_size, model_type, attention_mask is None)
    )
    if not compact:
        # An SDPA mask of None means top-left alignment for a static cache; it may be left out only when both agree.
        dense = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            **({} if mask_function is None else {"mask_function": mask_function}),
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip and aligned,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            device=device,
        )
        return dense.to(torch.uint8) if dense is not None and model_type in COMPACT_OK else dense

    name = getattr(mask_function, "__name__", _CAUSAL)
    causal = name == _CAUSAL or (
        name == _AND and not allow_is_bidirectional_skip and getattr(config, "is_causal", True) is not False
    )
    window = None if aligned and local_size is not None and kv_length < local_size else local_size
    padded = attention_mask is not None and (tracing or not _all_real(attention_mask, kv_offset, kv_length))
    segments: Tensor | None = None
    may_pack = causal and attention_mask is None and aligned and q_length == kv_length
    if may_pack and mask_function is not None and name == _AND:
        found = _diagonal_segments(mask_function, batch_size, q_length, device)
        if torch.compiler.is_compiling() or bool((found[:, -1] > 0).any()):
            segments = found
    if not padded and window is None and segments is None and (aligned or not causal):
        return None

    pos_q = (torch.arange(q_length, device=device) + q_offset).expand(batch_size, q_length)
    pos_k = (torch.arange(kv_length, device=device) + kv_offset).expand(batch_size, kv_length)
    seg_q = torch.zeros_like(pos_q) if segments is None else segments
    seg_k = torch.zeros_like(pos_k) if segments is None else segments
    if attention_mask is not None:
        if causal or window is not None:
            seg_q = torch.where(_real_at(attention_mask, pos_q), seg_q, -1)
        # Else the padding is about keys alone: in cross-attention the queries are other tokens.
        seg_k = torch.where(_real_at(attention_mask, pos_k), seg_k, -1)
    rows = [torch.cat([seg_q, seg_k], -1)]
    if causal or window is not None:
        rows.append(torch.cat([pos_q, pos_k], -1))
    if window is not None:
        rows.append(torch.cat([pos_q - window + causal, pos_k], -1))
        if not causal:
            rows.append(torch.cat([pos_q + window, pos_k], -1))
    return torch.stack(rows, 1)[:, None].to(torch.int32)


def _understood(mask_function: Callable | None, window: int | None, model_type: str, no_padding: bool) -> bool:
    """Whether the pattern is causal or bidirectional with the model's window and packed sequences, nothing else."""
    if mask_function is None:
        return True
    name = getattr(mask_function, "__name__", "")
    if name in (_CAUSAL, _BIDIRECTIONAL):
        return True
    if torch.compiler.is_compiling():
        return name == _AND and not (no_padding and model_type in _MAY_HOLD_IMAGE_BLOCKS)
    return _known(mask_function, window)


def _known(function: Callable, window: int | None) -> bool:
    """Read a mask function of the host through its closure; anything unexpected is unknown."""
    name = getattr(function, "__qualname__", "")
    cells = dict(
        zip(
            getattr(getattr(function, "__code__", None), "co_freevars", ()),
            getattr(function, "__closure__", None) or (),
            strict=False,
        )
    )
    contents = {key: cell.cell_contents for key, cell in cells.items()}
    if name in (_CAUSAL, _BIDIRECTIONAL, "packed_sequence_mask_function" + _INNER):
        return True
    if name in _WINDOWS:
        return window is not None and contents.get("sliding_window") == window
    if name == "remap_positions_for_packed_sequence" + _INNER:
        return callable(contents.get("mask_function")) and _known(contents["mask_function"], window)
    if name == "and_masks.<locals>." + _AND:
        parts = contents.get("mask_functions") or ()
        return len(parts) > 0 and all(_known(part, window) for part in parts)
    return False


def _all_real(attention_mask: Tensor, start: int, length: int) -> bool:
    real = attention_mask[:, start : start + length]
    return real.shape[1] == length and bool(real.all())


def _real_at(attention_mask: Tensor, positions: Tensor) -> Tensor:
    """The 2-D padding mask at absolute positions `[B, n]`; slots beyond it are not real."""
    last = attention_mask.shape[1] - 1
    return attention_mask.bool().gather(1, positions.clamp(max=last)) & (positions <= last)


def _diagonal_segments(mask_function: Callable, batch_size: int, length: int, device: torch.device | str) -> Tensor:
    """Sequence ids `[B, length]`: token i starts a new sequence iff it does not see token i - 1."""
    batch = torch.arange(batch_size, device=device)[:, None]
    here = torch.arange(length, device=device)[None]
    before = (here - 1).clamp(min=0)
    sees_previous = mask_function(batch, torch.zeros_like(batch), here, before).expand(batch_size, length)
    return (~sees_previous | (here == 0)).cumsum(-1) - 1


def mask_kind(attention_mask: Tensor | None, q_len: int, k_len: int) -> str:
    """How an attention mask is to be read: "none", "causal", "bidirectional" (both compact), "documents", "pattern" or
    "dense".

    "documents" is what `document_mask` made, "pattern" is a dense mask that `index_mask` made, "dense" one
    that the user or the model made.
    """
    if attention_mask is None:
        return "none"
    if attention_mask.dtype == torch.uint8:
        return "pattern"
    if attention_mask.dtype == torch.int32 and attention_mask.shape[1:] == (3, 1, q_len + k_len):
        return "documents"
    if attention_mask.dtype == torch.int32 and attention_mask.dim() == 4:
        rows, columns = attention_mask.shape[2:]
        if 1 <= rows <= 4 and columns == q_len + k_len:
            return "causal" if rows in (2, 3) else "bidirectional"
    return "dense"


def document_mask(layout: TokenLayout) -> Tensor:
    """A layout of `TokenLayout.documents` as `attention_mask` of a model whose attention is `hf_attn_blockrank`.

    int32 `[batch, 3, 1, q_len + k_len]`: segment, position and role of every query, then of every key. transformers
    hands masks of four dimensions to the attention function as they are. ValueError for another layout.
    """
    index, roles = layout.known_documents()
    return torch.cat([index, roles[:, None]], 1)[:, :, None].to(torch.int32)


def layout_from_mask(
    attention_mask: Tensor | None, query: Tensor, keys: Tensor | int, kwargs: Mapping[str, Any] | None = None
) -> TokenLayout:
    """Which tokens of a host call are real and where they sit.

    Args:
        attention_mask: `None`, what `index_mask` returns, or a 4-D mask of the user (bool or additive float).
        query: `[B, H, Nq, D]`; only its shape is read.
        keys: `[B, Hkv, Nk, D]`, or the number of keys, cached ones included.
        kwargs: the host's other arguments; `cu_seq_lens_q` and `cu_seq_lens_k` (packed rows) are honoured.

    Raises ValueError for masks of another kind or shape.
    """
    batch, q_len = query.shape[0], query.shape[2]
    k_len = keys.shape[2] if isinstance(keys, Tensor) else keys
    if attention_mask is None:
        layout = TokenLayout.full(batch, q_len, k_len)
    else:
        kind = mask_kind(attention_mask, q_len, k_len)
        if kind in ("pattern", "dense"):
            return TokenLayout(batch, q_len, k_len, dense=_checked_dense(attention_mask, q_len, k_len))
        if kind == "documents":
            table = attention_mask[:, :, 0].to(query.device)
            if table.shape[0] != batch:
                raise ValueError(f"the document mask has {table.shape[0]} rows, the batch has {batch}")
            return TokenLayout(batch, q_len, k_len, table[:, :2].contiguous(), roles=table[:, 2].contiguous())
        layout = _layout_from_compact(attention_mask.to(query.device), batch, q_len, k_len)
    cu_q, cu_k = (kwargs or {}).get("cu_seq_lens_q"), (kwargs or {}).get("cu_seq_lens_k")
    if cu_q is None and cu_k is None:
        return layout
    return _with_cu_seq_lens(layout, cu_q, cu_k, query.device)


def _checked_dense(mask: Tensor, q_len: int, k_len: int) -> Tensor:
    if mask.dtype == torch.uint8:
        mask = mask.bool()
    fits = mask.dim() == 4 and mask.shape[2] in (1, q_len) and mask.shape[3] == k_len
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention_mask must be 2-D [batch, tokens], or 4-D [batch, heads | 1, {q_len}, {k_len}] bool (True = "
            f"visible) or additive float; got {tuple(mask.shape)} {mask.dtype}"
        )
    return mask


def _layout_from_compact(mask: Tensor, batch: int, q_len: int, k_len: int) -> TokenLayout:
    rows = mask[:, 0]
    segments = rows[:, :1]
    if rows.shape[1] == 1:
        positions = torch.cat([torch.arange(k_len - q_len, k_len), torch.arange(k_len)]).to(segments)
        return TokenLayout(batch, q_len, k_len, torch.cat([segments, positions.expand_as(segments)], 1))
    index, window = rows[:, :2], None
    if rows.shape[1] == 3:
        window = torch.stack([rows[:, 2, :q_len], rows[:, 1, :q_len]], 1)
    elif rows.shape[1] == 4:
        window = rows[:, 2:, :q_len]
    return TokenLayout(batch, q_len, k_len, index, window)


def _with_cu_seq_lens(layout: TokenLayout, cu_q: Any, cu_k: Any, device: torch.device) -> TokenLayout:
    """Sequences of a packed row as the flattening collator names them, on top of what the mask said."""
    cu_q, cu_k = cu_k if cu_q is None else cu_q, cu_q if cu_k is None else cu_k
    if not isinstance(cu_q, Tensor) or not isinstance(cu_k, Tensor):
        raise ValueError(
            f"cu_seq_lens_q and cu_seq_lens_k must be integer tensors [sequences + 1], got {type(cu_q).__name__} and "
            f"{type(cu_k).__name__}"
        )
    if layout.batch != 1:
        raise ValueError(
            f"cu_seq_lens_q describes one packed row, got a batch of {layout.batch}; pass input_ids [1, total tokens]"
        )
    packed = TokenLayout.packed(cu_q.to(device), cu_k.to(device), layout.q_len, layout.k_len)
    if layout.index is None or packed.index is None:
        return packed
    segments, positions = packed.index[:, 0], packed.index[:, 1]
    segments = torch.where(layout.index[:, 0] < 0, -1, segments)
    window = layout.window
    if window is not None:
        # A window is a distance, and distances are the same in both ways of counting positions.
        window = window + (positions - layout.index[:, 1])[:, None, : layout.q_len]
    return replace(packed, index=torch.stack([segments, positions], 1), window=window)
