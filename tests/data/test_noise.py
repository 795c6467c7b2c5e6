"""The fixed noise: equal wherever and however it is asked for, standard normal, unrelated between keys, unchanging."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy._core import _multiarray_umath as umath
from scipy import special, stats

from ambient_sd.data import noise as noise_module
from ambient_sd.data.noise import image_noise
from ambient_sd.utils.errors import UserError

SHAPE = (4, 16, 16)
KEYS = [f"image {i}" for i in range(200)]


def digest(noise: torch.Tensor) -> str:
    return hashlib.sha256(noise.numpy().astype("<f4").tobytes()).hexdigest()


def test_the_noise_never_changes() -> None:
    # Golden values. A run resumed with other noise shows each image twice and leaks; if this test fails, it is the
    # change that is wrong, not the values.
    noise = image_noise(["a", "ünï-🍎"], (4, 64, 64), seed=7)
    assert noise[0, 0, 0, :4].tolist() == [
        2.233494281768799,
        0.21352781355381012,
        1.1646262407302856,
        -0.3270166516304016,
    ]
    assert digest(noise) == "0a475e3fc7d5a0f2fb6ed355d775279ab4804ea83c99bfe14ef709e872380b87"


def test_a_key_has_one_noise_in_any_order_company_and_call() -> None:
    noise = image_noise(KEYS, SHAPE)
    shuffled = image_noise(KEYS[::-1], SHAPE)
    assert torch.equal(noise, shuffled.flip(0))
    assert torch.equal(noise[17:18], image_noise([KEYS[17]], SHAPE))
    assert torch.equal(*image_noise(["same", "same"], SHAPE))


def test_a_key_has_one_noise_in_any_process_whatever_the_global_seeds_and_threads() -> None:
    program = (
        "import numpy, random, torch, hashlib; torch.set_num_threads(1); torch.manual_seed(5); numpy.random.seed(6)\n"
        "from ambient_sd.data.noise import image_noise\n"
        "print(hashlib.sha256(image_noise(['x', 'y'], (4, 16, 16), seed=3).numpy().tobytes()).hexdigest())"
    )
    state = torch.get_rng_state()
    here = digest(image_noise(["x", "y"], SHAPE, seed=3))
    assert torch.equal(torch.get_rng_state(), state), "the global random state must be left alone"
    # The other process also hashes otherwise and runs without numpy's vectorised kernels, as on an older processor: their log differs.
    vector = " ".join(name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name])
    env = {
        "PYTHONHASHSEED": "0" if os.environ.get("PYTHONHASHSEED") == "1" else "1",
        "NPY_DISABLE_CPU_FEATURES": vector,
    }
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == here


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_dtype_is_a_cast_of_the_same_noise(dtype: torch.dtype) -> None:
    assert torch.equal(image_noise(KEYS[:3], SHAPE, dtype=dtype), image_noise(KEYS[:3], SHAPE).to(dtype))


def test_the_device_holds_a_copy_of_the_same_noise() -> None:
    devices = ["cpu", "meta"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        noise = image_noise(KEYS[:2], SHAPE, device=device)
        assert noise.device.type == device
        if device != "meta":
            assert torch.equal(noise.cpu(), image_noise(KEYS[:2], SHAPE))


def test_key_seed_and_shape_each_give_unrelated_noise() -> None:
    base = image_noise(["k"], (4, 64, 64))
    others = {
        "key": image_noise(["k "], (4, 64, 64)),
        "seed": image_noise(["k"], (4, 64, 64), seed=1),
        "negative seed": image_noise(["k"], (4, 64, 64), seed=-1),
        "shape": image_noise(["k"], (16, 32, 32)),
    }
    for name, other in others.items():
        # 16,384 pairs: the correlation of independent noise has std 0.0078.
        assert abs(correlation(base, other)) < 0.04, name
    assert correlation(base, base) == pytest.approx(1.0)  # control: the measure sees equal noise


def test_all_keys_are_unrelated_to_each_other() -> None:
    noise = image_noise(KEYS, SHAPE).double().flatten(1)
    related = torch.corrcoef(noise) - torch.eye(len(KEYS))
    # 19,900 pairs of 1,024 values: std 1/32, and the largest of so many is about 4.3 std.
    assert related.abs().max() < 6 / 32
    assert related[~torch.eye(len(KEYS), dtype=bool)].std() == pytest.approx(1 / 32, rel=0.05)


def test_the_noise_is_standard_normal() -> None:
    values = image_noise(KEYS, (4, 32, 32)).double().flatten().numpy()  # 819,200 values
    n = len(values)
    assert abs(values.mean()) < 4 / n**0.5
    assert abs(values.std() - 1) < 4 / (2 * n) ** 0.5
    assert abs(stats.skew(values)) < 4 * (6 / n) ** 0.5
    assert abs(stats.kurtosis(values)) < 4 * (24 / n) ** 0.5
    assert stats.kstest(values, "norm").pvalue > 0.001
    assert stats.kstest(values * 1.01, "norm").pvalue < 0.001  # control: a std off by 1 % is seen


def test_neighbouring_pixels_and_channels_are_unrelated() -> None:
    noise = image_noise(KEYS, (4, 32, 32))
    for left, right in (
        (noise[..., 1:], noise[..., :-1]),
        (noise[:, :, 1:], noise[:, :, :-1]),
        (noise[:, 1:], noise[:, :-1]),
    ):
        assert abs(correlation(left, right)) < 5 / left.numel() ** 0.5


def test_the_normal_quantile_and_the_logarithm_are_exact_to_float64() -> None:
    random = np.random.Philox(key=1).random_raw(200_000)
    edges = [0, 1 << 12, (1 << 64) - 1, 1 << 63, (1 << 63) - 1] + [1 << k for k in range(12, 64)]
    words = np.concatenate([random, np.array(edges, dtype=np.uint64), ~np.array(edges, dtype=np.uint64)])
    u = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    # 1 - u is exact; the lower half is the accurate side of the reference.
    expected = np.where(u < 0.5, special.ndtri(np.minimum(u, 0.5)), -special.ndtri(np.minimum(1 - u, 0.5)))
    assert np.allclose(noise_module._normal(words), expected, rtol=2e-15, atol=0)
    x = np.exp(np.linspace(-37, -0.7, 10_001))
    assert np.allclose(noise_module._log(x), np.log(x), rtol=1e-15, atol=0)


def test_empty_and_single_requests_have_the_right_shape() -> None:
    assert image_noise([], SHAPE).shape == (0, *SHAPE)
    assert image_noise(["a"], torch.Size([3])).shape == (1, 3)


@pytest.mark.parametrize(
    ("keys", "shape", "seed"),
    [("abc", SHAPE, 0), ([3], SHAPE, 0), ([""], SHAPE, 0), (["a"], (4, 0), 0), (["a"], (4.0,), 0), (["a"], SHAPE, 0.5)],
    ids=["bare string", "index", "empty key", "size zero", "float size", "float seed"],
)
def test_what_is_no_key_shape_or_seed_is_refused(keys: object, shape: object, seed: object) -> None:
    with pytest.raises(UserError, match=r"a key is a non-empty string|sizes are whole"):
        image_noise(keys, shape, seed=seed)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1])
