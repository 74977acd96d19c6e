"""Tiny pipelines of every supported class, built offline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# -- text encoders ---------------------------------------------------------------------------------------------------


def tokenizer(bos: str | None = None, max_len: int = 64):
    """One token a character; T5-like, or CLIP-like with a `bos` token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", *([bos] if bos else [])]
    vocab = {token: i for i, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz0123456789 .,"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = [(token, vocab[token]) for token in ["</s>", *([bos] if bos else [])]]
    single = f"{bos} $A </s>" if bos else "$A </s>"
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token=bos,
        model_max_length=max_len,
    )  # fmt: skip


def t5(width: int):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=4, d_ff=2 * width, num_layers=1, num_heads=2))


def clip(projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=32, eos_token_id=1, bos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


# -- the pipelines ---------------------------------------------------------------------------------------------------


@dataclass
class Tiny:
    """A pipeline (or a bare model) and how to call it.

    Args:
        target: the pipeline or model.
        model: its denoiser.
        call: arguments of one generation.
        steps: denoising steps of it.
        branches: model calls a step (guidance).
        sites: self-attention layers.
        grid: (frames, height, width) in tokens.
        text: tokens in the attention beside the lattice.
        samples: attention calls of a site in one model call (Mochi runs samples one by one).
    """

    target: Any
    model: torch.nn.Module
    call: dict[str, Any]
    branches: int
    sites: int
    grid: tuple[int, int, int]
    text: int = 0
    steps: int = 2
    samples: int = 1

    def run(self, **changes: Any) -> Tensor:
        """One generation, seeded; latents, or a bare model's output."""
        call = {**self.call, **changes}
        with torch.no_grad():
            if self.target is self.model:
                return self.model(**call, return_dict=False)[0]
            call["num_inference_steps"] = call.get("num_inference_steps", self.steps)
            out = self.target(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
        found = out[0] if isinstance(out, tuple) else (out.frames if hasattr(out, "frames") else out.images)
        return torch.as_tensor(found[0] if isinstance(found, list) else found)

    @property
    def calls(self) -> int:
        """Attention calls a generation makes."""
        steps = 1 if self.target is self.model else self.steps
        return self.sites * steps * self.branches * self.samples


def wan(layers: int = 2, second: bool = False) -> Tiny:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    def transformer():
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=16, freq_dim=32, ffn_dim=32, num_layers=layers,
        )  # fmt: skip

    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    text = UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2))
    pipe = WanPipeline(
        tokenizer=tokenizer(), text_encoder=text, vae=vae, transformer=transformer(),
        transformer_2=transformer() if second else None, boundary_ratio=0.5 if second else None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip
    call = dict(prompt="a cat", negative_prompt="", height=32, width=48, num_frames=9, max_sequence_length=16)
    return Tiny(pipe, pipe.transformer, call, branches=2, sites=layers, grid=(3, 2, 3))


def cogvideox(layers: int = 2) -> Tiny:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=16, num_layers=layers, sample_width=6, sample_height=4, sample_frames=9, patch_size=2,
        max_text_seq_length=16, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    pipe = CogVideoXPipeline(tokenizer(), t5(16), vae, transformer, CogVideoXDDIMScheduler())
    call = dict(prompt="a cat", negative_prompt="", height=32, width=48, num_frames=9, max_sequence_length=16)
    return Tiny(pipe, transformer, call, branches=1, sites=layers, grid=(3, 2, 3), text=16)


def hunyuan(layers: int = 1) -> Tiny:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers,
        num_single_layers=layers, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    pipe = HunyuanVideoPipeline(None, None, transformer, vae, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    call = dict(
        prompt_embeds=torch.randn(1, 8, 16), pooled_prompt_embeds=torch.randn(1, 8), prompt_attention_mask=mask,
        height=32, width=48, num_frames=9,
    )  # fmt: skip
    return Tiny(pipe, transformer, call, branches=1, sites=2 * layers, grid=(3, 2, 3), text=8)


def hunyuan15(layers: int = 2) -> Tiny:
    from diffusers import HunyuanVideo15Transformer3DModel

    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    call = dict(
        hidden_states=torch.randn(1, 9, 2, 4, 6), timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 6, 16), encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]),
        encoder_hidden_states_2=torch.randn(1, 4, 12), encoder_attention_mask_2=torch.tensor([[1, 1, 0, 0]]),
        image_embeds=torch.zeros(1, 3, 8),
    )  # fmt: skip
    return Tiny(transformer, transformer, call, branches=1, sites=layers, grid=(2, 4, 6), text=13)


def ltx(layers: int = 2) -> Tiny:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=layers, caption_channels=32,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    pipe = LTXPipeline(FlowMatchEulerDiscreteScheduler(), vae, t5(32), tokenizer(), transformer)
    call = dict(prompt="a cat", negative_prompt="", height=64, width=96, num_frames=17, max_sequence_length=16)
    return Tiny(pipe, transformer, call, branches=1, sites=layers, grid=(3, 2, 3))


