"""What sparse attention can gain at most for a model and a size: floating-point operations of an empty copy, counted.

Amdahl: with a share `a` of the work in self-attention over the image or video, keeping a density `d` of it gives at
most 1 / (1 - a + a d). VAE and text encoders come on top and make the gain of a whole run smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from hf_attn.integrations.diffusers.geometry import site_modules

Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Size:
    """Pixels of an image or video; one frame for images."""

    height: int
    width: int
    num_frames: int = 1

    def __str__(self) -> str:
        return f"{self.height}x{self.width}" + (f"x{self.num_frames}" if self.num_frames > 1 else "")


@dataclass(frozen=True)
class Potential:
    """The work of one denoiser call.

    Args:
        size: what it was counted for.
        tokens: longest self-attention sequence.
        total: floating-point operations of the call (a multiply-add counts two).
        attention: those of the self-attention sites.
    """

    size: Size
    tokens: int
    total: float
    attention: float

    @property
    def share(self) -> float:
        """The part of the work that sparse attention can shrink."""
        return self.attention / self.total

    def bound(self, density: float, dense_share: float = 0.0) -> float:
        """Largest speed-up of the denoiser at a density, with a share of the steps dense."""
        faster = 1 - self.share + self.share * density
        return 1 / (dense_share + (1 - dense_share) * faster)


def count_work(model: nn.Module, size: Size, pipe: Any = None) -> Potential:
    """Count one denoiser call of `model` at `size`, on an empty copy of it.

    Args:
        pipe: its pipeline, for the scale factors of the VAE; without it those of the class's published models.
    """

    def make(*shape: int, dtype: torch.dtype = torch.float32, fill: float | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    # Fake tensors rather than the meta device: some models ask a tensor which device it is on.
    with FakeTensorMode(), torch.no_grad():
        twin = type(model).from_config(dict(model.config)).eval()
        inputs = example_inputs(twin, size, make, pipe)
        with FlopCounterMode(display=False) as counter, _AttentionCount(twin) as attention:
            twin(**inputs, return_dict=False)
    return Potential(size, attention.tokens, counter.get_total_flops() + attention.all, attention.sites)


class _AttentionCount(TorchFunctionMode):
    """Counts the SDPA calls of a model analytically, those inside self-attention sites apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.all = self.sites = 0.0
        self.tokens = 0
        self._inside = False
        for module in site_modules(model).values():
            module.register_forward_pre_hook(lambda *_: self._at(True))
            module.register_forward_hook(lambda *_: self._at(False))

    def _at(self, inside: bool) -> None:
        self._inside = inside

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nonzero:
            # A model that drops padding: here nothing is padding.
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])][:3]
        batch, heads, q_len, head_dim = query.shape
        work = 2.0 * batch * heads * q_len * key.shape[2] * (head_dim + value.shape[3])
        self.all += work
        if self._inside and q_len == key.shape[2]:
            self.sites += work
            self.tokens = max(self.tokens, q_len)
        return query.new_empty((batch, heads, q_len, value.shape[3]))


# -- example inputs --------------------------------------------------------------------------------------------------


