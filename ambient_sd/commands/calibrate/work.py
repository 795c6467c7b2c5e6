"""`ambient-sd calibrate`: find the thresholds at which a model's ordinary prompts are flagged no more often than asked.

Ordinary prompts (that the model cannot have memorized) are sampled under the guard; the threshold for the mean over the first k
evaluations (that carry a signal: `guard.scores`) and g images is the lowest that at most `floor(rate * n)` of the n ordinary scores
reach (`audit.detection`). With memorized prompts AUC and TPR at 1 % FPR are measured too; they do not move the threshold, but decide
whether there is one: where the AUC's 95 % interval reaches 0.5 at every number of evaluations, the detector is useless on this model
and nothing is written. Without memorized prompts nobody knows, and the file says so. Images are not decoded.

With the detector anisotropy nothing is sampled: its two terms are asked for from the same start noise, added with the weights
that `guard.anisotropy.fitted` finds on the ordinary prompts, and their thresholds found likewise, for 0 evaluations. So it is with
beside_base, which asks the base's network the same.

Norms go to memorization_scores.jsonl (of other detectors: memorization_scores_DETECTOR.jsonl) beside the result as they come: interrupted runs resume, and another rate costs
no sampling. The threshold is chosen on the very prompts whose rate is reported: the interval says how far a rate scatters, and
prompts of another kind may fare worse.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ambient_sd import __version__
from ambient_sd.audit.detection import detection_figures, threshold_at
from ambient_sd.audit.metrics import bootstrap
from ambient_sd.commands.calibrate import CalibrateSettings
from ambient_sd.families import network_of
from ambient_sd.guard.anisotropy import anisotropy, fitted, low_timestep_of
from ambient_sd.guard.beside_base import base_fingerprint, beside_base
from ambient_sd.guard.calibration import FILE_NAMES, AnisotropyTerms, Calibration, Detector, Entry, ModelFingerprint
from ambient_sd.guard.recorder import MemorizationGuard
from ambient_sd.sampling import (
    Request,
    check_prompts,
    digest,
    from_main,
    generate,
    home,
    in_batches,
    load_pipeline,
    processes,
    read_prompts,
    say_cut,
)
from ambient_sd.utils.errors import UserError, one_line, require_guidance
from ambient_sd.utils.estimate import Estimate, wilson
from ambient_sd.utils.output_folder import difference

SCORES_NAME = "memorization_scores.jsonl"
SCORES_NAMES: dict[Detector, str] = {
    "norm": SCORES_NAME, "anisotropy": "memorization_scores_anisotropy.jsonl", "beside_base": "memorization_scores_beside_base.jsonl",
}  # fmt: skip
EARLY = (1, 5)
_FEW = 10  # prompts of a kind below which Wilson's interval bounds the one by resampling
_TPR_RATE = 0.01  # as published, whatever rate is asked for
Kind = Literal["ordinary", "memorized"]


def calibrate(settings: CalibrateSettings) -> tuple[Calibration, Path | None]:
    """Sample what is not sampled yet, find the thresholds, write them, and return them with the path of the file.

    Where memorized prompts show that no threshold tells them from ordinary ones the path is None: nothing is written, and thresholds of
    an earlier run in its place, which a good run would have overwritten, are removed.

    Raises:
        UserError: settings are out of range, scores of other settings lie where the result goes, a score is no finite number, or
            every score is 0.
    """
    config, detector = settings.sampling, settings.detector
    config.check()
    require_guidance(config.scale)
    check_prompts([*settings.ordinary, *settings.memorized])
    if not settings.ordinary:
        raise UserError("there are no ordinary prompts", rule="at least one is needed")
    out = settings.output_dir or home(config)
    if out is None:
        raise UserError(f"{config.model} lies on the hub", rule="the result cannot be written there",
                        remedy="give a folder with --output_dir")  # fmt: skip
    if out.is_file() and out.suffix != ".json":
        raise UserError(f"output_dir is {out}", rule="it must be a folder or a .json file")
    prompts: dict[Kind, list[str]] = {"ordinary": settings.ordinary, "memorized": settings.memorized}
    given = {
        **config.public(), **({} if settings.score_space == "noise" else {"score_space": settings.score_space}), "num_images_per_prompt": settings.num_images_per_prompt,
        "prompts": {kind: digest(texts) if texts else None for kind, texts in prompts.items()},
    }  # fmt: skip
    path = (out.parent if out.suffix == ".json" else out) / SCORES_NAMES[detector]
    header, curves = from_main(lambda: _read(path, given))

    pipe = load_pipeline(config)
    base = _base(pipe, settings)
    say_cut(pipe, [*settings.ordinary, *settings.memorized])
    model, writes = ModelFingerprint.of(network_of(pipe)), processes().is_main_process
    other = base_fingerprint(pipe, base) if detector == "beside_base" else None
    if header is not None and header.get("model") != asdict(model):
        raise _differs(path, "the model's weights")
    if header is not None and header.get("base") != (None if other is None else asdict(other)):
        raise _differs(path, "the base's weights")
    if header is None and writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(
            path, {"given": given, "model": asdict(model), **({} if other is None else {"base": asdict(other)})}, "w"
        )
    # The memorized prompts are counted on from the ordinary ones: all start from noise of their own.
    places: list[tuple[Kind, int]] = [(kind, i) for kind, texts in prompts.items() for i in range(len(texts))]
    wanted = [
        Request(prompts[kind][i], place, k)
        for place, (kind, i) in enumerate(places)
        if (kind, i) not in curves
        for k in range(settings.num_images_per_prompt)
    ]
    waiting: dict[tuple[Kind, int], list[list[float]]] = {}
    for place, curve in _measured(pipe, wanted, settings, base):
        kind, i = places[place]
        if not all(map(math.isfinite, curve)):
            raise UserError(f"the score of {kind} prompt {i + 1} is no finite number",
                            rule=f"the network overflows in {config.dtype}", remedy="give --dtype float32 or bfloat16")  # fmt: skip
        rows = waiting.setdefault((kind, i), [])
        rows.append(curve)
        if len(rows) == settings.num_images_per_prompt:
            curves[kind, i] = waiting.pop((kind, i))
            if writes:
                _append(path, {"kind": kind, "prompt": i, "curves": curves[kind, i]})
    lengths = {len(curve) for rows in curves.values() for curve in rows}
    if len(lengths) > 1 or not all(math.isfinite(x) for rows in curves.values() for curve in rows for x in curve):
        raise UserError(f"{path} holds curves of other lengths, or numbers that are not finite", rule="they do not mix",
                        remedy="remove it to begin anew")  # fmt: skip
    found = {kind: torch.tensor([curves[kind, i] for i in range(len(texts))]) for kind, texts in prompts.items()}
    evaluations, terms = int(found["ordinary"].shape[2]), None
    if detector == "anisotropy":
        terms = fitted(found["ordinary"], low_timestep_of(pipe.scheduler))
        evaluations = 2  # of the network, for both halves
        found = {kind: _weighted(values, terms) for kind, values in found.items()}
    if detector == "beside_base":
        evaluations = 2  # the same, for both networks
    entries = thresholds(found["ordinary"], found["memorized"], settings.fpr, seed=config.seed)
    for entry in entries:
        if not (math.isfinite(entry.value) and (terms is not None or entry.value > 0)):
            raise UserError(f"the threshold of {entry.steps} evaluations is {entry.value:g}", rule="every ordinary score is 0, and all would be flagged",
                            remedy="give prompts that are not empty, to a model trained with captions dropped")  # fmt: skip
    result = Calibration(
        entries=entries if detector == "norm" else [replace(entry, steps=0) for entry in entries],
        model=model,
        sampling=config.describe(pipe),
        evaluations=evaluations,
        rate_asked=settings.fpr,
        ordinary=len(settings.ordinary),
        memorized=len(settings.memorized),
        prompts={str(kind): value for kind, value in given["prompts"].items()},
        seed=config.seed,
        versions={"ambient_sd": __version__}
        | {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
        anisotropy=terms,
        score_space=settings.score_space,
        lora=config.lora(),
        beside_base=detector == "beside_base",
        base=other,
    )
    if useless(result) is None:
        return result, from_main(lambda: result.save(out))
    if writes:
        (out if out.suffix == ".json" else out / FILE_NAMES[detector]).unlink(missing_ok=True)
    return result, None


def useless(calibration: Calibration) -> str | None:
    """Say why none of the thresholds may be used, or return None if one may (or nobody knows: there were no memorized prompts)."""
    if any(entry.tells is not False for entry in calibration.entries):
        return None
    fewest = min(calibration.ordinary, calibration.memorized)
    if wilson(1.0, fewest)[0] <= 0.5:
        kind = "memorized" if fewest == calibration.memorized else "ordinary"
        return (
            f"useless: {fewest} {kind} prompt{'s' * (fewest != 1)} cannot show that the detector tells the two kinds apart: not even a "
            "perfect AUC of so few has a 95 % interval above 0.5. Give more, a few dozen in earnest"
        )
    best = max((entry.auc for entry in calibration.entries if entry.auc is not None), key=lambda auc: auc.low)
    return (
        f"useless: the detector does not tell memorized prompts from ordinary ones on this model: its best AUC is {best.value:.3f}, 95 % "
        f"interval [{best.low:.3f}, {best.high:.3f}], which reaches 0.5. A threshold would flag by chance"
    )


def _base(pipe: Any, settings: CalibrateSettings) -> torch.nn.Module | None:
    """Return the network of the base that is named, in the pipeline's precision; None where none is."""
    if settings.beside is None:
        return None
    network = network_of(pipe)
    assert network is not None
    source = settings.sampling.of(settings.beside).source()
    source.check_weights()
    return source.load(source.family.network, network.dtype).to(network.device)  # type: ignore[no-any-return]