def ltx2(layers: int = 2) -> Tiny:
    from diffusers import LTX2VideoTransformer3DModel

    transformer = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=layers, caption_channels=16,
    )  # fmt: skip
    call = dict(
        hidden_states=torch.randn(1, 2 * 4 * 6, 4), audio_hidden_states=torch.randn(1, 5, 4),
        encoder_hidden_states=torch.randn(1, 7, 16), audio_encoder_hidden_states=torch.randn(1, 7, 16),
        timestep=torch.full((1, 48), 500.0),
        audio_timestep=torch.full((1, 5), 500.0), num_frames=2, height=4, width=6, audio_num_frames=5, fps=25.0,
    )  # fmt: skip
    return Tiny(transformer, transformer, call, branches=1, sites=layers, grid=(2, 4, 6))


def mochi(layers: int = 2) -> Tiny:
    from diffusers import (
        AutoencoderKLMochi,
        FlowMatchEulerDiscreteScheduler,
        MochiPipeline,
        MochiTransformer3DModel,
    )

    transformer = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=layers, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=32, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    vae = AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
    )  # fmt: skip
    pipe = MochiPipeline(FlowMatchEulerDiscreteScheduler(), vae, t5(32), tokenizer(), transformer)
    call = dict(prompt="a cat", negative_prompt="", height=32, width=48, num_frames=13, max_sequence_length=16)
    return Tiny(pipe, transformer, call, branches=1, sites=layers, grid=(3, 2, 3), samples=2, text=6)


def flux(layers: int = 1) -> Tiny:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=layers, num_single_layers=layers, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4,), latent_channels=1, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.0609, scaling_factor=1.5,
    )  # fmt: skip
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, clip(), tokenizer("<s>", 77), t5(32), tokenizer(), transformer
    )
    call = dict(prompt="a cat", height=16, width=24, max_sequence_length=16)
    return Tiny(pipe, transformer, call, branches=1, sites=2 * layers, grid=(1, 8, 12), text=16)


def flux2(layers: int = 1) -> Tiny:
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=layers, num_single_layers=layers, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(4,), latent_channels=1, norm_num_groups=1, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), layers_per_block=1, sample_size=32,
    )  # fmt: skip
    pipe = Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)
    call = dict(prompt=None, prompt_embeds=torch.randn(1, 16, 16), height=16, width=24)
    return Tiny(pipe, transformer, call, branches=1, sites=2 * layers, grid=(1, 8, 12), text=16)


def sd3(layers: int = 2) -> Tiny:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=layers, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4,), latent_channels=4, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.0609, scaling_factor=1.5,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), vae, clip(True), tokenizer("<s>", 77), clip(True),
        tokenizer("<s>", 77), t5(32), tokenizer(),
    )  # fmt: skip
    call = dict(prompt="a cat", negative_prompt="", height=8, width=12, max_sequence_length=16)
    return Tiny(pipe, transformer, call, branches=1, sites=layers + 1, grid=(1, 8, 12), text=93)


def qwen(layers: int = 2) -> Tiny:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)
    call = dict(
        prompt_embeds=torch.randn(1, 8, 16), prompt_embeds_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]),
        height=64, width=96,
    )  # fmt: skip
    return Tiny(pipe, transformer, call, branches=1, sites=layers, grid=(1, 4, 6), text=8)


def pixart(layers: int = 2) -> Tiny:
    from diffusers import AutoencoderKL, DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=layers, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True,
        activation_fn="gelu-approximate", norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    pipe = PixArtSigmaPipeline(tokenizer(), t5(32), vae, transformer, DDIMScheduler())
    call = dict(
        prompt="a cat", negative_prompt="", height=16, width=24, max_sequence_length=16, use_resolution_binning=False,
        clean_caption=False,
    )  # fmt: skip
    return Tiny(pipe, transformer, call, branches=1, sites=layers, grid=(1, 8, 12))


def dit(layers: int = 2) -> Tiny:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=16, num_layers=layers, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    pipe = DiTPipeline(transformer, vae, DDIMScheduler())
    return Tiny(pipe, transformer, dict(class_labels=[1]), branches=1, sites=layers, grid=(1, 8, 8))


def sdxl(layers: int = 1) -> Tiny:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, layers), norm_num_groups=1,
        projection_class_embeddings_input_dim=80, cross_attention_dim=64,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64), latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae, clip(), clip(True), tokenizer("<s>", 77), tokenizer("<s>", 77), unet, EulerDiscreteScheduler()
    )
    call = dict(prompt="a cat", negative_prompt="", height=32, width=48)
    return Tiny(pipe, unet, call, branches=1, sites=4 * layers, grid=(1, 8, 12))


PIPELINES: dict[str, Callable[..., Tiny]] = {
    "wan": wan, "cogvideox": cogvideox, "hunyuan": hunyuan, "hunyuan15": hunyuan15, "ltx": ltx, "ltx2": ltx2,
    "mochi": mochi, "flux": flux, "flux2": flux2, "sd3": sd3, "qwen": qwen, "pixart": pixart, "dit": dit, "sdxl": sdxl,
}  # fmt: skip


def build(name: str, **options: Any) -> Tiny:
    """A tiny pipeline, always with the same weights, in evaluation mode and without progress bars."""
    torch.manual_seed(0)
    tiny = PIPELINES[name](**options)
    tiny.model.eval()
    if tiny.target is not tiny.model:
        tiny.target.set_progress_bar_config(disable=True)
        for part in tiny.target.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
    return tiny


def close(got: Tensor, expected: Tensor, limit: float = 1e-5) -> bool:
    """Whether the largest difference is at most `limit` of the largest value (or of 1)."""
    return bool((got - expected).abs().max() <= limit * max(expected.abs().max().item(), 1.0))
