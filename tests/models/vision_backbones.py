"""What every vision backbone is put through; a family's tests give a tiny config and call these."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics of norms that are far from their start, so that nothing cancels or vanishes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                low, high = (
                    (0.5, 1.5) if tensor.dim() == 1 and name.endswith("weight") or "gamma" in name else (-0.3, 0.3)
                )
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


def classifier(config: Any) -> nn.Module:
    """A classifier of the config with random weights, in evaluation."""
    torch.manual_seed(0)
    return randomised(AutoModelForImageClassification.from_config(config))


def pixels(batch: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """Random images."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def macs(build: Callable[[], nn.Module], size: int) -> float:
    """Products of convolutions, linear layers and attention of one image, in units of 1e9; nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        model, images = build().eval(), torch.empty(1, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            model(images)
    return counter.get_total_flops() / 2e9


@torch.no_grad()
def check_saved(model: nn.Module, folder: Path) -> None:
    """Saved and loaded as classifier, trunk and backbone, the numbers are the same."""
    images = pixels(2, 64, 48)
    model.save_pretrained(folder)
    outputs = model(images, output_hidden_states=True)
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert torch.equal(loaded(images).logits, outputs.logits)
    trunk = AutoModel.from_pretrained(folder).eval()
    assert torch.equal(trunk(images).last_hidden_state, outputs.hidden_states[-1])
    backbone_class = AutoBackbone._model_mapping[type(model.config)]
    backbone = backbone_class.from_pretrained(folder, out_features=["stem", *STAGES]).eval()
    backbone.hidden_states_norms = nn.ModuleDict()
    maps = backbone(images).feature_maps
    assert all(torch.equal(a, b) for a, b in zip(maps, outputs.hidden_states, strict=True))
    assert [x.shape[1] for x in maps] == backbone.channels == model.config.stage_channels


def check_sizes(model: nn.Module) -> None:
    """Any size from 32 pixels on, also sides that no stride divides."""
    with torch.no_grad():
        for height, width in ((32, 32), (33, 47), (96, 64), (40, 150)):
            found = model(pixels(1, height, width), output_hidden_states=True)
            assert found.logits.isfinite().all()
            for stage, stride in zip(found.hidden_states[1:], (4, 8, 16, 32), strict=True):
                assert stage.shape[2:] == (-(-height // stride), -(-width // stride))


def check_rows_are_independent(model: nn.Module) -> None:
    """An image's logits do not depend on its neighbours in the batch."""
    images = pixels(3, 64, 64)
    with torch.no_grad():
        together, alone = model(images).logits, torch.cat([model(x[None]).logits for x in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * float(together.abs().max()))


@torch.no_grad()
def check_segmenters(config: Any) -> None:
    """UperNet and Mask2Former of transformers run on the backbone's four maps."""
    config.out_features = STAGES
    small = {"hidden_size": 16, "auxiliary_channels": 8, "num_labels": 3}
    uper = UperNetConfig(backbone_config=config, auxiliary_in_channels=config.stage_channels[3], **small)
    assert UperNetForSemanticSegmentation(uper).eval()(pixels(1, 64, 96)).logits.shape == (1, 3, 64, 96)
    mask2former = Mask2FormerConfig(
        backbone_config=config,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=4,
        num_labels=3,
    )
    found = Mask2FormerForUniversalSegmentation(mask2former).eval()(pixels(1, 64, 96))
    assert found.masks_queries_logits.shape == (1, 4, 16, 24)


def check_export(model: nn.Module) -> None:
    """torch.export gives a program with the same numbers."""
    images = pixels(1, 64, 64)
    program = torch.export.export(model, (images,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images)["logits"], model(images).logits)


def check_training(model: nn.Module) -> None:
    """Every parameter learns, and gradient checkpointing changes nothing."""
    model.train()
    images, labels, found = pixels(2, 64, 64), torch.tensor([1, 3]), []
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for checkpointing in (False, True):
        if checkpointing:
            model.load_state_dict(start)
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(images, labels=labels).loss
        loss.backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        without = [name for name, grad in found[-1].items() if not grad.isfinite().all() or not grad.any()]
        assert not without, without
    worst = max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0])
    assert worst < 1e-4 * max(float(grad.abs().max()) for grad in found[0].values())


def digest(logits: torch.Tensor) -> str:
    """A short name for exact numbers."""
    return hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()[:16]