def _measured(
    pipe: Any, wanted: Sequence[Request], settings: CalibrateSettings, base: torch.nn.Module | None
) -> Iterator[tuple[int, list[float]]]:
    """Yield the place of each wanted prompt and what is measured of it: the norms, the two terms of anisotropy, or the score beside the base."""
    config, state, bar = settings.sampling, processes(), {"desc": "calibrate"}
    if settings.detector == "norm":
        guard = MemorizationGuard(pipe, score_space=settings.score_space)
        for batch in generate(pipe, wanted, config, guard=guard, decode=False, state=state, bar=bar):
            yield from ((one.request.prompt_index, one.report.curve) for one in batch if one.report is not None)
        return

    def terms(batch: Sequence[Request], options: dict[str, Any]) -> list[tuple[int, list[float]]]:
        if settings.detector == "beside_base":
            added = beside_base(pipe, [request.prompt for request in batch], base, **options)
            return [(r.prompt_index, [one]) for r, one in zip(batch, added, strict=True)]
        found = anisotropy(pipe, [request.prompt for request in batch], **options)
        return [(r.prompt_index, [one.norm, one.alignment]) for r, one in zip(batch, found, strict=True)]

    for rows in in_batches(pipe, wanted, config, terms, state=state, bar=bar):
        yield from rows


