"""Small OneFormer models, the host's and ours, and inputs for them."""

from __future__ import annotations

import torch
from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig

from hf_attn.models.oneformer import OneFormerAttnForUniversalSegmentation

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def tiny_config(**options) -> OneFormerConfig:
    backbone = options.pop("backbone_config", None) or SwinConfig(
        embed_dim=4, depths=[1] * 4, num_heads=[1, 2, 2, 4], window_size=4, image_size=64, mlp_ratio=2.0,
        out_features=STAGES,
    )  # fmt: skip
    sizes = dict.fromkeys(("conv_dim", "mask_dim", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward"), 32)
    layers = {"encoder_layers": 2, "decoder_layers": 4, "query_dec_layers": 1, "num_attention_heads": 4}
    text = {"text_encoder_width": 64, "text_encoder_context_length": 9, "text_encoder_num_layers": 1,
            "text_encoder_vocab_size": 23, "text_encoder_n_ctx": 2}  # fmt: skip
    rest = {"num_queries": 6, "num_labels": 5, "task_seq_len": 7, "train_num_points": 64}
    if options.get("is_training"):
        text["text_encoder_n_ctx"] = 0  # contexts need a text tower as wide as the decoder
    return OneFormerConfig(backbone_config=backbone, **(sizes | layers | text | rest | options))


def shake(model, seed=0):
    """Random weights everywhere, so that nothing is hidden behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        scale, centre = (0.1, 1.0) if "norm" in name and p.dim() == 1 and "weight" in name else (0.2, 0.0)
        p.data = centre + scale * torch.randn(p.shape, generator=generator)
    return model.eval()


def stock(attn_implementation="eager", **options):
    return shake(
        OneFormerForUniversalSegmentation._from_config(tiny_config(**options), attn_implementation=attn_implementation)
    )


def ours(attn_implementation="eager", **options):
    model = OneFormerAttnForUniversalSegmentation._from_config(
        tiny_config(**options), attn_implementation=attn_implementation
    )
    return shake(model)


def inputs(batch=2, size=(64, 96), seed=3):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, *size, generator=generator)
    return {"pixel_values": pixels, "task_inputs": torch.randint(0, 9, (batch, 7), generator=generator).float()}


def labels(batch=2, size=(64, 96), counts=(3, 2)):
    generator = torch.Generator().manual_seed(5)
    masks = [torch.randint(0, 2, (n, *size), generator=generator).float() for n in counts[:batch]]
    return {"mask_labels": masks, "class_labels": [torch.arange(n) for n in counts[:batch]]}


def texts(config, batch=2):
    count = config.num_queries - config.text_encoder_n_ctx
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, config.text_encoder_vocab_size, (batch, count, config.text_encoder_context_length),
                         generator=generator)  # fmt: skip
