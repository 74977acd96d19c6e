"""OneFormer's criterion: built without scipy, images without objects, contrastive loss over all ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers.models.oneformer import modeling_oneformer as host

from hf_attn.integrations.transformers.repairs.oneformer.assignment import assign


class MendedMatcher(host.OneFormerHungarianMatcher):
    """The host's matching costs; the assignment needs scipy no more."""

    @torch.no_grad()
    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs (query, target) of each image, int64; min(queries, targets) of them.

        masks_queries_logits: `[B, Q, H, W]`; class_queries_logits: `[B, Q, C + 1]`; an image has mask_labels
        `[n, H', W']` and class_labels `[n]`.
        """
        images = zip(class_queries_logits, masks_queries_logits, mask_labels, class_labels, strict=True)
        return [self._match(*image) for image in images]

    def _match(self, classes: Tensor, masks: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(labels) == 0:
            none = torch.zeros(0, dtype=torch.int64)
            return none, none
        device = masks.device
        points = torch.rand(1, self.num_points, 2, device=device)
        wanted, found = (
            host.sample_point(x[:, None].float(), points.expand(len(x), -1, -1), align_corners=False).squeeze(1)
            for x in (targets.to(device), masks)
        )
        with torch.autocast(device.type, enabled=False):
            costs = (
                self.cost_mask * host.pair_wise_sigmoid_cross_entropy_loss(found, wanted)
                - self.cost_class * classes.float().softmax(-1)[:, labels.to(device)]
                + self.cost_dice * host.pair_wise_dice_loss(found, wanted)
            )
        rows, columns = assign(_finite(costs).cpu().numpy())
        return torch.as_tensor(rows), torch.as_tensor(columns)


class MendedLoss(host.OneFormerLoss):
    """The host's losses with the same parameters and buffers."""

    def __init__(
        self,
        num_classes: int,
        matcher: host.OneFormerHungarianMatcher,
        weight_dict: dict[str, float],
        eos_coef: float,
        num_points: int,
        oversample_ratio: float,
        importance_sample_ratio: float,
        contrastive_temperature: float | None = None,
    ) -> None:
        nn.Module.__init__(self)  # the host's constructor refuses to run without scipy
        self.num_classes, self.matcher, self.weight_dict = num_classes, matcher, weight_dict
        self.eos_coef, self.num_points = eos_coef, num_points
        self.oversample_ratio, self.importance_sample_ratio = oversample_ratio, importance_sample_ratio
        self.contrastive_temperature = contrastive_temperature
        weights = torch.ones(num_classes + 1)
        weights[-1] = eos_coef
        self.register_buffer("empty_weight", weights)
        if contrastive_temperature is not None:
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / contrastive_temperature)))

    def loss_contrastive(self, contrastive_queries_logits: Tensor, text_queries: Tensor | None) -> dict[str, Tensor]:
        """Both directions of the query-text cross entropy; with several ranks the others' images are negatives too.

        Both `[B, Q, c]`; B may differ between ranks. The mean over ranks that data parallelism takes of the gradients
        makes it that of the whole batch, when every rank has as many images.
        """
        if text_queries is None:  # transformers 5.17 asks for this term without text too
            return {}
        images, texts = (normalize(x.float().flatten(1), dim=-1) for x in (contrastive_queries_logits, text_queries))
        scale = self.logit_scale.exp().clamp(max=100)
        (all_images, first), (all_texts, _) = _gathered(images), _gathered(texts)
        own = torch.arange(first, first + len(images), device=images.device)
        loss = cross_entropy(images @ all_texts.T * scale, own) + cross_entropy(texts @ all_images.T * scale, own)
        return {"loss_contrastive": loss}

    def loss_masks(
        self, masks_queries_logits: Tensor, mask_labels: list[Tensor], indices: list, num_masks: Tensor
    ) -> dict[str, Tensor]:
        """As the host's; 0 (with zero gradients) for a batch without objects."""
        if all(len(queries) == 0 for queries, _ in indices):
            zero = masks_queries_logits.sum() * 0.0
            return {"loss_mask": zero, "loss_dice": zero.clone()}
        labels = [mask.to(masks_queries_logits) for mask in mask_labels]
        return super().loss_masks(masks_queries_logits, labels, indices, num_masks)

    def get_num_masks(self, class_labels: list[Tensor], device: torch.device) -> Tensor:
        """The host's mean number of masks over the ranks, as a scalar: a loss of shape [1] breaks the Trainer."""
        return super().get_num_masks(class_labels, device).squeeze()


def _finite(costs: Tensor) -> Tensor:
    """NaN and infinite costs are worse than any whole assignment of finite ones, and no larger than needed."""
    good = costs.isfinite()
    if good.all():
        return costs
    found = costs[good] if good.any() else costs.new_zeros(1)
    worst = found.max() + (found.max() - found.min() + 1) * min(costs.shape)
    return torch.where(good, costs, worst)


def _gathered(rows: Tensor) -> tuple[Tensor, int]:
    """The rows `[B, c]` of all ranks (B may differ), differentiable, and the place of this rank's first."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, counts[0].new_tensor([len(rows)]))
    lengths = [int(count) for count in counts]
    padded = torch.cat([rows, rows.new_zeros(max(lengths) - len(rows), rows.shape[1])])
    parts = _Gather.apply(padded)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]), sum(lengths[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    """The same tensor of every rank; the gradient of the own one is summed over all ranks that used it."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        summed = torch.stack(grads)
        dist.all_reduce(summed)
        return summed[dist.get_rank()]
