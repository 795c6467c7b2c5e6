"""`ambient-sd sample`: images under the memorization guard, each with its score in the file, a list, a sheet and a page.

    OUT/images/00000-00.png   image 0 of prompt 0; its PNG text `ambient_sd` holds prompt, seed, settings, score as JSON
    OUT/samples.jsonl         the same records, one line an image
    OUT/contact_sheet.png     the images with their scores
    OUT/index.html            the same with the prompts; one file, no script, nothing from elsewhere
    OUT/settings.json         what the images depend on: a run that was cut goes on, one with other settings is refused

Names of files hold numbers only, whatever the prompts hold. An image's file appears whole or not at all.

Without guidance (a scale of 1 or less, or a model that is distilled to need none) the guard has nothing to measure: the images
are drawn all the same, and what it would have said is null.

Images that are flagged are sampled once more, from the same noise and without the policy, to see which words pull
(`guard.attribution`): a record holds it as data, the page as coloured words.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, PngImagePlugin

from ambient_sd import __version__
from ambient_sd.families import distilled
from ambient_sd.guard.attribution import TokenGradients
from ambient_sd.guard.base_above import acting_base
from ambient_sd.guard.calibration import Calibration, ModelFingerprint
from ambient_sd.guard.pipeline import threshold_file
from ambient_sd.guard.policies.by_name import make
from ambient_sd.guard.recorder import ImageReport, MemorizationGuard
from ambient_sd.guard.scores import Space
from ambient_sd.reporting.report import contact_sheet, escaped
from ambient_sd.sampling import Drawn, SamplingConfig, check_prompts, digest, draw, load, read_prompts, say_cut
from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.files import atomic_write
from ambient_sd.utils.hub_ids import resolve_model_id
from ambient_sd.utils.json_schema import load_json

TEXT_KEY = "ambient_sd"
_SHOWN = 600  # images on sheet and page
_THUMBNAIL = 256
_STRONGEST = 3  # words whose scores stand on the page as numbers
_LARGEST = 16 * 2**20  # bytes of settings.json
_FILES = {"images", "samples.jsonl", "contact_sheet.png", "index.html", "settings.json"}


@dataclass(frozen=True)
class SampleSettings:
    """Say what is sampled.

    Attributes:
        drawing: model, sampler, seed.
        out: folder for the images.
        prompts: texts.
        num_images_per_prompt: images of each.
        policy: NAME[:key=value,...] of a mitigation; None: watch only.
        when: the policy acts on every image, or on those that reach the threshold at the first step.
        threshold: a number above 0, or "auto": the model's calibrated one where it has one that fits. Under a policy the first step
            decides, before the policy acts: a number then flags only with `when` flagged, as one of the first step.
        attribution: whose words are looked at: of flagged images (with `when` those that the policy acted on, too), of
            all, or of none. It changes no image and may differ from run to run in one folder.
        score_space: as `MemorizationGuard` takes it; None: that of a calibrated threshold, else "noise".
    """

    drawing: SamplingConfig
    out: Path
    prompts: list[str] = field(repr=False)
    num_images_per_prompt: int = 1
    policy: str | None = None
    when: Literal["always", "flagged"] = "always"
    threshold: float | Literal["auto"] = "auto"
    attribution: Literal["flagged", "all", "none"] = "flagged"
    score_space: Space | None = None


def sample(settings: SampleSettings) -> list[dict[str, Any]]:
    """Draw what is missing in `settings.out`, write list, sheet and page, and return the records of all images.

    Raises:
        UserError: settings are out of range, `out` holds something else, or a policy, a threshold or an attribution is asked
            for where the guard cannot measure.
    """
    from tqdm.auto import tqdm

    drawing, out = settings.drawing, settings.out
    drawing.check()
    check_prompts(settings.prompts)
    if settings.num_images_per_prompt < 1 or not settings.prompts:
        raise UserError(f"{settings.num_images_per_prompt} images of {len(settings.prompts)} prompts",
                        rule="at least one of each is needed")  # fmt: skip
    if settings.attribution not in ("flagged", "all", "none"):
        raise UserError(f"attribution is {settings.attribution!r}", rule="it must be flagged, all or none")
    if settings.when == "flagged" and settings.policy is None:
        raise UserError("when is flagged without a policy", rule="it says on which images a policy acts")
    policy = None if settings.policy is None else make(settings.policy)
    if drawing.guidance_scale <= 1:
        _need_no_guard(settings, f"guidance_scale is {drawing.guidance_scale:g}", "give a scale above 1")
    calibration = _calibration(settings)
    given = {
        **drawing.public(), "prompts": digest(settings.prompts), "num_images_per_prompt": settings.num_images_per_prompt,
        "policy": settings.policy, "when": settings.when, "threshold": settings.threshold,
        **({} if settings.score_space is None else {"score_space": settings.score_space}),
    }  # fmt: skip
    _open(out, given)

    pipe = load(drawing)
    cuts = say_cut(pipe, settings.prompts)
    if (why := distilled(pipe)) is not None:
        _need_no_guard(settings, why, "leave it out")
    watched = drawing.guidance_scale > 1 and why is None
    if not watched:
        print("ambient-sd: images without scores: the guard measures guidance, and there is none", flush=True)
        calibration = None
    if calibration is not None:
        why = calibration.misfit(pipe, drawing.sampling(pipe))
        if why is not None:
            print(f"ambient-sd: the calibrated threshold is not used: {one_line(why, 300)}", flush=True)
            calibration = None
    if calibration is not None:
        try:
            calibration.threshold(drawing.num_inference_steps if policy is None else 1, 1)
        except UserError as error:
            print(f"ambient-sd: the calibrated threshold is not used: {one_line(error, 300)}", flush=True)
            calibration = None
    threshold: Any = calibration if settings.threshold == "auto" else settings.threshold
    if settings.when == "flagged" and threshold is None:
        raise UserError("when is flagged, and there is no threshold", rule="it is what flags an image",
                        remedy="give --threshold X, or calibrate: ambient-sd calibrate --help")  # fmt: skip
    options: dict[str, Any] = {} if settings.when == "always" else {"when": settings.when}
    options |= {} if settings.score_space is None else {"score_space": settings.score_space}
    guard = MemorizationGuard(pipe, policy, threshold, **options) if watched else None
    weights = {"weights": _weights(pipe.unet)}
    if (base := acting_base(pipe.unet)) is not None:
        weights["base_weights"] = _weights(base)
    used = {
        **weights, "sampler": type(pipe.scheduler).__name__,
        "threshold": threshold if isinstance(threshold, (float, int, type(None))) else dataclasses.asdict(threshold)["entries"],
        **({} if guard is None or guard.score_space == "noise" else {"quantity": guard.score_space}),
    }  # fmt: skip
    _settle(out, given, used)

    places = [(p, k) for p in range(len(settings.prompts)) for k in range(settings.num_images_per_prompt)]
    records = {place: record for place in places if (record := _finished(out, place)) is not None}
    common = {
        **drawing.public(), "sampler": used["sampler"], **weights, "policy": settings.policy, "when": settings.when,
        "ambient_sd": __version__,
    }  # fmt: skip
    listing = out / "samples.jsonl"
    _write_list(listing, [records[place] for place in places if place in records])
    missing = [place for place in places if place not in records]
    with (
        guard or contextlib.nullcontext(),
        tqdm(total=len(places), initial=len(records), desc="sample", unit="image") as bar,
    ):
        for first in range(0, len(missing), drawing.batch_size):
            chunk = missing[first : first + drawing.batch_size]
            drawn = draw(pipe, guard, drawing, [settings.prompts[p] for p, _ in chunk], chunk)
            with listing.open("a", encoding="utf-8") as lines:
                for place, one in zip(chunk, drawn, strict=True):
                    prompt = settings.prompts[place[0]]
                    lost = cuts[prompt].lost if prompt in cuts else None
                    records[place] = _keep(
                        out, place, one, prompt, common | {"truncated": lost is not None, "lost_text": lost}
                    )
                    lines.write(_line(records[place]))
            bar.update(len(chunk))
    _write_list(listing, [records[place] for place in places])  # an image drawn again stands in its place now
    if _explain(pipe, out, settings, records):
        _write_list(listing, [records[place] for place in places])
    ordered = [records[place] for place in places]
    _show(out, ordered, settings)
    return ordered


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


def _explain(pipe: Any, out: Path, settings: SampleSettings, records: dict[tuple[int, int], dict[str, Any]]) -> bool:
    """Find which words pull, of the images that are to be explained and are not yet; say whether there was one."""
    from tqdm.auto import tqdm

    drawing = settings.drawing
    wanted = [
        place
        for place, record in records.items()
        if record.get("attribution") is None
        and (
            settings.attribution == "all"
            or (
                settings.attribution == "flagged"
                and (record["flagged"] or (settings.when == "flagged" and record["active"]))
            )
        )
    ]
    if not wanted:
        return False
    watch = TokenGradients()
    with MemorizationGuard(pipe, watch) as guard, tqdm(total=len(wanted), desc="explain", unit="image") as bar:
        for first in range(0, len(wanted), drawing.batch_size):
            chunk = wanted[first : first + drawing.batch_size]
            prompts = [settings.prompts[p] for p, _ in chunk]
            try:
                draw(pipe, guard, drawing, prompts, chunk, decode=False)
                found = [watch.result(prompt, pipe.tokenizer, [i]) for i, prompt in enumerate(prompts)]
            except (UserError, torch.OutOfMemoryError) as error:
                raise UserError(f"which words pull cannot be found: {one_line(error, 240)}",
                                rule="the images are drawn", remedy="give --attribution none") from None  # fmt: skip
            for place, one in zip(chunk, found, strict=True):
                seen = dataclasses.asdict(one)
                records[place] |= {"attribution": {k: v for k, v in seen.items() if k not in ("prompt", "images")}}
                with Image.open(out / _file(place)) as image:
                    image.load()
                    _write_image(out / _file(place), records[place], image)
            bar.update(len(chunk))
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
        if not (math.isfinite(settings.threshold) and settings.threshold > 0):
            raise UserError(f"threshold is {settings.threshold}", rule="it must be a finite number above 0, or auto")
        return None
    drawing = settings.drawing
    path = threshold_file(resolve_model_id(drawing.model) if drawing.adapter is None else drawing.adapter, {})
    return None if path is None else Calibration.load(path)


def _weights(unet: Any) -> str | None:
    found = ModelFingerprint.of(unet)
    return found.weights or found.structure


# --- the folder ------------------------------------------------------------------------------------------------------


def _open(out: Path, given: dict[str, Any]) -> None:
    """Refuse a folder that is not ours, or was begun with other settings, before anything is loaded."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {out}", rule="it must be a folder")
    path = out / "settings.json"
    if not path.is_file():
        foreign = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
        if foreign:
            raise UserError(f"{out} holds {foreign[0]!r} and no settings.json", rule="images go into a folder of their own",
                            remedy="name another with --out")  # fmt: skip
        return
    try:
        kept = load_json(path, _LARGEST)
        before = kept["given"]
        if not isinstance(kept.get("used", {}), dict):
            raise TypeError
        other = next((name for name in {**before, **given} if before.get(name) != given.get(name)), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} cannot be read", remedy="name another folder with --out") from None
    if other is not None:
        raise _differs(out, other, before.get(other), given.get(other))


