"""OneFormer's model classes with their forwards checked and the attention interface open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.models.oneformer import modeling_oneformer as host

from hf_attn.checks import require_one_of
from hf_attn.integrations.transformers.repairs.oneformer import pixel_decoder, text
from hf_attn.ops.deformable import BACKENDS

if TYPE_CHECKING:  # to a type checker the mixin is what it is put before
    from transformers import PreTrainedModel as HostModel
else:
    HostModel = object

Name = TypeVar("Name", bound=str | None)


class Mended(HostModel):
    """What transformers asks a model class before it sets an implementation or checkpoints layers."""

    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    # The host has a list here, which the Trainer cannot look up.
    main_input_name = "pixel_values"

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """As the host's; a plain name goes to the backbone only where the backbone supports it."""
        if isinstance(attn_implementation, str):
            backbone = next(m for name, m in self.named_modules() if name.endswith("pixel_level_module.encoder"))
            own = backbone_implementation(type(backbone), attn_implementation)
            attn_implementation = {"": attn_implementation, "backbone_config": own}
        PreTrainedModel.set_attn_implementation(self, attn_implementation, allow_all_kernels)


class MendedOneFormerModel(Mended, host.OneFormerModel):
    """The host's model; text is needed only where a loss reads it."""

    def forward(
        self, pixel_values: Tensor, task_inputs: Tensor, text_inputs: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As the host's forward; task_inputs `[B, config.task_seq_len]`. Raises ValueError for other shapes."""
        check_inputs(self.config, pixel_values, task_inputs, text_inputs)
        return host_forward(self, pixel_values, task_inputs, text_inputs, **kwargs)


class MendedSegmentation(Mended, host.OneFormerForUniversalSegmentation):
    """The host's head; labels come in pairs, and a loss with `return_dict=False` is the first of the tuple."""

    def forward(
        self,
        pixel_values: Tensor,
        task_inputs: Tensor,
        text_inputs: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the host's forward. Raises ValueError for inputs and labels that do not fit together."""
        check_inputs(self.config, pixel_values, task_inputs, text_inputs)
        check_labels(self.config, len(pixel_values), text_inputs, mask_labels, class_labels)
        labels = {"mask_labels": mask_labels, "class_labels": class_labels}
        out = host_segmentation_forward(
            self, pixel_values, task_inputs, text_inputs, **labels, return_dict=True, **kwargs
        )
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


# A checkpoint records the class it was saved from; that of a mended model is the host's.
MendedOneFormerModel.__name__ = host.OneFormerModel.__name__
MendedSegmentation.__name__ = host.OneFormerForUniversalSegmentation.__name__

# Kept apart: `patch_oneformer` writes our forwards into the host's classes.
host_forward = host.OneFormerModel.forward
host_segmentation_forward = host.OneFormerForUniversalSegmentation.forward


def backbone_implementation(backbone: type[PreTrainedModel], name: Name) -> Name | str:
    """`name`, or what the backbone runs instead: "flex_attention" and "sdpa" are not in every vision model."""
    lacks_flex = name == "flex_attention" and not backbone._supports_flex_attn
    if lacks_flex or (name == "sdpa" and not backbone._supports_sdpa):
        return "sdpa" if backbone._supports_sdpa else "eager"
    return name


def check_options(config: Any) -> None:
    """Raise ValueError for a value of our options in a OneFormerConfig that does not exist."""
    for name, allowed in ((text.OPTION, text.CHOICES), (pixel_decoder.OPTION, BACKENDS)):
        if (value := getattr(config, name, None)) is not None:
            require_one_of(f"config.{name}", value, allowed)


def check_inputs(config: Any, pixel_values: Tensor, task_inputs: Tensor, text_inputs: Tensor | None) -> None:
    """Raise ValueError, naming the argument, for inputs of a wrong shape."""
    if pixel_values is None or pixel_values.dim() != 4:
        shape = None if pixel_values is None else tuple(pixel_values.shape)
        raise ValueError(f"pixel_values must be [batch, channels, height, width], got {shape}")
    expected = (len(pixel_values), config.task_seq_len)
    if task_inputs is None or tuple(task_inputs.shape) != expected:
        shape = None if task_inputs is None else tuple(task_inputs.shape)
        raise ValueError(
            f"task_inputs must be the token ids of one task sentence an image, {expected} (config.task_seq_len), got "
            f"{shape}; OneFormerProcessor(images, task_inputs=[...]) makes them"
        )
    if text_inputs is None or not config.is_training or text_inputs.dim() != 3:
        return
    expected = (len(pixel_values), config.num_queries - config.text_encoder_n_ctx)
    if tuple(text_inputs.shape[:2]) != expected:
        raise ValueError(
            f"text_inputs must hold num_queries - text_encoder_n_ctx = {expected[1]} texts for each of {expected[0]} "
            f"images, got {tuple(text_inputs.shape)}"
        )


def check_labels(
    config: Any,
    batch: int,
    text_inputs: Tensor | None,
    mask_labels: list[Tensor] | None,
    class_labels: list[Tensor] | None,
) -> None:
    """Raise ValueError for labels that are incomplete or disagree."""
    if (mask_labels is None) != (class_labels is None):
        missing = "mask_labels" if mask_labels is None else "class_labels"
        raise ValueError(f"the loss needs mask_labels and class_labels together; {missing} is missing")
    if mask_labels is None or class_labels is None:
        return
    counts = [len(mask) for mask in mask_labels], [len(label) for label in class_labels]
    if counts[0] != counts[1] or len(counts[0]) != batch:
        raise ValueError(
            f"mask_labels and class_labels must have one entry for each of {batch} images and as many masks as "
            f"classes, got {counts[0]} masks and {counts[1]} classes"
        )
    for label in class_labels:
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < config.num_labels:
            raise ValueError(f"class_labels must be in 0..{config.num_labels - 1} (config.num_labels), got {label}")
    if config.is_training and text_inputs is None:
        raise ValueError(
            "with config.is_training=True the loss compares queries with text: pass text_inputs too, or set "
            "config.is_training=False to train without the contrastive loss"
        )
