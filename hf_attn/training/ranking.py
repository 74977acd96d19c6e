"""Loss of rankers that score documents by attention (BlockRank, InfoNCE)."""

from __future__ import annotations

import torch
from torch import Tensor


def contrastive_loss(
    scores: Tensor, answers: Tensor, temperature: float = 0.05, candidates: Tensor | None = None
) -> Tensor:
    """-mean over rows of [logsumexp over positives of S / temperature - logsumexp over all of S / temperature].

    BlockRank, arXiv 2510.05396 (one positive: InfoNCE).

    Args:
        scores: `[B, N]`.
        answers: integer `[B, P]`, numbers of the positive documents, -1 where a row has fewer.
        temperature: > 0.
        candidates: bool `[B, N]`, False for documents that a row does not have; default all.

    Rows without a positive are left out of the mean; 0 when none remains. Raises ValueError for a temperature that is
    not positive, and for answers that name no candidate.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if answers.dim() != 2 or answers.shape[0] != scores.shape[0] or answers.is_floating_point():
        raise ValueError(
            f"answers must be an integer tensor [{scores.shape[0]}, positives], got {tuple(answers.shape)}"
        )
    count = scores.shape[1]
    if answers.numel() and not -1 <= int(answers.min()) <= int(answers.max()) < count:
        raise ValueError(f"answers must lie in -1 (none) to {count - 1}, got {answers.tolist()}")
    if candidates is None:
        candidates = torch.ones_like(scores, dtype=torch.bool)
    positive = torch.zeros(scores.shape[0], count + 1, dtype=torch.bool, device=scores.device)
    positive = positive.scatter(1, torch.where(answers < 0, count, answers), True)[:, :count]
    if bool((positive & ~candidates).any()):
        raise ValueError("answers names a document that the row does not have (candidates is False there)")
    rows = positive.any(1)
    if not bool(rows.any()):
        return scores.sum() * 0
    scaled = (scores[rows] / temperature).masked_fill(~candidates[rows], float("-inf"))
    best = scaled.masked_fill(~positive[rows], float("-inf"))
    return (scaled.logsumexp(1) - best.logsumexp(1)).mean()
