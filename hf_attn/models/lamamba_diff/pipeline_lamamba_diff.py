"""LaMamba-Diff's pipeline: class labels to images, with a VAE or in pixel space."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hf_attn.checks import require_int, require_one_of
from hf_attn.models.lamamba_diff.modeling_lamamba_diff import LaMambaDiffTransformer2DModel

_LEARNED = ("learned", "learned_range")


class LaMambaDiffPipeline(DiTPipeline):
    """Class-conditional generation with classifier-free guidance.

    Differs from `DiTPipeline` in this: the null class is the model's (num_classes), the variance channels go to
    schedulers with a learned variance, and the VAE is optional.

    Args:
        transformer: the denoiser.
        vae: None if the denoiser works on pixels in [-1, 1].
        scheduler: any of diffusers; `DDPMScheduler(variance_type="learned_range")` uses the variance channels.
        id2label: names of the classes, for `get_label_ids`.
    """

    _optional_components = ["vae"]

    def __init__(
        self,
        transformer: LaMambaDiffTransformer2DModel,
        vae: AutoencoderKL | None,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | None = None,
    ) -> None:
        super().__init__(transformer=transformer, vae=vae, scheduler=scheduler, id2label=id2label)
        if scheduler is not None and transformer is not None:
            self._check_variance()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image for every label.

        Args:
            class_labels: one label an image; num_classes is the null class. An unconditional model ignores them.
            guidance_scale: s in eps_null + s (eps_class - eps_null); at 1 and below only the class is computed.
            generator: for the start and for the scheduler's noise; or one an image.
            num_inference_steps: denoising steps.
            output_type: "pil", "np" `[B, H, W, C]`, "pt" `[B, C, H, W]` (both in [0, 1]), or "latent" (undecoded).
            return_dict: an `ImagePipelineOutput`, or a tuple.
            latents: the start, `[B, in_channels, N, N]`, instead of noise.

        Raises ValueError for arguments that do not fit, naming them.
        """
        require_one_of("output_type", output_type, ("pil", "np", "pt", "latent"))
        require_int("num_inference_steps", num_inference_steps, 1)
        model, device = self.transformer, self._execution_device
        channels, null = model.config.in_channels, model.config.num_classes
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)
        if labels.numel() == 0 or labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) > null > 0:
            raise ValueError(f"class_labels must be integers from 0 to {null} (the null class), got {class_labels}")
        self._check_variance()
        guides = guidance_scale > 1 and null > 0
        shape = (len(labels), channels, model.config.sample_size, model.config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=model.dtype)
        elif latents.shape[:2] != shape[:2]:
            raise ValueError(f"latents must be [{shape[0]}, {shape[1]}, N, N], got {tuple(latents.shape)}")
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents.to(device, model.dtype) * self.scheduler.init_noise_sigma
        asked = torch.cat([labels, torch.full_like(labels, null)]) if guides else labels
        extra = self._step_options(generator)
        for t in self.progress_bar(self.scheduler.timesteps):
            rows = torch.cat([latents, latents]) if guides else latents
            rows = self.scheduler.scale_model_input(rows, t)
            predicted = model(rows, timestep=t.expand(len(rows)), class_labels=asked).sample
            if guides:
                predicted = guided(predicted, channels, guidance_scale)[: len(latents)]
            if predicted.shape[1] != channels and not self._learns_variance:
                predicted = predicted[:, :channels]
            latents = self.scheduler.step(predicted, t, latents, **extra).prev_sample
        images = latents if output_type == "latent" else self._finish(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _finish(self, latents: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            latents = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays

    def _step_options(self, generator: Any) -> dict[str, Any]:
        """Schedulers that draw noise take the generator."""
        return {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}

    @property
    def _learns_variance(self) -> bool:
        return self.scheduler.config.get("variance_type") in _LEARNED

    def _check_variance(self) -> None:
        config = self.transformer.config
        out = config.in_channels if config.out_channels is None else config.out_channels
        if self._learns_variance and out == config.in_channels:
            raise ValueError(
                f"the scheduler has variance_type={self.scheduler.config.variance_type!r}, but the model predicts the "
                f"noise only (out_channels={out}); use variance_type='fixed_small'"
            )


def guided(predicted: Tensor, channels: int, scale: float) -> Tensor:
    """Classifier-free guidance of a batch [with class; with null class].

    The first `channels` become eps_null + scale (eps_class - eps_null) in both halves; the variance channels behind
    them stay those of each half.
    """
    noise, rest = predicted[:, :channels], predicted[:, channels:]
    with_class, without = noise.chunk(2)
    noise = without + scale * (with_class - without)
    return torch.cat([torch.cat([noise, noise]), rest], 1)


LaMambaDiffPipeline.__module__ = "hf_attn"
