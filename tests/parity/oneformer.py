"""Parity adapter of OneFormer: every result of a golden file, through the public API."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DinatConfig, OneFormerConfig, SwinConfig
from transformers.models.oneformer.modeling_oneformer import (
    dice_loss,
    pair_wise_dice_loss,
    pair_wise_sigmoid_cross_entropy_loss,
    sigmoid_cross_entropy_loss,
)

from hf_attn.models.oneformer import OneFormerAttnForUniversalSegmentation
from hf_attn.ops import ms_deform_attn

# The deformable attention of this version has no Triton path.
HAS_TRITON = False


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of all cases, told apart by what their config holds: a model, sampled maps, a text tower or losses."""
    results: dict[str, Tensor] = {}
    for name, case in config["cases"].items():
        mine = {key.removeprefix(f"{name}."): value for key, value in inputs.items() if key.startswith(f"{name}.")}
        if "oneformer" in case:
            shared = {key: value for key, value in inputs.items() if key in ("pixel_values", "task_inputs")}
            head = {key.removeprefix("head.w."): value for key, value in inputs.items() if key.startswith("head.w.")}
            found = _model(mine, shared, head, case)
        else:
            found = (_sampling if "shapes" in case else _text if "ctx" in case else _losses)(mine, case)
        results |= {f"{name}.{key}": value for key, value in found.items()}
    return results


@torch.no_grad()
def _model(mine: dict[str, Tensor], shared: dict[str, Tensor], head: dict[str, Tensor], case: dict) -> dict:
    backbone = (DinatConfig if "dilations" in case["backbone"] else SwinConfig)(**case["backbone"])
    config = OneFormerConfig(backbone_config=backbone, **case["oneformer"])
    model = OneFormerAttnForUniversalSegmentation._from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(head | {key[2:]: value for key, value in mine.items() if key.startswith("w.")})
    out = model(**shared, output_hidden_states=True)
    return {
        "class_queries_logits": out.class_queries_logits,
        "masks_queries_logits": out.masks_queries_logits,
        "task_token": out.task_token,
        "aux0_masks": out.auxiliary_predictions[0]["masks_queries_logits"],
        **{f"backbone.{i}": x for i, x in enumerate(out.encoder_hidden_states)},
        **{f"pixel_decoder.{i}": x for i, x in enumerate(out.pixel_decoder_hidden_states)},
    }


def _sampling(mine: dict[str, Tensor], case: dict) -> dict[str, Tensor]:
    names = ("value", "sampling_locations", "attention_weights")
    leaves = [mine[name].clone().requires_grad_() for name in names]
    out = ms_deform_attn(leaves[0], case["shapes"], *leaves[1:])
    grads = torch.autograd.grad(out, leaves, mine["grad_out"])
    return {"out": out, **{f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}}


def _tiny(**options) -> OneFormerAttnForUniversalSegmentation:
    """A small model, for the parts that need no pixels."""
    backbone = SwinConfig(
        embed_dim=4, depths=[1] * 4, num_heads=[1] * 4, out_features=[f"stage{i}" for i in range(1, 5)]
    )
    sizes = dict.fromkeys(("conv_dim", "mask_dim", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward"), 32)
    layers = {"encoder_layers": 1, "decoder_layers": 2, "query_dec_layers": 1, "num_attention_heads": 4}
    config = OneFormerConfig(backbone_config=backbone, **(sizes | layers | options))
    return OneFormerAttnForUniversalSegmentation(config).eval()


@torch.no_grad()
def _text(mine: dict[str, Tensor], case: dict) -> dict[str, Tensor]:
    weights = {key[2:]: value for key, value in mine.items() if key.startswith("w.")}
    results = {}
    for kind in ("causal", "bidirectional"):
        model = _tiny(
            is_training=True,
            text_attention=kind,
            text_encoder_width=weights["token_embedding.weight"].shape[1],
            text_encoder_context_length=case["ctx"],
            text_encoder_num_layers=case["layers"],
            text_encoder_vocab_size=case["vocab"],
        )
        encoder = model.model.text_mapper.text_encoder
        encoder.load_state_dict(weights)
        results[f"out_{kind}"] = encoder(mine["input_ids"])
    return results


@torch.no_grad()
def _losses(mine: dict[str, Tensor], case: dict) -> dict[str, Tensor]:
    criterion = _tiny().criterion
    criterion.logit_scale.copy_(mine["logit_scale"])
    points, labels = mine["point_logits"], mine["point_labels"]
    return {
        "contrastive": criterion.loss_contrastive(mine["image_queries"], mine["text_queries"])["loss_contrastive"],
        "dice": dice_loss(points, labels, case["num_masks"]),
        "mask": sigmoid_cross_entropy_loss(points, labels, case["num_masks"]),
        "pair_dice": pair_wise_dice_loss(points, labels),
        "pair_ce": pair_wise_sigmoid_cross_entropy_loss(points, labels),
    }
