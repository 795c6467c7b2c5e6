"""`ambient-sd sample`: images under the memorization guard, each with its score in the file, a list, a sheet and a page.

    OUT/images/00000-00.png   image 0 of prompt 0; its PNG text `ambient_sd` holds prompt, the image's own seed, settings, score as JSON
    OUT/samples.jsonl         the same records, one line an image
    OUT/contact_sheet.png     the images with their prompts and scores
    OUT/index.html            the same with the prompts; one file, no script, nothing from elsewhere
    OUT/settings.json         what the images depend on (`utils.output_folder`): interrupted runs resume, other settings are refused

Names of files hold numbers only, whatever the prompts hold. An image's file appears whole or not at all. Under `accelerate launch` the
processes share the images out, and the main one writes them: the files are those of one process.

Without guidance (a scale of 1 or less, or a model that is distilled to need none) the guard has nothing to measure: the images
are sampled all the same, and what it would have said is null.

Images that are flagged are sampled once more, from the same noise and without the policy, to see which words pull
(`guard.attribution`): a record holds it as data, the page as tinted words.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from ambient_sd import __version__
from ambient_sd.commands.sample import SampleSettings
from ambient_sd.data.captions import Cut
from ambient_sd.families import distilled, network_of
from ambient_sd.guard.attribution import TokenGradients
from ambient_sd.guard.base_above import acting_base
from ambient_sd.guard.by_name import make
from ambient_sd.guard.calibration import Calibration, ModelFingerprint
from ambient_sd.guard.pipeline import threshold_file
from ambient_sd.guard.recorder import ImageReport, MemorizationGuard
from ambient_sd.reporting import sample_page
from ambient_sd.sampling import (
    Request,
    Sampled,
    check_prompts,
    digest,
    from_main,
    generate,
    image_seed,
    in_batches,
    load_pipeline,
    processes,
    requests_for,
    say,
    say_cut,
)
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.hub_ids import resolve_model_id
from ambient_sd.utils.output_folder import FILE, OutputFolder

TEXT_KEY = "ambient_sd"
CONTENTS = ("images", "samples.jsonl", "contact_sheet.png", "index.html", FILE)


def sample(settings: SampleSettings, *, safety_checker: bool = True) -> list[dict[str, Any]]:
    """Sample what is missing in `settings.output_dir`, write list, sheet and page, and return the records of all images.

    Args:
        settings: what to sample, how, and where to.
        safety_checker: keep the model's own, if it has one.

    Raises:
        UserError: settings are out of range, `out` holds something else, or a policy, a threshold or an attribution is asked
            for where the guard cannot measure.
    """
    config, out = settings.sampling, settings.output_dir
    config.check()
    check_prompts(settings.prompts)
    if not settings.prompts:
        raise UserError("there are no prompts", rule="at least one is needed")
    policy = None if settings.policy is None else make(settings.policy)
    if config.scale <= 1:
        _need_no_guard(settings, f"guidance_scale is {config.scale:g}", "give a scale above 1")
    calibration = _calibration(settings)
    folder = OutputFolder(out, "sample", CONTENTS, overwrite=settings.overwrite)
    given = {
        "base_above": None, "base": None, "lora": None, **config.public(), "prompts": digest(settings.prompts), "num_images_per_prompt": settings.num_images_per_prompt,
        "policy": settings.policy, "when": settings.when, "threshold": settings.threshold, "score_space": settings.score_space,
    }  # fmt: skip
    folder.check(given)

    pipe = load_pipeline(config, safety_checker=safety_checker)
    cuts = say_cut(pipe, settings.prompts)
    if (why := distilled(pipe)) is not None:
        _need_no_guard(settings, why, "leave it out")
    watched = config.scale > 1 and why is None
    if not watched:
        say("images without scores: the guard measures guidance, and there is none")
        calibration = None
    if calibration is not None and (why := _unfit(calibration, pipe, settings)) is not None:
        say(f"the calibrated threshold is not used: {one_line(why, 300)}")
        calibration = None
    threshold: Any = calibration if settings.threshold == "auto" else settings.threshold
    if settings.when == "flagged" and threshold is None:
        raise UserError("when is flagged, and there is no threshold", rule="it is what flags an image",
                        remedy="give --threshold X, or calibrate: ambient-sd calibrate --help")  # fmt: skip
    options: dict[str, Any] = {} if settings.when == "always" else {"when": settings.when}
    options |= {} if settings.score_space is None else {"score_space": settings.score_space}
    guard = MemorizationGuard(pipe, policy, threshold, **options) if watched else None
    network = network_of(pipe)
    weights = {"weights": _weights(network)}
    if (base := acting_base(network)) is not None:
        weights["base_weights"] = _weights(base)
    sampler = type(pipe.scheduler).__name__
    used = {
        **weights, "sampler": sampler, "quantity": None if guard is None else guard.score_space,
        "threshold_in_use": dataclasses.asdict(threshold)["entries"] if isinstance(threshold, Calibration) else threshold,
    }  # fmt: skip
    from_main(lambda: folder.claim(given | used))

    requests = requests_for(settings.prompts, settings.num_images_per_prompt)
    records: dict[tuple[int, int], dict[str, Any]] = from_main(lambda: _kept(out, requests))
    common = {
        **config.public(), "sampler": sampler, **weights, "policy": settings.policy, "when": settings.when,
        "ambient_sd": __version__,
    }  # fmt: skip
    listing, writes = out / "samples.jsonl", processes().is_main_process

    def write_list() -> None:
        if writes:
            atomic_write(listing, "".join(_line(records[r.place]) for r in requests if r.place in records))

    write_list()
    missing = [request for request in requests if request.place not in records]
    if not missing:
        say(f"all {len(requests)} images are there; sheet and page are written again")
    bar = {"total": len(requests), "initial": len(records), "desc": "sample"}
    for batch in generate(pipe, missing, config, guard=guard, state=processes(), bar=bar):
        made = [_record(one, config.seed, common, cuts) for one in batch]
        records |= {one.request.place: record for one, record in zip(batch, made, strict=True)}
        if writes:
            for one, record in zip(batch, made, strict=True):
                assert one.image is not None
                _write_image(out / record["file"], record, one.image)
            with listing.open("a", encoding="utf-8") as lines:
                lines.writelines(map(_line, made))
    write_list()  # an image sampled again stands in its place now
    if _explain(pipe, settings, [r for r in requests if _wanted(settings, records[r.place])], records):
        write_list()
    ordered = [records[request.place] for request in requests]
    if writes:
        sample_page.write(out, ordered, settings.num_images_per_prompt)
        folder.finish()
    return ordered


def _unfit(calibration: Calibration, pipe: Any, settings: SampleSettings) -> str | None:
    """Say why a calibrated threshold cannot be used here; None: it can."""
    if (why := calibration.misfit(pipe, settings.sampling.describe(pipe))) is not None:
        return why
    try:
        calibration.threshold(settings.sampling.num_inference_steps if settings.policy is None else 1, 1)
    except UserError as error:
        return str(error)
    return None


def _need_no_guard(settings: SampleSettings, why: str, remedy: str) -> None:
    """Refuse what only the guard can do."""
    asked = {
        "policy": settings.policy is not None, "threshold": settings.threshold != "auto", "attribution": settings.attribution == "all",
        "score_space": settings.score_space is not None,
    }  # fmt: skip
    name = next((name for name, wanted in asked.items() if wanted), None)
    if name is not None:
        raise UserError(f"{name} is {getattr(settings, name)!r}, and there is no guidance: {why}",
                        rule="the guard measures guidance", remedy=remedy)  # fmt: skip


def _wanted(settings: SampleSettings, record: dict[str, Any]) -> bool:
    """Tell whether the words of an image are to be looked at, and have not been."""
    acted = settings.when == "flagged" and record["active"]
    chosen = settings.attribution == "all" or (settings.attribution == "flagged" and (record["flagged"] or acted))
    return bool(chosen) and record.get("attribution") is None


def _explain(
    pipe: Any, settings: SampleSettings, wanted: Sequence[Request], records: dict[tuple[int, int], dict[str, Any]]
) -> bool:
    """Find which words pull, of the wanted images; say whether there was one."""
    if not wanted:
        return False
    watch = TokenGradients()
    guard = MemorizationGuard(pipe, watch)

    def explain(batch: Sequence[Request], options: dict[str, Any]) -> list[tuple[Request, dict[str, Any]]]:
        try:
            guard.decide([request.prompt for request in batch], **options)
            found = [watch.result(request.prompt, pipe.tokenizer, [i]) for i, request in enumerate(batch)]
        except (UserError, torch.OutOfMemoryError) as error:
            raise UserError(f"which words pull cannot be found: {one_line(error, 240)}",
                            rule="the images are sampled", remedy="give --attribution none") from None  # fmt: skip
        return [(request, dataclasses.asdict(one)) for request, one in zip(batch, found, strict=True)]

    state = processes()
    for batch in in_batches(pipe, wanted, settings.sampling, explain, state=state, bar={"desc": "explain"}):
        for request, seen in batch:
            record = records[request.place]
            record["attribution"] = {k: v for k, v in seen.items() if k not in ("prompt", "images")}
            if state.is_main_process:
                with Image.open(settings.output_dir / record["file"]) as image:
                    image.load()
                    _write_image(settings.output_dir / record["file"], record, image)
    return True


def read_record(path: str | Path) -> dict[str, Any]:
    """Return the record in an image that `sample` wrote: prompt, seed, settings, score, curve.

    Raises:
        UserError: it is no such image, or damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
            record = json.loads(image.info[TEXT_KEY])
    except (OSError, ValueError, KeyError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} has no record of ambient-sd sample",
                        rule=one_line(f"{type(error).__name__}: {error}", 200)) from None  # fmt: skip
    return dict(record)


