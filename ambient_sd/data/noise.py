"""The one fixed noise of an image: a function of its key and a seed, the same on every machine and in every version.

Ambient training shows an image only through `x_n = alpha_n x0 + sigma_n eps_n`. m different draws of eps_n average
out to noise sigma_n / sqrt(m) and give the clean image back (Shah et al., ICML 2025, Lemma 4.2), so eps_n must never
depend on order, worker, rank, epoch, batch, device, dtype, or on the versions of the libraries:

    sha256(seed, shape, key) -> Philox-4x64-10 (Salmon et al. 2011; numpy fixes its stream) -> 64-bit words
    u = (word // 2^12 + 1/2) / 2^52 -> eps = Phi^-1(u), algorithm AS 241 (Wichura 1988) -> rounded to float32

Phi^-1 uses + - * / and square roots only, which IEEE 754 defines to the last bit; the logarithm is implemented here,
because those of the C library and of numpy differ between processors. The normal generators of numpy and torch promise
no fixed stream.

It does not decide what a key is (the image's content, or its group of near-duplicates, never its index).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from ambient_sd.utils.errors import UserError

Array = np.ndarray

# Wichura (1988), Applied Statistics 37(3), routine PPND16: numerators and denominators, highest power first.
_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip


def image_noise(
    keys: Sequence[str],
    shape: Sequence[int],
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the fixed standard normal noise eps_n of each image.

    The noise of a key does not depend on the other keys. It is made in float32 on the CPU; another dtype or device
    gets a copy of those values.

    Args:
        keys: one string per image; equal keys get equal noise.
        shape: shape of one image's latent, (C, H, W). Another shape gives unrelated noise, not a crop.
        seed: whole number; another seed gives unrelated noise.
        device: where the result goes; the CPU if not given.
        dtype: floating-point dtype of the result.

    Returns:
        (len(keys), *shape) tensor.

    Raises:
        UserError: keys is one string or holds something else than non-empty strings, or shape or seed is not whole.

    Example:
        >>> noise = image_noise(["a", "b", "a"], (4, 8, 8))
        >>> torch.equal(noise[0], noise[2]), torch.equal(noise[0], noise[1])
        (True, False)
    """
    # A bare string is a sequence of one-letter keys; an index as a key is the leak that keys exist to prevent.
    bad = [keys] if isinstance(keys, str) else [k for k in keys if not (isinstance(k, str) and k)]
    if bad:
        raise UserError(f"{bad[0]!r} cannot be a list of noise keys or one of them", rule="a key is a non-empty string")
    if not all(isinstance(n, int) and n > 0 for n in shape) or not isinstance(seed, int):
        raise UserError(
            f"noise of shape {shape!r}, seed {seed!r}", rule="sizes are whole and positive, the seed is whole"
        )
    size = math.prod(shape)
    noise = np.empty((len(keys), size), dtype=np.float32)
    for row, key in zip(noise, keys, strict=True):
        row[:] = _normal(_words(key, shape, seed, size))
    return torch.from_numpy(noise).reshape(len(keys), *shape).to(device=device, dtype=dtype)


def _words(key: str, shape: Sequence[int], seed: int, count: int) -> Array:
    """Return `count` random 64-bit words that belong to (key, shape, seed)."""
    # The parts in front hold no line break, so no two triples share a text.
    text = f"ambient_sd noise 1\n{seed}\n{','.join(map(str, shape))}\n{key}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    # Philox is keyed with 128 bits. numpy keeps bit generators' raw streams fixed (NEP 19), unlike its distributions.
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def _normal(words: Array) -> Array:
    """Map 64-bit words to standard normal float64 values: `Phi^-1((word // 2^12 + 1/2) / 2^52)`."""
    # 52 bits, so that adding 1/2 is exact and u is never 0 or 1; largest |eps| is 8.2.
    q = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52 - 0.5
    eps = q * _ratio(_CENTRE, 0.180625 - q * q)
    outside = np.flatnonzero(np.abs(q) > 0.425)
    q = q[outside]
    r = np.sqrt(-_log(0.5 - np.abs(q)))
    eps[outside] = np.copysign(np.where(r <= 5.0, _ratio(_TAIL, r - 1.6), _ratio(_FAR_TAIL, r - 5.0)), q)
    return eps


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Array) -> Array:
    """Evaluate a rational function by Horner's rule, one rounding per operation."""
    top, bottom = (np.full_like(x, c[0]) for c in coefficients)
    for p, q in zip(coefficients[0][1:], coefficients[1][1:], strict=True):
        # Two statements, for a fused multiply-add rounds once and would give other bits.
        top *= x
        top += p
        bottom *= x
        bottom += q
    return top / bottom


def _log(x: Array) -> Array:
    """Return the natural logarithm of positive normal x: `2 artanh((m - 1) / (m + 1)) + e ln 2`, x = m 2^e."""
    m, e = np.frexp(x)
    low = m < 0.7071067811865476
    m, e = np.where(low, m + m, m), e - low
    z = (m - 1.0) / (m + 1.0)  # |z| < 0.172: eleven terms reach float64 precision
    square, series = z * z, np.full_like(z, 1.0 / 21.0)
    for odd in range(19, 0, -2):
        series *= square
        series += 1.0 / odd
    return 2.0 * z * series + e * 0.6931471805599453
