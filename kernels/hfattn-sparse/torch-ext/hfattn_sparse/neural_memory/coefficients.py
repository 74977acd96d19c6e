"""What a token of a chunk adds to the weights behind a later token, from the gates alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """Of a chunk of m tokens that starts with weights W and momentum S; rows t, columns s.

    W_t = beta_t W + f_t S - sum_s G[t, s] u_s and S_t = m_t S - sum_s N[t, s] u_s, u_s the gradient of token s.
    """

    beta: Tensor  # [..., m]
    m: Tensor  # [..., m]
    f: Tensor  # [..., m]
    N: Tensor  # [..., m, m], lower triangle
    G: Tensor  # [..., m, m], lower triangle

    def before(self) -> Coefficients:
        """Of the weights in front of every token instead of behind it."""
        beta = torch.cat([torch.ones_like(self.beta[..., :1]), self.beta[..., :-1]], -1)
        f = torch.cat([torch.zeros_like(self.f[..., :1]), self.f[..., :-1]], -1)
        first = torch.zeros_like(self.G[..., :1, :])
        return self._replace(beta=beta, f=f, G=torch.cat([first, self.G[..., :-1, :]], -2))


def coefficients(theta: Tensor, eta: Tensor, alpha: Tensor, mask: Tensor | None = None) -> Coefficients:
    """Rows N_t = eta_t N_{t-1} + theta_t e_t and G_t = (1 - alpha_t) G_{t-1} + N_t, and the factors of W and S.

    Two solves with unit bidiagonal matrices: nothing is divided by a gate, so gates of exactly 0 and 1 are as good as
    others. A token that `mask` hides repeats the row before it.

    Args:
        theta, eta, alpha: `[..., m]`.
        mask: bool `[..., m]`, true for tokens that are written.
    """
    size = theta.shape[-1]
    keep = 1 - alpha
    if mask is not None:
        theta, eta, keep = theta.masked_fill(~mask, 0), eta.masked_fill(~mask, 1), keep.masked_fill(~mask, 1)
    first = torch.zeros(size, 1, dtype=theta.dtype, device=theta.device)
    first[:1] = 1
    added = torch.cat([torch.diag_embed(theta), eta[..., None] * first], -1)
    momentum = torch.linalg.solve_triangular(_bidiagonal(eta), added, upper=False, unitriangular=True)
    shown = momentum if mask is None else momentum * mask[..., None]
    weights = torch.cat([shown, keep[..., None] * first], -1)
    weights = torch.linalg.solve_triangular(_bidiagonal(keep), weights, upper=False, unitriangular=True)
    return Coefficients(
        beta=weights[..., size + 1],
        m=momentum[..., size],
        f=weights[..., size],
        N=momentum[..., :size],
        G=weights[..., :size],
    )


def _bidiagonal(factor: Tensor) -> Tensor:
    """I with -factor_t at [t, t - 1]: x = its inverse times b is x_t = factor_t x_{t-1} + b_t."""
    size = factor.shape[-1]
    below = torch.diag_embed(-factor[..., 1:], offset=-1) if size > 1 else factor.new_zeros(*factor.shape, 1)
    return below + torch.eye(size, dtype=factor.dtype, device=factor.device)