def _calibration(settings: SampleSettings) -> Calibration | None:
    if settings.threshold != "auto":
        return None
    config = settings.sampling
    adapted = config.lora_weights
    path = (
        threshold_file(resolve_model_id(config.model), {"revision": config.revision})
        if adapted is None
        else threshold_file(adapted, {})
    )
    return None if path is None else Calibration.load(path)


def _weights(unet: Any) -> str | None:
    found = ModelFingerprint.of(unet)
    return found.weights or found.structure


# --- the folder ------------------------------------------------------------------------------------------------------


def _file(place: tuple[int, int]) -> str:
    return f"images/{place[0]:05d}-{place[1]:02d}.png"


def _kept(out: Path, requests: Sequence[Request]) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the records of the images that are there and whole."""
    records = {}
    for request in requests:
        with contextlib.suppress(UserError):
            record = read_record(out / _file(request.place))
            if (record.get("prompt_index"), record.get("image_index")) == request.place:
                records[request.place] = record
    return records


def _record(one: Sampled, seed: int, common: dict[str, Any], cuts: Mapping[str, Cut]) -> dict[str, Any]:
    """Return what is written down of an image."""
    assert one.image is not None
    request = one.request
    names = [f.name for f in dataclasses.fields(ImageReport) if f.name not in ("prompt", "prompt_index")]
    seen = {name: getattr(one.report, name, None) for name in names}  # of no report: null
    lost = cuts[request.prompt].lost if request.prompt in cuts else None
    return {
        "file": _file(request.place), "prompt": request.prompt, "prompt_index": request.prompt_index, "image_index": request.image_index,
        **common, "seed": image_seed(seed, *request.place), "run_seed": seed, "truncated": lost is not None, "lost_text": lost,
        **_plain(seen), "guidance_scale": common["guidance_scale"], "width": one.image.width, "height": one.image.height,
        "nsfw": one.nsfw, "attribution": None,
    }  # fmt: skip


def _write_image(path: Path, record: dict[str, Any], image: Image.Image) -> None:
    text = PngImagePlugin.PngInfo()
    # ASCII, so that control characters and line breaks of a prompt are escapes here as in the list.
    text.add_text(TEXT_KEY, json.dumps(record))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    atomic_write(path, buffer.getvalue())


def _plain(value: Any) -> Any:
    """Return what JSON can hold of a value: numbers without end as null, objects by their text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else one_line(value, 200)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
