"""Scores from one backward pass that could tell where SE pays: what was tried.

Let g be the gradient of an image's loss by the gates of a site, at gates of 1, and s what SE sees there. Of a linear gate A s,
the gradient by A is ``E[g s^T] = E[g] E[s]^T + Cov(g, s)``. The first term is the same for all images: a static factor for each
channel has it, too. The second is what only a gate that looks at the image can use. Their squared norms say how fast the loss falls
at first. Estimated naively, the norms of noise would count; so both are sums over pairs of different images: for the
covariance that is the unbiased estimator of HSIC with linear kernels (Song et al., JMLR 2012, equation 5).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .signals import Signals


def static(signals: Signals) -> float:
    """What a static factor for each channel could win at first: ``|E[g]|^2``."""
    pairs = _pairs(signals.gradients)
    return float(pairs.sum() / (len(pairs) * (len(pairs) - 1)))


def covariance(signals: Signals) -> float:
    """What SE could win beyond that at first: ``|Cov(g, s)|^2``, with each squeezed value in units of its deviation."""
    k, l = _pairs(signals.gradients), _pairs(_standardised(signals.squeezed))  # noqa: E741 - as in the paper
    n, rows_k, rows_l = len(k), k.sum(1), l.sum(1)
    sums = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    return float(((k * l).sum() + sums - 2 * (rows_k @ rows_l) / (n - 2)) / (n * (n - 3)))


def nuclear(signals: Signals) -> float:
    """The sum of the singular values of the covariance, noise included."""
    g = signals.gradients - signals.gradients.mean(0)
    return float(torch.linalg.svdvals(g.T @ _standardised(signals.squeezed) / len(g)).sum())


def gradient_norm(signals: Signals) -> float:
    """``E[|g|^2]``, which asks nothing of s."""
    return float(signals.gradients.square().sum(1).mean())


def held_out(signals: Signals) -> float:
    """What gates that are linear in random features of SE's own kind could win, by a quadratic model of the loss (its Hessian taken as
    ``E[g g^T]``), fitted to three quarters of the images, with the best step along it on the other quarter."""
    kernel = _arc_cosine(signals.squeezed)
    m = (signals.gradients @ signals.gradients.T) * kernel / kernel.diagonal().mean()
    n, won = len(m), 0.0
    for part in torch.randperm(n, generator=torch.Generator().manual_seed(0)).chunk(4):
        rest = torch.ones(n, dtype=torch.bool)
        rest[part] = False
        own = m[rest][:, rest]
        ridge = 0.3 * own.diagonal().mean() * torch.eye(len(own), dtype=m.dtype)
        change = m[part][:, rest] @ torch.linalg.solve(own + ridge, -torch.ones(len(own), dtype=m.dtype))
        slope = float(change.mean())
        won += slope**2 / (2 * float(change.square().mean())) / 4 if slope < 0 else 0.0
    return won


SCORES: dict[str, Callable[[Signals], float]] = {
    "static, |E g|²": static,
    "covariance, |Cov(g, s)|²": covariance,
    "nuclear norm of Cov(g, s)": nuclear,
    "E |g|²": gradient_norm,
    "held-out gain of a quadratic model": held_out,
}


def _pairs(values: Tensor) -> Tensor:
    """Inner products of all pairs of different images, ``(n, n)``, with zeros on the diagonal."""
    return (values @ values.T).fill_diagonal_(0)


def _standardised(values: Tensor) -> Tensor:
    centred = values - values.mean(0)
    return centred / centred.std(0).clamp_min(1e-12)


def _arc_cosine(values: Tensor) -> Tensor:
    """The kernel of infinitely many ReLU units with normal weights (Cho and Saul, 2009)."""
    products = values @ values.T
    sizes = products.diagonal().sqrt().clamp_min(1e-12)
    cosine = (products / sizes[:, None] / sizes).clamp(-1, 1)
    angle = torch.arccos(cosine)
    return sizes[:, None] * sizes * (torch.sin(angle) + (torch.pi - angle) * cosine)