def _differs(out: Path, name: str, before: object, now: object) -> UserError:
    shown = {
        "prompts": "the prompts",
        "lora": "the adapter's contents",
        "weights": "the model's weights",
        "base_weights": "the base's weights",
    }.get(name)
    what = f"{shown} are others" if shown else f"{name} was {one_line(before, 60)} and is {one_line(now, 60)}"
    return UserError(f"{out} was begun with other settings: {what}", rule="a folder holds one run",
                     remedy="name another with --out, or sample as before")  # fmt: skip


def _settle(out: Path, given: dict[str, Any], used: dict[str, Any]) -> None:
    """Write the settings of a new run; of one that goes on, check what only the loaded model tells."""
    path = out / "settings.json"
    if path.is_file():
        before = load_json(path, _LARGEST).get("used", {})
        for name, now in used.items():
            if before.get(name) != json.loads(json.dumps(now)):
                raise _differs(out, name, before.get(name), now)
        return
    (out / "images").mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"given": given, "used": used}, indent=1) + "\n")


def _file(place: tuple[int, int]) -> str:
    return f"images/{place[0]:05d}-{place[1]:02d}.png"


def _finished(out: Path, place: tuple[int, int]) -> dict[str, Any] | None:
    """Return the record of an image that is there and whole."""
    try:
        record = read_record(out / _file(place))
    except UserError:
        return None
    # Images of versions that flagged by mitigated scores are drawn again.
    whole = (record.get("prompt_index"), record.get("image_index")) == place and "undecided" in record
    return record if whole else None