def example_inputs(model: nn.Module, size: Size, make: Make, pipe: Any = None) -> dict[str, Any]:
    """Arguments of one denoiser call at `size`, batch 1; tensors come from `make(*shape, dtype=, fill=)`."""
    name = next(base.__name__ for base in type(model).__mro__ if base.__name__ in _INPUTS)
    spatial, temporal, build = _INPUTS[name]
    if name == "WanTransformer3DModel" and model.config.in_channels == 48:
        spatial = 16  # the VAE of Wan 2.2 TI2V
    spatial = getattr(pipe, "vae_scale_factor_spatial", None) or getattr(pipe, "vae_scale_factor", None) or spatial
    temporal = getattr(pipe, "vae_scale_factor_temporal", None) or temporal
    if getattr(pipe, "vae_spatial_compression_ratio", None):
        spatial, temporal = pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio
    frames = (size.num_frames - 1) // temporal + 1
    return build(model.config, make, frames, size.height // spatial, size.width // spatial)


def _time(make: Make, *shape: int) -> Tensor:
    return make(*(shape or (1,)), fill=500.0)


def _mask(make: Make, length: int) -> Tensor:
    return make(1, length, dtype=torch.int64, fill=1)


def _wan(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    return dict(
        hidden_states=make(1, c.in_channels, f, h, w), timestep=_time(make),
        encoder_hidden_states=make(1, 512, c.text_dim),
    )  # fmt: skip


def _cogvideox(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    patch_t = getattr(c, "patch_size_t", None) or 1
    f = -(-f // patch_t) * patch_t
    inputs: dict[str, Any] = dict(
        hidden_states=make(1, f, c.in_channels, h, w), timestep=_time(make),
        encoder_hidden_states=make(1, c.max_text_seq_length, c.text_embed_dim),
    )  # fmt: skip
    if c.use_rotary_positional_embeddings:
        tokens = f // patch_t * (h // c.patch_size) * (w // c.patch_size)
        inputs["image_rotary_emb"] = (make(tokens, c.attention_head_dim), make(tokens, c.attention_head_dim))
    if getattr(c, "ofs_embed_dim", None):
        inputs["ofs"] = make(1)
    return inputs


def _hunyuan(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    inputs = dict(
        hidden_states=make(1, c.in_channels, f, h, w), timestep=_time(make),
        encoder_hidden_states=make(1, 256, c.text_embed_dim), encoder_attention_mask=_mask(make, 256),
        pooled_projections=make(1, c.pooled_projection_dim),
    )  # fmt: skip
    return {**inputs, "guidance": make(1)} if c.guidance_embeds else inputs


def _ltx(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    return dict(
        hidden_states=make(1, f * h * w, c.in_channels), encoder_hidden_states=make(1, 128, c.caption_channels),
        timestep=_time(make), encoder_attention_mask=_mask(make, 128), num_frames=f, height=h, width=w,
        rope_interpolation_scale=(1.0, 1.0, 1.0),
    )  # fmt: skip


def _ltx2(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    audio = max(round(f * 8), 1)  # 25 latents of sound for 25 frames, eight of which make a latent frame
    return dict(
        hidden_states=make(1, f * h * w, c.in_channels), audio_hidden_states=make(1, audio, c.audio_in_channels),
        encoder_hidden_states=make(1, 1024, c.caption_channels),
        audio_encoder_hidden_states=make(1, 1024, c.caption_channels), timestep=_time(make, 1, f * h * w),
        audio_timestep=_time(make, 1, audio), num_frames=f, height=h, width=w, audio_num_frames=audio, fps=25.0,
    )  # fmt: skip


def _mochi(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    return dict(
        hidden_states=make(1, c.in_channels, f, h, w), encoder_hidden_states=make(1, 256, c.text_embed_dim),
        timestep=_time(make), encoder_attention_mask=make(1, 256, dtype=torch.bool, fill=1),
    )  # fmt: skip


def _packed_image(c: Any, make: Make, h: int, w: int, axes: int) -> dict[str, Any]:
    h, w = h // 2, w // 2
    ids = torch.zeros(h * w, axes)
    ids[:, 1], ids[:, 2] = torch.arange(h * w) // w, torch.arange(h * w) % w
    made = make(1, h * w, c.in_channels)
    inputs = dict(
        hidden_states=made, encoder_hidden_states=make(1, 512, c.joint_attention_dim), timestep=_time(make),
        img_ids=ids.to(made.device), txt_ids=make(512, axes, fill=0.0),
    )  # fmt: skip
    return {**inputs, "guidance": make(1)} if getattr(c, "guidance_embeds", False) else inputs


def _flux(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    return {**_packed_image(c, make, h, w, 3), "pooled_projections": make(1, c.pooled_projection_dim)}


def _flux2(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    return _packed_image(c, make, h, w, 4)


def _sd3(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    return dict(
        hidden_states=make(1, c.in_channels, h, w), encoder_hidden_states=make(1, 333, c.joint_attention_dim),
        pooled_projections=make(1, c.pooled_projection_dim), timestep=_time(make),
    )  # fmt: skip


def _qwen(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    return dict(
        hidden_states=make(1, h // 2 * (w // 2), c.in_channels), timestep=_time(make),
        encoder_hidden_states=make(1, 256, c.joint_attention_dim), img_shapes=[[(1, h // 2, w // 2)]],
    )  # fmt: skip


def _pixart(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    inputs = dict(
        hidden_states=make(1, c.in_channels, h, w), encoder_hidden_states=make(1, 300, c.caption_channels),
        timestep=_time(make),
    )  # fmt: skip
    return {**inputs, "added_cond_kwargs": {"resolution": make(1, 2), "aspect_ratio": make(1, 1)}}


def _dit(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    labels = make(1, dtype=torch.int64, fill=1)
    return dict(hidden_states=make(1, c.in_channels, h, w), timestep=_time(make), class_labels=labels)


def _unet(c: Any, make: Make, f: int, h: int, w: int) -> dict[str, Any]:
    inputs: dict[str, Any] = dict(
        sample=make(1, c.in_channels, h, w), timestep=_time(make), encoder_hidden_states=make(1, 77, _last(c))
    )
    if c.addition_embed_type == "text_time":
        text = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": make(1, text), "time_ids": make(1, 6)}
    return inputs


def _last(c: Any) -> int:
    dims = c.cross_attention_dim
    return dims[-1] if isinstance(dims, list | tuple) else dims


# Class -> pixels per latent position, frames per latent frame, arguments. HunyuanVideo-1.5 is not here: it branches on
# the values of its image embedding, which an empty copy does not have.
_INPUTS: dict[str, tuple[int, int, Callable[..., dict[str, Any]]]] = {
    "WanTransformer3DModel": (8, 4, _wan),
    "CogVideoXTransformer3DModel": (8, 4, _cogvideox),
    "HunyuanVideoTransformer3DModel": (8, 4, _hunyuan),
    "LTXVideoTransformer3DModel": (32, 8, _ltx),
    "LTX2VideoTransformer3DModel": (32, 8, _ltx2),
    "MochiTransformer3DModel": (8, 6, _mochi),
    "FluxTransformer2DModel": (8, 1, _flux),
    "Flux2Transformer2DModel": (8, 1, _flux2),
    "SD3Transformer2DModel": (8, 1, _sd3),
    "QwenImageTransformer2DModel": (8, 1, _qwen),
    "PixArtTransformer2DModel": (8, 1, _pixart),
    "DiTTransformer2DModel": (8, 1, _dit),
    "UNet2DConditionModel": (8, 1, _unet),
}


def can_count(model: nn.Module) -> bool:
    """Whether `count_work` knows the model's class."""
    return any(base.__name__ in _INPUTS for base in type(model).__mro__)
