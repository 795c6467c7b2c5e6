"""The optimal denoisers of a finite data set, in closed form and float64: what a network of unlimited capacity learns.

    plain     E[x0 | x_t] = sum_i w_i x0_i,   w = softmax_i( -|x_t - alpha_t x0_i|^2 / (2 sigma_t^2) )
    ambient   above s_n: the same over the noisy images y_n_i = x_n_i / alpha_n at the fresh noise c, mapped back by
              E[x0 | x_t] = (E[y_n | x_t] - (1 - a) x_t / alpha_t) / a,   a = 1 - s_n^2 / s_t^2,   c = sigma_t sqrt(a)

Shah et al., "Does Generation Require Memorization?" (ICML 2025), Lemma 4.1. The first is perfect memorization: sampling
with it returns the data. It is a yardstick for tests and reports; it learns nothing and is not meant for large sets.
"""

from __future__ import annotations

import torch

from ambient_sd.utils.errors import UserError

Scalars = torch.Tensor | float


def ideal_denoiser(x_t: torch.Tensor, alpha_t: Scalars, sigma_t: Scalars, data: torch.Tensor) -> torch.Tensor:
    """Return E[x0 | x_t] when x0 is one of the rows of `data`, equally likely.

    Args:
        x_t: (B, ...) noisy inputs.
        alpha_t: signal, a number or (B,); 0 is allowed and gives the mean of the data.
        sigma_t: noise, a number or (B,), above 0.
        data: (M, ...) the data set, shaped like the inputs.

    Returns:
        (B, ...) float64 tensor.

    Raises:
        UserError: shapes disagree, the data set is empty or a sigma_t is not positive.

    Example:
        >>> ideal_denoiser(torch.tensor([[0.2]]), 1.0, 0.1, torch.tensor([[0.0], [1.0]])).round(decimals=3).tolist()
        [[0.0]]
    """
    alpha, sigma = _per_row(alpha_t, x_t), _per_row(sigma_t, x_t)
    if len(data) == 0 or data.shape[1:] != x_t.shape[1:]:
        raise UserError(
            f"data of shape {tuple(data.shape)} for inputs of shape {tuple(x_t.shape)}",
            rule="at least one row, shaped like an input",
        )
    if not bool((sigma > 0).all()):
        raise UserError("sigma_t is not positive", rule="without noise there is nothing to denoise")
    x, points = x_t.double().flatten(1), data.double().flatten(1)
    means = []
    # Row by row: (B, M, features) at once would not fit in memory for real latents. Distances, not the expanded square,
    # whose terms cancel catastrophically at small sigma_t; softmax subtracts the largest logit, so nothing overflows.
    for row, a, s in zip(x, alpha, sigma, strict=True):
        logits = -0.5 * ((row - a * points) / s).square().sum(1)
        means.append(torch.softmax(logits, 0) @ points)
    return torch.stack(means).reshape(x_t.shape)


def ideal_ambient_denoiser(
    x_t: torch.Tensor,
    alpha_t: Scalars,
    sigma_t: Scalars,
    x_n: torch.Tensor,
    *,
    alpha_n: float,
    sigma_n: float,
) -> torch.Tensor:
    """Return the x0-prediction that minimises the ambient loss above s_n on a finite set of noisy images.

    Args:
        x_t: (B, ...) noisy inputs.
        alpha_t: signal, a number or (B,); 0 is allowed.
        sigma_t: noise, a number or (B,).
        x_n: (M, ...) the noisy images `alpha_n x0 + sigma_n eps_n`, one for each image.
        alpha_n: their signal, above 0.
        sigma_n: their noise.

    Returns:
        (B, ...) float64 tensor.

    Raises:
        UserError: as `ideal_denoiser`, or a noise level sigma_t / alpha_t is not above sigma_n / alpha_n.

    Example:
        >>> noisy = torch.tensor([[0.0], [1.0]])
        >>> ideal_ambient_denoiser(torch.tensor([[0.5]]), 1.0, 2.0, noisy, alpha_n=1.0, sigma_n=1.0).tolist()
        [[0.5]]
    """
    alpha, sigma = _per_row(alpha_t, x_t), _per_row(sigma_t, x_t)
    if not (alpha_n > 0 and sigma_n >= 0):
        raise UserError(f"nature has alpha_n {alpha_n}, sigma_n {sigma_n}", rule="alpha_n > 0 and sigma_n >= 0")
    s_n = sigma_n / alpha_n
    # sigma_t - alpha_t s_n rather than s_t - s_n, for alpha_t = 0.
    c_squared = (sigma - alpha * s_n) * (sigma + alpha * s_n)
    if not bool((c_squared > 0).all()):
        raise UserError(f"a noise level is not above s_n = {s_n:.6g}", rule="use ideal_denoiser there")
    y_n = ideal_denoiser(x_t, alpha, c_squared.sqrt(), x_n.double() / alpha_n).flatten(1)
    a = (c_squared / sigma.square())[:, None]
    # (1 - a) / alpha_t = s_n^2 alpha_t / sigma_t^2: no division by alpha_t.
    pull = (s_n**2 * alpha / sigma.square())[:, None]
    return ((y_n - pull * x_t.double().flatten(1)) / a).reshape(x_t.shape)


def _per_row(value: Scalars, x_t: torch.Tensor) -> torch.Tensor:
    """Return a number or (B,) tensor as a (B,) float64 tensor on x_t's device."""
    tensor = torch.as_tensor(value, dtype=torch.float64, device=x_t.device)
    if tensor.ndim > 0 and tensor.shape != x_t.shape[:1]:
        raise UserError(
            f"alpha_t or sigma_t has shape {tuple(tensor.shape)}", rule=f"it must be a number or ({len(x_t)},)"
        )
    return tensor.expand(len(x_t))
