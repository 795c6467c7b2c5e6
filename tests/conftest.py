from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Many tests ask for equal bits and for what holds on CPUs only: on machines with a GPU they run on the CPU too, and so do the processes that
# they start. `AMBIENT_SD_TEST_GPU=1` lets them see it, with deterministic kernels.
ON_GPU = os.environ.get("AMBIENT_SD_TEST_GPU") == "1"
if ON_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


# What is imported here the process that only hands tests out imports too, before any other starts: torch and models come in fixtures.
@pytest.fixture(scope="session", autouse=True)
def torch_on_one_thread() -> None:
    """On networks this small a second thread costs more than it brings, many times more on a busy machine."""
    import torch

    torch.set_num_threads(1)
    if ON_GPU:
        torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session", autouse=True)
def cheap_garbage_collection() -> None:
    """Each training ends in a full collection, which need not walk through all that was imported; others come more rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


# By cost, for `--no-loadscope-reorder`: xdist hands out files in this order, and a long one that begins last leaves the other cores idle.
LONGEST = (
    "test_flow_families", "test_train_on_gpu", "test_audit_command", "test_policies_in_pipelines", "test_train_adapters", "test_adapters_alone",
    "test_guard_runtimes", "test_train_mitigations", "test_train_loop", "test_train_command", "test_keeping", "test_optimizers",
    "test_calibrate_command", "test_guard_pipelines", "test_train_bases", "test_audit_stored", "test_comparison", "test_decision",
    "test_one_definition", "test_train_commands", "test_lora", "test_train_prior", "test_train_flags", "test_train_processes", "test_train_cache",
    "test_train_lycoris", "test_guard_recorder", "test_deep_policies_in_pipelines", "test_train_quantized", "test_peers", "test_train_killed",
    "test_train_probe", "test_train_lora", "test_embedding", "test_train_buckets", "test_footprint", "test_guard_on_gpu", "test_guard_on_flow",
    "test_registration", "test_metrics", "test_damaged_inputs", "test_latent_policies", "test_push_faults", "test_hub_push", "test_audited_card",
    "test_pages", "test_readme", "test_docs", "test_examples", "test_sample_command", "test_alignment", "test_single_file", "test_guard_changes",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def registered_once() -> Iterator[None]:
    """Audits of the same images lay them over each other again; what that gives follows from the images alone, so it is kept."""
    import torch

    from ambient_sd.audit import decision, registration

    kept: dict[Any, Any] = {}

    def content(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.shape, value.contiguous().numpy().tobytes()
        return tuple(map(content, value)) if isinstance(value, list | tuple) else value

    def register(queries: torch.Tensor, training: torch.Tensor, *, poses: Any = None, **given: Any) -> Any:
        key = (
            content(queries),
            content(training),
            tuple((name, content(value)) for name, value in sorted(given.items())),
            registration._STEPS,
        )
        name = hash(key)
        if name not in kept:
            kept[name] = registration.register(queries, training, poses=poses, **given)
        return kept[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decision, "register", register)
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a tiny random SD2-shaped pipeline (v-prediction)."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny-base")
    tiny.tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight small images with metadata.jsonl."""
    import tiny

    return tiny.tiny_folder(tmp_path_factory.mktemp("tiny-images"))


@pytest.fixture(scope="session")
def tiny_audit(tiny_base: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ambient-sd audit` writes about the tiny pipeline: a whole folder of it, with held-out images and a limit."""
    import tiny

    from ambient_sd.cli import main

    root = tmp_path_factory.mktemp("tiny-audit")
    heldout = tiny.image_folder(root / "heldout", [tiny.noise_image(100 + i) for i in range(6)])
    main(["audit", str(tiny_base), str(tiny_images), "--heldout", str(heldout), "--out", str(root / "audit"), "--features", "pixels,edges",
          "--max_prompts", "2", "--samples_per_prompt", "2", "--num_inference_steps", "2", "--attributed_prompts", "1", "--device", "cpu",
          "--fail-over", "0.99"])  # fmt: skip
    return root / "audit"
