"""A study of a style: what it measures on captions that were not trained, and what its results say."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ambient_sd.assets import IMAGES
from ambient_sd.assets.tiny import tiny_pipeline
from ambient_sd.audit.closest import FEATURES, NAMES, agreeing
from ambient_sd.audit.neighbours import nearest
from ambient_sd.data.sources import load_rows
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate
from experiments import style
from experiments.contest import ALONE, alone, sentence
from experiments.measures import in_turn, read_reals
from experiments.points import Point, points
from experiments.results import draw_charts, tables, write_results
from experiments.style import (
    FIGURES,
    Classifier,
    chance,
    measure_new,
    read_classifier,
    train_classifier,
)
from experiments.style_curves import at_equal_distance, joined, main, table

ROOT = Path(__file__).parents[2]
CAPTIONS = [f"emoji {i}" for i in range(200)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- agreement -------------------------------------------------------------------------------------------------------


def test_real_images_agree_with_themselves_and_shuffled_ones_by_chance() -> None:
    rows = drawn(200, 8)
    near = nearest(rows, rows, 10).index
    assert agreeing(near, CAPTIONS, CAPTIONS).all() and agreeing(near[:, :1], CAPTIONS, CAPTIONS).all()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist()
    hits = agreeing(near, [CAPTIONS[i] for i in order], CAPTIONS).float().mean()
    assert chance(CAPTIONS, CAPTIONS, 10) == pytest.approx(0.05)
    assert abs(float(hits) - 0.05) < 3 * (0.05 * 0.95 / 200) ** 0.5


def test_chance_counts_images_that_share_a_caption() -> None:
    captions = ["a", "a", "b", "c"]
    assert chance(["a"], captions, 1) == pytest.approx(1 / 2)
    assert chance(["a"], captions, 2) == pytest.approx(1 - 1 / 6)  # neither of two: the pair b, c of six
    assert chance(["a", "b"], captions, 1) == pytest.approx(3 / 8)
    assert chance(["b"], captions, 10) == 1  # all are among the nearest


# --- the classifier --------------------------------------------------------------------------------------------------


def styles(rows: torch.Tensor) -> tuple[torch.Tensor, list[bool], list[str]]:
    half = len(rows) // 2
    return rows, [True] * half + [False] * half, [f"concept {i}" for i in range(half)] * 2


def test_a_known_direction_tells_the_styles_apart_on_unseen_concepts() -> None:
    rows, marks, concepts = styles(drawn(400, 20))
    rows[:200, 3] += 8
    found = train_classifier(rows, marks, concepts)
    assert found.real.value == 1 and found.others.value == 0
    assert 40 < found.real.n < 95 and found.real.n == found.others.n  # about a third; a concept is on one side
    assert found(torch.eye(20)[3:4] * 8).tolist() == [True] and found(torch.zeros(1, 20)).tolist() == [False]


def test_what_a_classifier_only_remembers_counts_for_nothing() -> None:
    rows, marks, concepts = styles(torch.eye(200))  # a feature for every image: it can learn its images by heart
    found = train_classifier(rows, marks, concepts)
    assert found.real.value == found.others.value  # and tells nothing of others


def test_too_few_images_train_no_classifier() -> None:
    rows, marks, concepts = styles(drawn(12, 2))
    with pytest.raises(UserError, match="at least 4 a side"):
        train_classifier(rows, marks, concepts)


def test_a_classifier_is_kept_for_its_images_and_its_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_rows(IMAGES, split="heldout")
    these, others = rows.subset(range(0, 40, 2)), rows.subset(range(1, 41, 2))
    monkeypatch.setattr(
        style, "embed", lambda images, features: {"EffLite0": drawn(len(images), 6)}
    )  # the network is not at issue
    made = read_classifier(these, others, "name", cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr(style, "train_classifier", None)
    again = read_classifier(these, others, "name", cache=tmp_path)
    assert torch.equal(again.weights, made.weights) and (again.bias, again.real) == (made.bias, made.real)
    vae = tiny_pipeline().vae
    names = {style._fingerprint(*given) for given in (
        (these, others, "name", None, 0), (others, these, "name", None, 0), (these, others, "code", None, 0), (these, others, "name", vae, 32),
    )}  # fmt: skip
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    assert (
        len(names | {style._fingerprint(these, others, "name", vae, 32)}) == 5
        and kept.stem.removeprefix("style-") in names
    )


# --- measuring -------------------------------------------------------------------------------------------------------


def test_held_out_images_are_perfect_samples_and_training_images_copies() -> None:
    training = load_rows(IMAGES, split="finetune").subset(range(0, 1000, 100)).check()
    heldout = load_rows(IMAGES, split="heldout").subset(range(0, 320, 13))
    reals = read_reals(training, heldout)
    certain = Estimate(1.0, 1.0, 1.0, 9)
    classifier = Classifier(torch.zeros(1280).double(), 1.0, certain, certain)  # calls all this style
    prompts = list(reals.heldout_captions)
    own = {caption: image for caption, image in zip(reals.heldout_captions, reals.heldout_images, strict=True)}
    figures, each = measure_new([own[p] for p in prompts], prompts, reals, classifier, 0, resamples=5)
    assert set(FIGURES) <= set(figures) and figures["agreement"].value == figures["style"].value == 1
    assert figures["agreement, nearest"].value == 1 and figures["copies-new"].value == 0
    assert [reals.heldout_captions[row] for row in each["own"]] == prompts
    assert abs(figures["distance"].value) < 1e-6 and figures["distance floor"].value == figures["distance"].value
    assert figures["distance"].low < 0.01 < figures["distance"].high - figures["distance"].low  # its prompts resampled
    # Control: training images in their place are copies, and show other things.
    prompts = in_turn(prompts, len(reals.images), 0)
    wrong, each = measure_new(list(reals.images), prompts, reals, classifier, 0, resamples=5)
    assert wrong["copies-new"].value == wrong["copied-recoloured-new"].value == 1
    assert each["originals"] == list(range(10))
    assert wrong["agreement, nearest"].value < 0.3 and wrong["distance"].value > 10


# --- the contest -----------------------------------------------------------------------------------------------------


def run(
    label: str,
    *steps: tuple[int, float, float],
    half: float = 0.02,
    contours: float | None = None,
    own: float | None = None,
    agreement: float = 0.5,
) -> dict[str, Any]:
    """A run with (step, copies, distance) by the decision; by contours the same where nothing else is given, by the closest image if given."""

    def figure(value: float, h: float) -> dict[str, Any]:
        return {"value": value, "low": value - h, "high": value + h, "n": 100}

    curve = {"level": [0.2, 4.0], "mean": [0.1, 0.5], "error": [0.0, 0.0]}
    names = ("copied", "copied-coarsely", "training-copied", *FIGURES)
    return {"label": label, "seed": 0, "differs": {}, "points": [
        {"step": step, "errors": {"training": curve, "heldout": curve}, "rule": "one", "figures": {
            **{name: figure(0.5, 0.1) for name in names}, "copies": figure(copies, half),
            "copied-recoloured": figure(copies if contours is None else contours, half), "distance": figure(distance, 1.0), "agreement": figure(agreement, 0.1),
            "distance floor": figure(10.0, 1.0), "kid": figure(0.1, 0.01), "ratio": figure(0.5, 0.1),
            **({} if own is None else {f"{name}-{feature}": figure(own, half) for name in NAMES for feature in FEATURES}),
        }} for step, copies, distance in steps
    ]}  # fmt: skip


def results(*runs: dict[str, Any], base: float | None = 90.0) -> dict[str, Any]:
    alone = {} if base is None else {"base": run(ALONE, (0, 0.0, base))["points"][0]}
    return {"study": "by hand", "missing": [], "runs": list(runs), **alone}


def said(*runs: dict[str, Any], base: float | None = 90.0) -> str:
    found = results(*runs, base=base)
    return sentence(points(found), alone(found))


PLAIN = run("plain", (300, 0.1, 61.5), (600, 0.4, 61.0), (900, 0.6, 63.0))


def test_the_sentence_names_who_copies_less_at_equal_quality() -> None:
    text = said(PLAIN, run("distill", (300, 0.0, 65.0), (600, 0.01, 61.8)), run("gap", (300, 0.05, 60.0)))
    assert text == (
        "At equal quality on captions that were not trained (Fréchet distance at most 62.0, caption agreement at least 40.0 %), distill (step 600) gives 1.0 % copies against "
        "10.0 % of plain (step 300): 9.0 points fewer [6.2, 11.8]; by contours distill (step 600) gives 1.0 % copies against 10.0 % of plain "
        "(step 300): 9.0 points fewer [6.2, 11.8]."
    )  # plain stopped at 300, not its best at 600 with 40 %


def test_recipes_of_other_seeds_than_plain_are_told() -> None:
    text = said(PLAIN, {**PLAIN, "seed": 1}, run("distill", (600, 0.01, 61.5)))
    assert "9.0 points fewer" in text and "(seeds 0 against 0, 1)" in text


def test_a_recipe_that_is_measurably_better_is_not_hidden_by_one_that_is_lower_by_chance() -> None:
    sure = run("distill", (600, 0.04, 61.5))
    text = said(PLAIN, run("gap", (300, 0.02, 61.0), half=0.1), sure)
    assert "distill (step 600) gives 4.0 % copies against 10.0 % of plain" in text
    assert "the fewest has gap" in said(PLAIN, run("gap", (300, 0.02, 61.0), half=0.1)), (
        "control: alone it tells nothing"
    )


def test_images_that_no_longer_follow_their_captions_are_not_as_good() -> None:
    gap = run("gap", (300, 0.0, 60.0), agreement=0.39)
    text = said(PLAIN, run("distill", (600, 0.01, 61.8), agreement=0.41), gap)
    assert "distill (step 600) gives 1.0 % copies against 10.0 % of plain (step 300)" in text and "gap" not in text
    assert "No recipe but plain itself is as good" in said(PLAIN, gap)
    found = tables(results(PLAIN, gap))
    assert "| gap | 60.0 [59.0, 61.0] (300) | none is as good | none is as good |" in found
    # Nor is a base that draws something else at a good distance.
    found = results(PLAIN)
    found["base"] = run(ALONE, (0, 0.0, 61.9), agreement=0.3)["points"][0]
    assert "Only plain is measured yet." in sentence(points(found), alone(found))


def test_the_table_of_a_page_has_a_row_a_step_and_plain_where_it_is_as_good() -> None:
    plain = run("plain", (300, 0.1, 61.5), (600, 0.4, 61.0), (900, 0.6, 63.0), own=0.5)
    other = run("distill level=2.5", (300, 0.0, 65.0), (600, 0.01, 61.25), own=0.25)
    labels = ["plain", "distill level=2.5"]
    # Of another seed than the other run, which is not held against it.
    worse = run("plain", (300, 0.9, 63.0), (600, 0.9, 62.0), own=0.9) | {"seed": 1}
    rows = table(joined([results(plain, worse, other, base=None)], labels)).splitlines()
    assert len(rows) == 2 + 5 and "| plain | 300 | 2 | 62.2 [61.5, 63.0] | 50.0 [42.9, 57.1] |" in "\n".join(rows)
    (its,) = [row for row in rows if row.startswith("| distill 2.5 | 600 | 1 | 61.2 [60.2, 62.2] |")]
    assert "| 25.0 [23.0, 27.0] |" in its
    (head, _, its, there) = at_equal_distance([results(plain, worse, other, base=None)], labels).splitlines()
    assert its.startswith("| distill 2.5 | 600 | 1 | 61.2 |") and its.endswith("| 1.0 [-1.0, 3.0] |")
    assert there.startswith("| plain, stopped there | 300 to 600 | 1 | 61.2 |")
    assert there.endswith("| 25.0 [23.0, 27.0] |"), "halfway from 10 to 40"
    assert head.count("|") == its.count("|") == there.count("|")


def test_nothing_is_said_of_plain_where_plain_is_not_measured() -> None:
    """Not of its seeds: plain would never be as good. Not of its first steps: plain would have the images of a later one."""
    labels = ["plain", "distill"]
    other = run("distill", (300, 0.0, 61.25), (600, 0.01, 66.0), own=0.25)

    def beside(*plain: dict[str, Any]) -> list[str]:
        return at_equal_distance([results(*plain, other, {**other, "seed": 1}, base=None)], labels).splitlines()[2:]

    plain = run("plain", (300, 0.1, 61.5), (600, 0.4, 61.0), own=0.5)
    its, there, last, there_last = beside(plain)  # seed 0 alone of both
    assert "| 300 | 1 | 61.2 |" in its and "| 300 to 600 | 1 | 61.2 |" in there
    # After its last step the run is worse than plain was at its first: plain's own distance stands there.
    assert "| 600 | 1 | 66.0 |" in last and "| 300, its first | 1 | 61.5 |" in there_last
    its, there, *_ = beside({**plain, "seed": 2})
    assert "| 300 | 2 | 61.2 |" in its and "not measured with these seeds" in there and "not as good" not in there
    _, there, *_ = beside(run("plain", (300, 0.1, 63.0), own=0.5))
    assert "not as good by step 300" in there
    # A step that seed 1 lacks is left out, and the row says between which steps it was drawn.
    _, there, *_ = beside(run("plain", (100, 0.0, 62.0), (300, 0.1, 61.5), (600, 0.4, 61.0), own=0.5),
                          {**run("plain", (100, 0.0, 62.0), (600, 0.4, 61.0), own=0.5), "seed": 1})  # fmt: skip
    assert "| 100 to 600 | 2 | 61.2 |" in there


@pytest.mark.parametrize(
    ("runs", "own", "words"),
    [(["plain", "distil"], 0.5, "--runs 'distil'"), (["plain"], None, "run 'plain' has no own")],
)
def test_a_page_of_a_run_that_is_not_there_is_refused(
    runs: list[str],
    own: float | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results(run("plain", (300, 0.1, 61.5), own=own), base=None)))
    monkeypatch.setattr("sys.argv", ["style_curves", str(tmp_path), "--runs", *runs, "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert words in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_measures_that_disagree_are_told_apart() -> None:
    text = said(PLAIN, run("distill", (600, 0.01, 61.8), contours=0.3), run("gap", (600, 0.09, 61.0), contours=0.02))
    assert "distill (step 600) gives 1.0 %" in text and "by contours gap (step 600) gives 2.0 %" in text


def test_the_closest_image_judges_where_every_step_has_it() -> None:
    plain, other = run("plain", (300, 0.0, 61.5), own=0.3), run("distill", (600, 0.0, 61.8), own=0.1)
    text = said(plain, other)
    assert "no recipe gives measurably fewer copies than the 0.0 % of plain" in text
    assert (
        "; by the closest image in pixels distill (step 600) gives 10.0 % samples nearest to their own training image against 30.0 % of plain "
        "(step 300): 20.0 points fewer [17.2, 22.8]; by the closest image in contours distill" in text
    )
    assert "closest" not in said(
        plain, run("distill", (600, 0.0, 61.8))
    )  # one was measured before there was such a figure
    found = results(plain, other)
    assert "own image closest" not in tables(found)  # the base has none
    found["base"] = run(ALONE, (0, 0.0, 90.0), own=0.0)["points"][0]
    assert "own image closest" in tables(found) and "| 30.0 % [28.0, 32.0] |" in tables(found)
    assert set(draw_charts(found)[""]) == {"curves", "curves-contours", "curves-own", "curves-own-contours"}


@pytest.mark.parametrize(
    ("runs", "base", "words"),
    [
        ((PLAIN, run("distill", (600, 0.0, 62.1))), 90.0, "No recipe but plain itself is as good as plain's best"),
        ((PLAIN, run("gap", (600, 0.09, 61.0))), 90.0, "no recipe gives measurably fewer copies than the 10.0 % of plain (step 300); the fewest has gap"),
        ((PLAIN, run("gap", (600, 0.3, 61.0))), 90.0, "no recipe gives measurably fewer copies"),
        ((PLAIN, run("gap", (600, 0.0, 61.0))), 61.9, "The base alone is as good as plain's best"),
        ((PLAIN,), 90.0, "Only plain is measured yet."),
        ((run("gap", (600, 0.0, 61.0)),), None, "plain is not measured yet"),
    ],
)  # fmt: skip
def test_the_sentence_is_honest_where_nothing_is_won(
    runs: Sequence[dict[str, Any]], base: float | None, words: str
) -> None:
    text = said(*runs, base=base)
    assert words in text and "points fewer" not in text


def test_results_have_the_sentence_a_table_a_run_and_the_figure(tmp_path: Path) -> None:
    found = results(PLAIN, run("distill level=2.5", (300, 0.0, 65.0), (600, 0.0, 61.8)))
    for name in ("samples.png", "samples-new.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    page = write_results(found, tmp_path).read_text()
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# by hand\n\n**At equal quality on captions that were not trained")
    assert all(f"**{label}**" in text for label in (ALONE, "plain", "distill level=2.5")) and "| 900 | 60.0 %" in text
    assert "by chance 50.0 %" in text and "![](samples-new.png)" in text and "Captions that were not trained" in page
    drawn = {name: (tmp_path / f"{name}.svg").read_text() for name in ("curves", "curves-contours")}
    for svg in drawn.values():
        assert all(f">{step}</text>" in svg for step in (300, 600, 900)) and "distill level=2.5" in svg and ALONE in svg
    assert not (tmp_path / "front.svg").exists()
    assert "none is as good" in tables(results(PLAIN, run("gap", (300, 0.0, 70.0))))


def test_a_study_on_training_captions_is_shown_as_before() -> None:
    old = results(PLAIN)
    for point in old["runs"][0]["points"]:
        del point["figures"]["style"]
    assert "At the last step" in tables(old) and "Every measured step" not in tables(old)
    assert all(isinstance(p, Point) for p in points(old)) and not re.search("agreement", tables(old))


@pytest.mark.parametrize("study", ["outline-60", "style-60-names", "style-60-lora"])
def test_the_published_page_has_the_tables_of_its_results(study: str) -> None:
    folder, page = ROOT / "docs" / "study" / study, (ROOT / "docs" / "results" / "styles.md").read_text()
    found = json.loads((folder / "results.json").read_text())
    rows = {row for row in table(points(found)).splitlines() if "---" not in row}
    published = (folder / "own.txt").read_text()
    assert len(rows) > 4 and all(row in published and row in page for row in rows)