def _keep(out: Path, place: tuple[int, int], drawn: Drawn, prompt: str, common: dict[str, Any]) -> dict[str, Any]:
    """Write an image with its record and return the record."""
    assert drawn.image is not None
    names = [f.name for f in dataclasses.fields(ImageReport) if f.name not in ("prompt", "prompt_index")]
    seen = {name: getattr(drawn.report, name, None) for name in names}  # of no report: null
    record = {
        "file": _file(place), "prompt": prompt, "prompt_index": place[0], "image_index": place[1], **common,
        **_plain(seen), "guidance_scale": common["guidance_scale"], "width": drawn.image.width, "height": drawn.image.height, "nsfw": drawn.nsfw, "attribution": None,
    }  # fmt: skip
    _write_image(out / _file(place), record, drawn.image)
    return record


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


def _write_list(path: Path, records: Sequence[dict[str, Any]]) -> None:
    atomic_write(path, "".join(map(_line, records)))


# --- to look at ------------------------------------------------------------------------------------------------------

_STYLE = """
:root{--bg:#faf9f6;--card:#fff;--ink:#1b1c20;--soft:#5d626d;--line:#e2dfd7;--flag:#a31621}
@media (prefers-color-scheme:dark){:root{--bg:#121316;--card:#1b1d22;--ink:#ecebe7;--soft:#a0a5b0;--line:#2e3138;--flag:#ff9d9d}}
body{margin:0 auto;max-width:1180px;padding:32px 24px;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;font-weight:650;margin:0 0 .3em}
h2{font-size:1rem;font-weight:600;margin:1.8em 0 .5em;overflow-wrap:anywhere}
p,small{color:var(--soft);margin:0}
.row{display:flex;flex-wrap:wrap;gap:12px;align-items:flex-start}p+.row{margin-top:20px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px;width:min-content}
figcaption p{color:var(--ink);overflow-wrap:anywhere}
img{display:block;max-width:80vw;height:auto;min-width:128px;background:#fff}
figcaption{font-size:.86rem;margin-top:6px;font-variant-numeric:tabular-nums}
figcaption small{display:block}
.flagged{border-color:var(--flag)}.flagged b{color:var(--flag)}
.words{color:var(--ink);line-height:1.8;margin:.4em 0;overflow-wrap:anywhere;min-width:14em}
.words span{padding:1px 3px 3px;border-radius:3px;background:linear-gradient(var(--flag),var(--flag)) 0 100%/calc(var(--w)*100%) 3px no-repeat,
color-mix(in srgb,var(--flag) calc(var(--w)*35%),transparent)}
"""