def _weighted(found: torch.Tensor, terms: AnisotropyTerms) -> torch.Tensor:
    """Return the score of each image, `(N, G, 1)`, from its two terms, `(N, G, 2)`; empty stays empty."""
    if not len(found):
        return found
    return (found * torch.tensor([terms.norm_weight, terms.alignment_weight])).sum(2, keepdim=True)


def thresholds(ordinary: torch.Tensor, memorized: torch.Tensor, fpr: float, *, seed: int = 0) -> list[Entry]:
    """Find a threshold for each number of evaluations (1, 5, all) and of images per prompt (1, all).

    Args:
        ordinary: norms, `(N prompts, G images, S evaluations)`.
        memorized: the same, `(P, G, S)`; empty: no figures of detection.
        fpr: the rate asked for.
        seed: of the intervals.
    """
    generations, evaluations = ordinary.shape[1:]
    entries = []
    for steps in (*(s for s in EARLY if s < evaluations), "all"):
        upto = steps if isinstance(steps, int) else evaluations
        for images in dict.fromkeys((1, generations)):
            scores, groups = _scores(ordinary, upto, images)
            value = threshold_at(scores, fpr)
            rate = bootstrap(scores >= value, torch.mean, name="FPR", groups=groups, seed=seed, share=True)
            detection: dict[str, Estimate] = {}
            if len(memorized):
                hits, hit_groups = _scores(memorized, upto, images)
                area, tpr = detection_figures(
                    hits, scores, rate=_TPR_RATE, memorized_groups=hit_groups, ordinary_groups=groups, seed=seed
                )
                if (prompts := min(len(memorized), len(ordinary))) < _FEW:
                    # Resampling two or three prompts gives an interval that is far too narrow.
                    area = replace(area, low=min(area.low, wilson(area.value, prompts)[0]))
                detection = {"auc": area, "tpr": tpr}
            known: Any = steps
            entries.append(Entry(known, images, value, rate, **detection))
    return entries


