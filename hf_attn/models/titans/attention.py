"""The attentions of Titans: a window behind tokens that everybody sees, and a segment behind what was remembered."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_attn.models.titans.configuration_titans import TitansConfig

# What takes the masks of this file: a window with a prefix, a segment with its reads.
IMPLEMENTATIONS = ("eager", "sdpa")


class TitansAttention(nn.Module):
    """Projections, rotary positions, and the host's attention function. Keys and values are `[B, N, heads, D]`."""

    num_key_value_groups = 1

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.head_dim = config, width // config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def queries(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Rotated, `[B, N, heads, D]`, at positions `[B | 1, N]`."""
        return self.rotated(self._heads(self.q_proj(hidden)), positions)

    def keys_values(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values.

        hidden `[B, N, d]`, positions `[N]` or `[B, N]`; both are `[B, N, heads, D]`.
        """
        return self.rotated(self._heads(self.k_proj(hidden)), positions), self._heads(self.v_proj(hidden))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """The output projection of attention with a mask of pairs, bool `[B | 1, Nq, Nk]`, true for what is seen.

        Raises ValueError for an implementation that does not take such masks.
        """
        name = self.config._attn_implementation or "sdpa"
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation={name!r} does not take the masks of Titans; use one of "
                f"{', '.join(IMPLEMENTATIONS)}"
            )
        mask = mask[:, None]
        if name == "eager":
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(query.dtype).min
            )
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        heads = (t.transpose(1, 2) for t in (query, key, value))
        out, _ = function(self, *heads, mask, dropout=0.0, scaling=self.head_dim**-0.5, is_causal=False)
        return self.o_proj(out.flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))

    def rotated(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Half-rotation (RoPE): features j and j + D/2 turn by position * rope_theta^(-2 j / D); angles in fp32.

        heads: `[B, N, heads, D]`; positions: `[N]` or `[B, N]`.
        """
        half = self.head_dim // 2
        steps = torch.arange(half, device=heads.device, dtype=torch.float32)
        angle = positions[..., None].float() * self.config.rope_theta ** (-steps / half)
        cos, sin = (f.to(heads.dtype)[..., None, :] for f in (angle.cos(), angle.sin()))
        first, second = heads[..., :half], heads[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def windowed(
    attention: TitansAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    past: tuple[Tensor, Tensor] | None,
    past_count: int | Tensor,
) -> Tensor:
    """Attention in which token t sees the prefix and the tokens `0 <= t - u < window`, in time linear in N.

    Args:
        query, key, value: `[B, N, heads, D]`, new tokens.
        prefix: keys and values that all tokens see, or None.
        past: the tokens before, newest last; of `[B, P]` slots the last `past_count` (one number, or `[B]`) are filled.
    """
    window, length = attention.config.window, query.shape[1]
    past_key, past_value = (key[:, :0], value[:, :0]) if past is None else past
    if not isinstance(past_count, Tensor):
        filled = min(past_count, past_key.shape[1])
        past_key, past_value = (t[:, t.shape[1] - filled :] for t in (past_key, past_value))
    if length <= 2 * window:
        key, value = torch.cat([past_key, key], 1), torch.cat([past_value, value], 1)
        mask = _band(length, past_key.shape[1], window, past_count, key.device)
        return attention.attend(query, *_with_prefix(prefix, key, value, mask))
    return _in_blocks(attention, query, (past_key, key), (past_value, value), prefix, past_count)


def _in_blocks(
    attention: TitansAttention,
    query: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    prefix: tuple[Tensor, Tensor] | None,
    past_count: int | Tensor,
) -> Tensor:
    """Blocks of `window` queries against their own block of keys and the one before."""
    window, (batch, length) = attention.config.window, query.shape[:2]
    count = -(-length // window)

    def blocks(tensor: Tensor) -> Tensor:
        return pad(tensor, (0, 0, 0, 0, 0, count * window - length)).unflatten(1, (count, window))

    def pairs(past: Tensor, new: Tensor) -> Tensor:
        before = pad(past, (0, 0, 0, 0, window - past.shape[1], 0))[:, None]
        new = blocks(new)
        return torch.cat([torch.cat([before, new[:, :-1]], 1), new], 2).flatten(0, 1)

    filled = past_count if isinstance(past_count, Tensor) else keys[0].shape[1]
    first = _band(window, window, window, filled, query.device)
    others = _band(window, window, window, window, query.device).expand_as(first)
    mask = torch.cat([first[:, None], others[:, None].expand(-1, count - 1, -1, -1)], 1)
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)
    if prefix is not None:
        key, value = (t[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1) for t in prefix)
        prefix = (key, value)
    out = attention.attend(blocks(query).flatten(0, 1), *_with_prefix(prefix, pairs(*keys), pairs(*values), mask))
    return out.unflatten(0, (batch, count)).flatten(1, 2)[:, :length]


def _with_prefix(
    prefix: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if prefix is None:
        return key, value, mask
    seen = mask.new_ones(*mask.shape[:2], prefix[0].shape[1])
    return torch.cat([prefix[0], key], 1), torch.cat([prefix[1], value], 1), torch.cat([seen, mask], 2)


def _band(length: int, past: int, window: int, past_count: int | Tensor, device: torch.device) -> Tensor:
    """Bool `[B | 1, N, past + N]`: keys at most `window - 1` tokens before their query, among the filled slots."""
    place = torch.arange(-past, length, device=device)
    distance = torch.arange(length, device=device)[:, None] - place
    band = ((distance >= 0) & (distance < window))[None]
    if isinstance(past_count, Tensor):
        return band & (place >= -past_count[:, None])[:, None]
    return band & (place >= -past_count)


def segment_mask(length: int, past: int, past_count: int | Tensor, prefix: int, device: torch.device) -> Tensor:
    """Bool `[B | 1, n, prefix + 2 (past + n)]`: token t of a segment sees the prefix, and what was read for the tokens
    up to t, and those tokens. `past` slots of the segment lie behind, the last `past_count` of them are filled."""
    seen = _band(length, past, past + length + 1, past_count, device)
    return torch.cat([seen.new_ones(*seen.shape[:2], prefix), seen, seen], 2)