def _show(out: Path, records: Sequence[dict[str, Any]], settings: SampleSettings) -> None:
    """Write contact sheet and page, of the first images where there are very many."""
    shown = records[:_SHOWN]
    small = []
    for record in shown:
        with Image.open(out / record["file"]) as image:
            copy = image.convert("RGB")
        copy.thumbnail((_THUMBNAIL, _THUMBNAIL))
        small.append(copy)
    per_prompt = settings.num_images_per_prompt
    columns = per_prompt if 4 <= per_prompt <= 10 else max(1, 8 // per_prompt) * per_prompt if per_prompt < 4 else 8
    sheet = io.BytesIO()
    contact_sheet(small, columns, [_caption(r) for r in shown]).save(sheet, "PNG")
    atomic_write(out / "contact_sheet.png", sheet.getvalue())
    atomic_write(out / "index.html", _page(shown, small, settings, len(records)))


def _caption(record: dict[str, Any]) -> str:
    if record["score"] is None:
        return "" if record["curve"] is None else "no finite score"
    return f"{record['score']:.4g}" + (" flagged" if record["flagged"] else "")


def _page(records: Sequence[dict[str, Any]], small: Sequence[Image.Image], settings: SampleSettings, total: int) -> str:
    first = records[0]
    facts = [
        f"Model {first['model']}" + (f" with {first['adapter']}" if first["adapter"] else ""),
        *(
            [f"Above noise level {first['base_above']:g} the base, {first['base'] or 'without the adapter'}"]
            if "base_above" in first
            else []
        ),
        f"{first['sampler']}, {first['num_inference_steps']} steps, guidance {first['guidance_scale']:g}, seed {first['seed']}",
        f"Policy {first['policy']}" + (", on flagged images only" if first["when"] == "flagged" else "")
        if first["policy"]
        else "No policy",
        _flags(records),
        *([f"The first {len(records)} of {total} images"] if total > len(records) else []),
        *(
            [
                "Coloured words: how far the score hangs on each, against the strongest word of the image; the slope of the "
                "unmitigated prompt's score, no trial"
            ]
            if any(r.get("attribution") for r in records)
            else []
        ),
    ]
    # One image a prompt: one row of images, each with its prompt. Several: a row for each prompt.
    single = settings.num_images_per_prompt == 1
    parts = ['<div class="row">'] if single else []
    for i, (record, image) in enumerate(zip(records, small, strict=True)):
        prompt = escaped(record["prompt"], 120 if single else 400) or "(empty prompt)"
        if not single and record["image_index"] == 0:
            parts.append(f'{"</div>" if i else ""}<h2>{prompt}</h2><div class="row">')
        notes = [Path(record["file"]).name]
        if record["mitigated"]:
            notes.append("changed by the policy")
        if record["first_score_before"] is not None and record["first_score_after"] is not None:
            notes.append(f"first step {record['first_score_before']:.3g} to {record['first_score_after']:.3g}")
        if record["policy"] and record["decision_score"] is not None:
            notes.append(f"flagged by the unmitigated first step: {record['decision_score']:.4g}" if record["flagged"]
                         else f"unmitigated first step {record['decision_score']:.4g}")  # fmt: skip
        if record["undecided"]:
            notes.append(f"flagged or not: not known: {one_line(record['undecided'], 160)}")
        if record.get("truncated"):
            notes.append("the end of the prompt was not read")
        if record["nsfw"]:
            notes.append("blanked by the model's safety checker")
        parts.append(
            f'<figure{" class=flagged" if record["flagged"] else ""}><img src="{_uri(image)}" '
            f'alt="{escaped(record["prompt"], 120)}" width="{image.width}" height="{image.height}">'
            f"<figcaption><b>{escaped(_caption(record))}</b>{f'<p>{prompt}</p>' if single else ''}"
            f"{_pull(record.get('attribution'))}"
            f"{''.join(f'<small>{escaped(note)}</small>' for note in notes)}</figcaption></figure>"
        )
    scored = any(record["curve"] is not None for record in records)
    heading = f"{total} images" + (" under the guard" if scored else "")
    said = (
        "Below each image its score: the mean norm of what the prompt adds to the predicted noise. It compares within this model, "
        "size and number of steps."
        if scored
        else "No scores: the guard measures guidance, and these images are drawn without."
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{heading}</title><style>{_STYLE}</style><h1>{heading}</h1>"
        f"{''.join(f'<p>{escaped(fact)}.</p>' for fact in facts)}"
        f"<p>{said}</p>{''.join(parts)}</div></html>\n"
    )


def _flags(records: Sequence[dict[str, Any]]) -> str:
    """Say from which score of what images are flagged."""
    compared = next((record for record in records if record["threshold"] is not None), None)
    if compared is None:
        why = next((record["undecided"] for record in records if record["undecided"]), None)
        return "No threshold: nothing is flagged" if why is None else f"Flagged or not: not known: {why}"
    of = "an unmitigated first step" if compared["policy"] else "a score"
    return f"Flagged from {of} of {compared['threshold']:.4g} on ({compared['threshold_origin']})"


def _pull(found: dict[str, Any] | None) -> str:
    """Return the words of an image's prompt in its order, each with a colour and a bar for its score."""
    if not found:
        return ""
    words = list(zip(found["words"], found["word_scores"], strict=True))
    longest = max((score for _, score in words), default=0.0)
    shown = " ".join(
        f'<span style="--w:{score / longest if longest else 0:.2f}">{escaped(word, 40) or "&#9633;"}</span>'
        for word, score in words
    )
    strongest = sorted(words, key=lambda pair: -pair[1])[:_STRONGEST]
    numbers = [f"{one_line(word, 24) or '□'} {score:.3g}" for word, score in strongest]
    if found["padding_score"] is not None:
        numbers.append(f"padding {found['padding_score']:.3g}")
    return f'<p class="words">{shown or "(no words)"}</p><small>pull: {escaped(", ".join(numbers))}</small>'


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def prompts_of(texts: Sequence[str] | None, path: str | None) -> list[str]:
    """Return the prompts given as texts or as a file, of which there must be one and not both."""
    if bool(texts) == bool(path):
        raise UserError("prompts are given " + ("twice" if texts else "nowhere"), rule="either as texts or as a file",
                        remedy="give --prompt TEXT ... or --prompts FILE")  # fmt: skip
    return list(texts) if texts else read_prompts(str(path))