def _scores(curves: torch.Tensor, steps: int, images: int) -> tuple[torch.Tensor, list[int]]:
    """Return the mean over the first evaluations: of every image, or over the images of a prompt; and their prompts."""
    scores = curves[:, :, :steps].double().mean(dim=2)
    if images == 1:
        return scores.flatten(), [i for i in range(len(curves)) for _ in range(curves.shape[1])]
    return scores.mean(dim=1), list(range(len(curves)))


def table(calibration: Calibration) -> str:
    """Return the thresholds as plain text, with a note where there are too few prompts for the rate."""
    lines = [["evaluations", "images", "threshold", "ordinary prompts flagged", "AUC", "TPR at 1 % FPR"]]
    for e in calibration.entries:
        steps = f"all {calibration.evaluations}" if e.steps == "all" else str(e.steps)
        lines.append([
            steps, str(e.images_per_prompt), f"{e.value:.5g}", e.rate.show(2, 100, " %"),
            "unknown" if e.auc is None else e.auc.show() + " useless" * (e.tells is False),
            "-" if e.tpr is None else e.tpr.show(),
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    if calibration.anisotropy is not None:
        terms = calibration.anisotropy
        text += (
            f"\nscore = {terms.norm_weight:.5g} norm + {terms.alignment_weight:.5g} alignment, of pure noise, before sampling. "
            "The guard cannot use this threshold while sampling: ask ambient_sd.guard.anisotropy.screen."
        )
    if calibration.beside_base:
        text += "\nscore = norm of what the model adds to its base's guidance of pure noise, before sampling: ask ambient_sd.guard.beside_base.screen."
    if not calibration.memorized:
        text += "\nAUC unknown: without memorized prompts nothing shows that the detector works on this model. Give some with --memorized."
    elif any(e.tells is False for e in calibration.entries) and useless(calibration) is None:
        text += "\nuseless: the AUC's interval reaches 0.5. The guard refuses these thresholds."
    if calibration.ordinary * calibration.rate_asked < 1:
        text += (
            f"\n{calibration.ordinary} ordinary prompts cannot show a rate of {calibration.rate_asked * 100:g} % per prompt: "
            "those thresholds lie just above the highest score seen. Give "
            f"{round(1 / calibration.rate_asked)} or more, a few hundred in earnest."
        )
    return text


# --- the file of scores ----------------------------------------------------------------------------------------------


def _read(path: Path, given: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[tuple[Kind, int], list[list[float]]]]:
    """Return the header and the norms of an earlier run; a last line that was cut off goes."""
    if not path.is_file():
        return None, {}
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rows = [json.loads(line) for line in whole.splitlines()]
        if not rows:
            return None, {}
        header, curves = rows[0], {}
        before = header["given"]
        for row in rows[1:]:
            curves[row["kind"], int(row["prompt"])] = [[float(x) for x in curve] for curve in row["curves"]]
        lengths = {len(curve) for rows_ in curves.values() for curve in rows_}
        counts = {len(rows_) for rows_ in curves.values()}
        if len(lengths) > 1 or counts - {before["num_images_per_prompt"]}:
            raise ValueError("lines of unequal length")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} cannot be read", rule=one_line(f"{type(error).__name__}: {error}", 200),
                        remedy="remove it to begin anew") from None  # fmt: skip
    if (other := difference(before, given)) is not None:
        raise _differs(path, other)
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return header, curves


def _differs(path: Path, what: str) -> UserError:
    return UserError(f"{path} holds scores of other settings ({what})", rule="they do not mix",
                     remedy="remove it, or name another folder with --output_dir")  # fmt: skip


def _append(path: Path, row: dict[str, Any], mode: Literal["a", "w"] = "a") -> None:
    with path.open(mode, encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def read_both(ordinary: str, memorized: str | None) -> tuple[list[str], list[str]]:
    """Return the prompts of both files; one that stands in both is refused."""
    first: list[str] = read_prompts(ordinary)
    second: Sequence[str] = read_prompts(memorized) if memorized else []
    both = set(first) & set(second)
    if both:
        raise UserError(
            f"{one_line(min(both), 80)!r} stands in both prompt files", rule="a prompt is ordinary or memorized"
        )
    return first, list(second)
