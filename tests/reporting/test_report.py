"""The finding: what the sentence says follows from the figures and their intervals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from report_tools import COPIES, image, report, row, run

from ambient_sd.audit.metrics import Row, difference
from ambient_sd.audit.neighbours import Neighbours, nearest
from ambient_sd.reporting.report import Report, find, label_of, make_samples
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.estimate import Estimate

# --- the sentence


@pytest.mark.parametrize(
    ("plain", "ambient", "kind", "words"),
    [
        ((0.60, 14.6), (0.05, 14.2), "better", "copies fewer training images than the plain run"),
        ((0.60, 14.6), (0.05, 14.2), "better", "no measurably worse quality"),
        ((0.60, 14.6), (0.05, 9.0), "better", "its images are better"),
        ((0.60, 14.6), (0.00, 85.0), "trade", "its images are worse"),
        ((0.10, 14.6), (0.08, 14.2), "unclear", "No clear difference"),
        ((0.10, 14.6), (0.08, 85.0), "unclear", "Its images are worse"),
        ((0.05, 14.6), (0.60, 14.2), "worse", "copies more"),
    ],
)
def test_the_sentence_follows_the_intervals(
    plain: tuple[float, float], ambient: tuple[float, float], kind: str, words: str
) -> None:
    found = find(report(run("plain", *plain), run("ambient", *ambient)))
    assert found.kind == kind and words in found.sentence
    assert f"{100 * ambient[0]:.1f} %" in found.sentence and f"{100 * plain[0]:.1f} %" in found.sentence


def test_one_run_is_judged_by_its_excess_over_held_out_images() -> None:
    assert find(report(run("model", 0.6, 14))).kind == "copies"
    assert find(report(run("model", 0.0, 14))).kind == "no-copies"
    # A copy where no unseen image is called one is a copy, however few there are; where some are, only an exact one is.
    few = run("model", 0.01, 14)
    assert find(report(few)).kind == "copies" and "copies training images: 1.0 %" in find(report(few)).sentence
    by_chance = dataclasses.replace(few, figures=[row(COPIES, 0.01, 0.05, 0.01), *few.figures[1:]])
    assert find(report(by_chance)).kind == "no-copies"
    assert find(report(dataclasses.replace(by_chance, exact=1))).kind == "copies"


def test_a_published_cosine_measure_is_heard_as_the_others_are() -> None:
    quiet, loud = (Estimate(v, max(0.0, v - 0.02), min(1.0, v + 0.02), 100) for v in (0.05, 1.0))
    for name in ("SSCD > 0.5", "memorized-edges16"):
        row = Row(name, loud, quiet, difference(loud, quiet))
        one = run("model", 0.0, 14)
        found = find(report(dataclasses.replace(one, figures=[*one.figures, row])))
        assert found.kind == "copies-otherwise" and f"by {name.removeprefix('memorized-')} alone" in found.sentence


def test_a_deciding_measure_that_was_not_taken_is_named() -> None:
    with pytest.raises(UserError, match="FD-other"):
        find(Report("t", "c", [run("a", 0.1, 1), run("b", 0.1, 1)], 60, COPIES, "FD-other"))


# --- samples and sheets


def test_samples_stand_beside_their_nearest_training_image() -> None:
    training = torch.eye(4) * 10
    near = nearest(torch.stack([training[2], training[0] * 0.5 + 4]), training)
    images = [image(i) for i in range(4)]
    one, two = make_samples(images[:2], ["a", "b"], images, near, scores=[1.5, None], training_prompts=list("wxyz"))
    assert one.nearest_image is images[2] and one.nearest_prompt == "y" and one.memorized and one.score == 1.5
    assert not two.memorized and two.score is None and two.ratio > 1 / 3
    with pytest.raises(UserError):
        make_samples(images, ["a"], images, near)


def test_neighbours_of_cosine_features_can_be_shown_too() -> None:
    near = Neighbours(torch.tensor([[0.0, 0.5]]).double(), torch.tensor([[1, 0]]), "cosine")
    assert make_samples([image(0)], ["p"], [image(1), image(2)], near)[0].memorized


def test_labels_put_words_before_abbreviations() -> None:
    assert label_of("copies") == "Copy rate"
    assert label_of("FD-EffLite0-pca64") == "Fréchet distance (FD), EffLite0-pca64"
    assert label_of("memorized-edges16") == "Edge-based copy rate (edges16)"
    assert label_of("DINOv2 > 0.9") == "DINOv2 > 0.9"  # a name that nothing is known of stays
