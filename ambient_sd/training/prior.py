"""Prior preservation: images of the subject's class, trained beside the training images so that the class stays what the base knows.

    loss = loss of the training images + prior_loss_weight * loss of the class images          as many of each in a pass

Ruiz et al., "DreamBooth" (CVPR 2023), as in diffusers' `train_dreambooth.py`; kohya's regularisation images are the same idea with images
and captions of their own. Which loss class images get depends on whose they are:

    generated   by the base, under the guard, before training: the plain loss. They are what the base gives anyone who asks, so there is
                nothing to keep from a reader of the weights; and above s_n the ambient loss would teach a noisy copy in place of the
                base's own prediction, which is what they are there to preserve.
    real        put into class_data_dir by hand, or a dataset's regularisation images: somebody's images, hence the loss of the training
                images; under ambient each keeps one noise and one view, and near-duplicates share one, across both sets.

A second line of samples runs beside the first: sample p has its class image, timestep and noise by (seed, p), whichever process takes it.
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ambient_sd.data.duplicates import Group, noise_fingerprint
from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.families.base import Base
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.sampling import Request, SamplingConfig, generate
from ambient_sd.sampling_options import MOST_IMAGES
from ambient_sd.training import validation
from ambient_sd.training.config import TrainConfig
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.output_folder import OutputFolder
from ambient_sd.utils.weight_files import network_files

KIND = "class images"
SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Prior:
    """Hold the class images of a run.

    Attributes:
        images: checked.
        real: they are somebody's images, not the base's.

    Example:
        >>> images = ImageDataset([b""], ["a dog"], ["a.png"], "class-images").known(["key"], [(8, 8)], [])
        >>> Prior(images, real=False).identity(weight=1.0)["weight"]
        1.0
    """

    images: ImageDataset
    real: bool

    def describe(self, weight: float) -> str:
        """Return how many there are, whose they are, and what they weigh."""
        return f"{len(self.images)} {'real' if self.real else 'generated'} images, weight {weight:g}"

    def identity(self, weight: float) -> dict[str, Any]:
        """Return what must be equal for a checkpoint to continue a run with these images."""
        return {
            "images": self.images.fingerprint(), "real": self.real, "weight": weight,
            "noise_keys": noise_fingerprint(self.images.noise_keys, self.images.mirrored),
        }  # fmt: skip


def find(config: TrainConfig, base: Base, images: ImageDataset) -> Prior | None:
    """Return the class images that are somebody's, unchecked; None where the base generates them or none are asked for.

    Raises:
        UserError: the folder holds class images of other settings, or too few images of somebody's; or a setting has no effect.

    Example:
        >>> from ambient_sd.assets import BASE
        >>> from ambient_sd.families.base import check_base
        >>> images = ImageDataset([b""], ["a dog"], ["a.png"], "my-images")
        >>> find(TrainConfig(str(BASE), train_data_dir="my-images"), check_base(str(BASE)), images) is None
        True
    """
    given = images.regularisation  # a dataset's own, with captions of their own
    if not config.with_prior_preservation and given is not None:
        return Prior(given, real=True)
    if given is not None:
        raise UserError(f"with_prior_preservation is given, and {images.source} has {len(given)} regularisation images",
                        rule="both are class images", remedy="leave one of them out")  # fmt: skip
    if not config.with_prior_preservation:
        if config.prior_loss_weight != 1.0:
            raise UserError(f"prior_loss_weight is {config.prior_loss_weight:g}", rule="there are no class images",
                            remedy="give --with_prior_preservation, or leave it out")  # fmt: skip
        return None
    path = Path(str(config.class_data_dir))
    if config.train_data_dir is not None and path.resolve() == Path(config.train_data_dir).resolve():
        raise UserError(f"class_data_dir is {path}", rule="that is train_data_dir too", remedy="name another folder")
    folder = OutputFolder(path, KIND, ())
    if folder.claimed or not path.is_dir() or not any(path.iterdir()):
        folder.check(_made_with(config, base))
        return None
    found = load_rows(path, need_captions=False, local=True, unlisted=config.unlisted)
    wanted = config.num_class_images or len(found)
    if len(found) < wanted:
        raise UserError(f"class_data_dir is {path} with {len(found)} images that were not generated here", rule=f"num_class_images is {wanted}",
                        remedy=f"give --num_class_images {len(found)}, or an empty folder, which the base fills")  # fmt: skip
    chosen = found.subset(range(wanted))
    chosen.captions = [str(config.class_prompt)] * wanted
    return Prior(chosen, real=True)


def check_together(
    images: ImageDataset, others: ImageDataset, *, near_duplicates: bool, progress: bool = False
) -> None:
    """Check two sets of images as one, so that near-duplicates across them share one noise.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).save(folder / "a.png")
        >>> one, two = (load_rows(folder, need_captions=False) for _ in range(2))
        >>> check_together(one, two, near_duplicates=True)
        >>> one.noise_keys == two.noise_keys
        True
    """
    parts = (images, others)
    both = ImageDataset(
        [part._images[i] for part in parts for i in range(len(part))], [*images.captions, *others.captions],
        [*images.names, *others.names], images.source,
    ).check(progress, near_duplicates=near_duplicates)  # fmt: skip
    start = 0
    for part in parts:
        inside, groups = range(start, start + len(part)), []
        for group in both.groups:
            rows = [(row - start, turn) for row, turn in zip(group.rows, group.mirrored, strict=True) if row in inside]
            if rows:  # a single one has the noise of its group in the other set
                groups.append(Group(tuple(row for row, _ in rows), tuple(turn for _, turn in rows), group.key))
        part.known(both.keys[start : inside.stop], both.sizes[start : inside.stop], groups)
        part.animated = [name for name in part.names if name in both.animated]
        start = inside.stop


def make(config: TrainConfig, base: Base, accelerator: Accelerator, *, progress: bool = False) -> Prior:
    """Generate the class images that class_data_dir lacks, each process its share, and return num_class_images of them, checked.

    Image i has its seed by (seed, i): an interrupted run makes what is missing, and a larger number adds to what is there.

    Raises:
        UserError: the folder cannot be written, not all processes see it, or an image in it is damaged.

    Example:
        >>> import tempfile
        >>> from accelerate import PartialState
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.families.base import check_base
        >>> tiny_pipeline().save_pretrained(folder := tempfile.mkdtemp())
        >>> config = TrainConfig(folder, train_data_dir="my-images", resolution=32, with_prior_preservation=True, class_prompt="a dog",
        ...                      num_class_images=1, class_data_dir=tempfile.mkdtemp())
        >>> made = make(config, check_base(folder), PartialState())
        >>> made.images.captions, made.images.names, made.real
        (['a dog'], ['00000.png'], False)
    """
    path, count = Path(str(config.class_data_dir)), config.num_class_images or 1
    names = [f"{i:05d}.png" for i in range(count)]
    if accelerator.is_main_process:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"class_data_dir is {path}", rule=str(error.strerror), remedy="name a folder that can be written to"
            ) from None
        OutputFolder(path, KIND, ()).claim(_made_with(config, base))
    accelerator.wait_for_everyone()
    missing = [i for i, name in enumerate(names) if not (path / name).is_file()]
    accelerator.wait_for_everyone()  # all have looked before one writes
    if missing:
        _generate(config, base, accelerator, path, missing, progress=progress)
    accelerator.wait_for_everyone()
    if gone := [name for name in names if not (path / name).is_file()]:
        raise UserError(f"{path / gone[0]} is not there", rule="every process needs the class images",
                        remedy="name a folder that all processes see")  # fmt: skip
    images = ImageDataset([path / name for name in names], [str(config.class_prompt)] * count, names, str(path))
    return Prior(images.check(progress), real=False)


def _generate(
    config: TrainConfig, base: Base, accelerator: Accelerator, path: Path, missing: list[int], *, progress: bool
) -> None:
    # With the base's own scheduler: the run's may predict something else.
    pipe = base.load_pipeline().to(accelerator.device)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # what it blanks would be trained
    requests = [Request(str(config.class_prompt), *divmod(i, MOST_IMAGES)) for i in missing]
    settings = dataclasses.replace(_sampling(config, base), batch_size=validation.images_at_once(config.resolution))
    bar = {"desc": "generating class images", "disable": not progress}
    for batch in generate(pipe, requests, settings, guard=MemorizationGuard(pipe), state=accelerator, bar=bar):
        for one in batch if accelerator.is_main_process else ():
            place = one.request.prompt_index * MOST_IMAGES + one.request.image_index
            assert one.image is not None and one.report is not None
            with (path / SCORES).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"image": place, "score": one.report.score}) + "\n")
            png = io.BytesIO()
            one.image.save(png, format="PNG")
            atomic_write(path / f"{place:05d}.png", png.getvalue())
    del pipe
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sampling(config: TrainConfig, base: Base) -> SamplingConfig:
    return SamplingConfig(
        "the base", num_inference_steps=validation.INFERENCE_STEPS, guidance_scale=base.family.usual_scale,
        resolution=config.resolution, seed=config.seed,
    )  # fmt: skip


def _made_with(config: TrainConfig, base: Base) -> dict[str, Any]:
    """Return all that generated class images depend on, and nothing that names a place."""
    settings = _sampling(config, base)
    # Of a hub id the revision: whether its files have a digest hangs on whether they are downloaded yet.
    local = Path(base.name).exists()
    return {
        "class_prompt": config.class_prompt, "base": base.label, "revision": base.revision, "vae": base.vae_label,
        "weights": network_files(base.name, variant=base.variant) if local else {}, "resolution": config.resolution, "seed": config.seed,
        "num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale,
    }  # fmt: skip
