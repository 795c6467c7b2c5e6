"""What the audit computes on a pretended GPU: the CPU's features, the CPU's neighbours to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from pretend_gpu import pretend_gpu

from ambient_sd.audit import neighbours
from ambient_sd.audit.decision import through_vae
from ambient_sd.audit.embedding import EmbeddingStore, main
from ambient_sd.audit.features import embed
from ambient_sd.audit.neighbours import nearest
from ambient_sd.audit.registry import choose


def rows(count: int, seed: int, dim: int = 40) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_neighbours_on_a_gpu_are_the_cpus(distance: neighbours.Distance) -> None:
    queries, reference = rows(30, 0), torch.cat([rows(200, 1), rows(30, 0) + 1e-6, rows(1, 2).expand(150, -1)])
    here = nearest(queries, reference, 3, distance=distance, block=64, query_block=16)
    with pretend_gpu() as gpu:
        there = nearest(queries, reference, 3, distance=distance, block=64, query_block=16, device="cuda")
    assert torch.equal(here.index, there.index) and torch.equal(here.distance, there.distance)
    assert gpu.waits["device to host"] > 0, "negative control: nothing was on the GPU"


def test_large_searches_use_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu() as gpu:
        nearest(rows(3, 0), rows(9, 1))
        assert not gpu.waits, "a small search stays on the CPU"
        monkeypatch.setattr(neighbours, "_LARGE", 0)
        nearest(rows(3, 0), rows(9, 1))
    assert gpu.waits["device to host"] > 0


def test_searches_never_run_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = neighbours._Search._products
    monkeypatch.setattr(
        neighbours._Search, "_products", lambda *a: (seen.append(torch.get_float32_matmul_precision()), real(*a))[1]
    )
    torch.set_float32_matmul_precision("high")
    try:
        nearest(rows(3, 0), rows(9, 1))
        assert torch.get_float32_matmul_precision() == "high", "left as it was"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


def test_networks_of_features_run_on_the_gpu(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten())).save(tmp_path / "sscd.pt")
    names, files = ["efflite0", "sscd"], {"sscd": str(tmp_path / "sscd.pt")}
    images = [tiny.noise_image(seed) for seed in range(3)]
    here = embed(images, choose(names, files))
    with pretend_gpu() as gpu:
        there = embed(images, choose(names, files, "cuda"))
    for name, found in here.items():
        assert torch.allclose(found, there[name], atol=1e-5), name
    assert gpu.waits["device to host"] == 2, "each feature brings its vectors back, once a batch"


def test_renditions_run_where_the_autoencoder_is() -> None:
    image, vae = tiny.noise_image(0), tiny.tiny_pipeline().vae
    (here,) = through_vae(vae, 32)([image])
    with pretend_gpu() as gpu:
        (there,) = through_vae(vae.to("cuda"), 32)([image])
    assert here.tobytes() == there.tobytes()
    assert gpu.waits["device to host"] > 0


def test_embeddings_made_on_a_gpu_are_the_cpus(tiny_images: Path, tmp_path: Path) -> None:
    words = [str(tiny_images), "--max_samples", "3", "--features", "efflite0", "--output_dir"]
    main([*words, str(tmp_path / "cpu")])
    with pretend_gpu() as gpu:
        main([*words, str(tmp_path / "gpu")])
    here, there = (EmbeddingStore.open(tmp_path / name / "EffLite0") for name in ("cpu", "gpu"))
    assert torch.allclose(here.block(0), there.block(0), atol=1e-5)
    assert (here.about.device, there.about.device) == ("cpu", "cuda") and gpu.waits["device to host"] > 0
