"""A Trainer for image classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_attn.training.augmentation import random_erasing
from hf_attn.training.images import as_targets, enlarge, mix, random_affine, soft_loss

_AVERAGE = "average.safetensors"


class WeightAverage(TrainerCallback):
    """Exponential moving average of the weights and of batch-norm statistics, kept with every checkpoint.

    Args:
        decay: weight of the old average in each step, in [0, 1); early steps use min(decay, (1 + n) / (10 + n)), so
            that the start is soon forgotten.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """As the host's."""
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _AVERAGE
        found = load_file(saved) if state.global_step and saved.is_file() else _own(model).state_dict()
        device = next(model.parameters()).device
        self.average = {name: value.detach().to(device, copy=True) for name, value in found.items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """As the host's."""
        step = state.global_step
        rest = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in _own(model).state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value.detach().to(self.average[name]), rest)
            else:
                self.average[name].copy_(value)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As the host's."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_file({name: value.contiguous() for name, value in self.average.items()}, folder / _AVERAGE)

    def load_into(self, model: nn.Module) -> None:
        """Give a model the averaged weights."""
        _own(model).load_state_dict(self.average)


class ImageTrainer(Trainer):
    """Trainer that augments and mixes batches on the device they train on, and knows soft targets.

    Args:
        augment: arguments of `random_affine`.
        mixing: arguments of `mix`.
        resize: for small images in 0 .. 1: enlarge them to the model's `image_size`, after augmentation to -1 .. 1.
        smoothing: label smoothing of the training loss.
        erasing: probability of `random_erasing`, of every training image.
    """

    def __init__(
        self,
        *arguments: Any,
        augment: dict[str, float] | None = None,
        mixing: dict[str, float] | None = None,
        resize: bool = False,
        smoothing: float = 0.0,
        erasing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.augment, self.mixing, self.resize, self.smoothing = augment or {}, mixing or {}, resize, smoothing
        self.erasing = erasing
        # The loss is a mean over the batch, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **unused: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Loss of a batch; in training of augmented, mixed images."""
        config = _own(model).config
        pixels, targets = inputs["pixel_values"], as_targets(inputs["labels"], config.num_labels)
        if self.resize:
            pixels = enlarge(pixels, config.image_size, config.num_channels)
        if model.training:
            pixels = random_affine(pixels, **self.augment)
            pixels, targets = mix(pixels, targets, **self.mixing)
        if self.resize:
            pixels = pixels * 2 - 1
        if model.training:
            pixels = random_erasing(pixels, self.erasing)
        outputs = model(pixel_values=pixels)
        aux = getattr(config, "aux_loss_weight", 0.0) if model.training else 0.0
        loss = soft_loss(outputs, targets, self.smoothing if model.training else 0.0, aux)
        return (loss, {"logits": outputs["logits"]}) if return_outputs else loss


def _own(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of data-parallel training."""
    return getattr(model, "module", model)
