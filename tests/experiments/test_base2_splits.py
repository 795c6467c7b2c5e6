"""What version 2 of the base never sees: concepts that are new in every style, a style, an artist; and nothing of it under another name."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ambient_sd.assets import IMAGES
from experiments.build_images import CONCEPTS, NAMEABLE, NOVEL, check_withheld, mark_novel
from experiments.build_styles import PER_FAMILY, SETS, merged, sides
from experiments.clip_art import _metadata, _stem
from experiments.concepts import families, words
from experiments.names import COMMON


@pytest.fixture(scope="module")
def concepts() -> list[dict[str, Any]]:
    return json.loads(CONCEPTS.read_text())


@pytest.fixture(scope="module")
def sets() -> dict[str, list[dict[str, Any]]]:
    return json.loads(SETS.read_text())


VARIANTS = [
    ("waving hand", "waving hand: medium-dark skin tone"),
    ("woman firefighter", "firefighter"),
    ("crying face", "crying cat face"),
    ("crying face", "loudly crying face"),
    ("red heart", "blue heart"),
    ("automobile", "oncoming automobile"),
    ("doughnut", "donut"),
    ("cherries", "cherry"),
    ("lady beetle", "ladybug"),
    ("eyeglasses", "glasses"),
    ("sun", "sun with face"),
    ("shoes", "shoe"),
    ("jack-o-lantern", "halloween pumpkin"),
]


@pytest.mark.parametrize(("one", "other"), VARIANTS)
def test_variants_and_synonyms_are_one_family(one: str, other: str) -> None:
    first, second, control = families([[one], [other], ["volcano"]])
    assert first == second != control


def test_different_things_are_not_one_family() -> None:
    names = ["red apple", "banana", "violin", "dog", "rocket", "snow-capped mountain", "grinning face"]
    assert len(set(families([[n] for n in names]))) == len(names)


def test_families_in_the_file_are_those_of_its_names(concepts: list[dict[str, Any]]) -> None:
    assert families([c["names"] for c in concepts]) == [c["family"] for c in concepts]


def test_concepts_stand_as_in_the_embedded_images(concepts: list[dict[str, Any]]) -> None:
    table = pq.read_table(IMAGES, columns=["code", "name", "split", "group"]).to_pylist()
    embedded = {r["code"]: (r["name"], r["split"], r["group"]) for r in table}
    assert {c["code"]: (c["names"][0], c["emoji"], c["group"]) for c in concepts} == embedded


def test_novel_concepts_share_no_word_with_others(concepts: list[dict[str, Any]]) -> None:
    novel = [c for c in concepts if c["base2"] == "novel"]
    rest = [c for c in concepts if c["base2"] != "novel"]
    assert len(novel) == NOVEL
    told = [{w for c in some for n in c["names"] for w in words(n)} for some in (novel, rest)]
    assert not told[0] & told[1]
    assert not {c["family"] for c in novel} & {c["family"] for c in rest}
    assert not any(c["names"][0] in COMMON or c["category"] not in NAMEABLE for c in novel)


def test_novel_concepts_are_chosen_by_hash_alone(concepts: list[dict[str, Any]]) -> None:
    def fresh() -> list[dict[str, Any]]:
        keys = ("code", "names", "category", "group")
        return [{k: c[k] for k in keys} | {"name": c["names"][0]} for c in concepts]

    wanted = {c["code"] for c in concepts if c["base2"] == "novel"}
    for items in (fresh(), fresh()[::-1]):
        mark_novel(items)
        assert {c["code"] for c in items if c["novel"]} == wanted
    everyday = fresh()
    mark_novel(everyday, count=NOVEL // 2)
    assert {c["code"] for c in everyday if c["novel"]} < wanted, "control: another count, another set"


def test_style_sets_share_no_family_and_hold_what_they_say(
    sets: dict[str, list[dict[str, Any]]], concepts: list[dict[str, Any]]
) -> None:
    about = {c["code"]: c for c in concepts}
    kinds = ("style_train", "style_test", "style_novel")
    for one, other in itertools.combinations(kinds, 2):
        for key in ("code", "family"):
            assert not {r[key] for r in sets[one]} & {r[key] for r in sets[other]}, (one, other, key)
        # Without the near-duplicates, too: by the families of names alone.
        assert not {about[r["code"]]["family"] for r in sets[one]} & {about[r["code"]]["family"] for r in sets[other]}
    for kind in ("style_train", "style_test"):
        assert {about[r["code"]]["base2"] for r in sets[kind]} == {"known"}
        assert {about[r["code"]]["emoji"] for r in sets[kind]} == {"base"}
        assert max(np.unique([r["family"] for r in sets[kind]], return_counts=True)[1]) <= PER_FAMILY
    assert {about[r["code"]]["base2"] for r in sets["style_novel"]} == {"novel"}
    assert len(sets["style_train"]) >= 300
    assert min(len(sets["style_test"]), len(sets["style_novel"])) >= 100
    assert len({r["family"] for r in sets["style_train"][:60]}) == 60, "style_60 shows sixty different things"


def test_second_style_is_split_as_the_first_by_other_hashes(
    sets: dict[str, list[dict[str, Any]]], concepts: list[dict[str, Any]]
) -> None:
    about, train, test = {c["code"]: c for c in concepts}, sets["outline_train"], sets["outline_test"]
    for key in ("code", "family"):
        assert not {r[key] for r in train} & {r[key] for r in test}
    assert not {about[r["code"]]["family"] for r in train} & {about[r["code"]]["family"] for r in test}
    assert {about[r["code"]]["base2"] for r in [*train, *test]} == {"known"}
    assert {about[r["code"]]["emoji"] for r in [*train, *test]} == {"base"}
    assert len({r["family"] for r in train[:60]}) == 60 and len(test) >= 100
    assert len({r["code"] for r in train[:60]} & {r["code"] for r in sets["style_train"][:60]}) < 15


def test_confirming_sets_share_no_family(sets: dict[str, list[dict[str, Any]]]) -> None:
    assert not {r["family"] for r in sets["confirm_train"]} & {r["family"] for r in sets["confirm_test"]}
    assert min(len(sets["confirm_train"]), len(sets["confirm_test"])) >= 50


def some_rows(count: int) -> list[dict[str, Any]]:
    return [{"family": i // 3, "name": f"thing {i}", "code": str(i)} for i in range(count)]


def test_a_family_is_on_one_side_and_stays_there() -> None:
    few, many = sides(some_rows(60), "k"), sides(some_rows(120)[::-1], "k")
    side = {r["code"]: r["split"] for r in many}
    assert all(side[r["code"]] == r["split"] for r in few)
    of: dict[int, set[str]] = defaultdict(set)
    for r in many:
        of[r["family"]].add(r["split"])
    assert {len(s) for s in of.values()} == {1}
    assert set.union(*of.values()) == {"k_train", "k_test"}, "control: both sides are used"
    train = [r for r in many if r["split"] == "k_train"]
    assert [r["rank"] for r in train] == list(range(len(train)))
    half = len({r["family"] for r in train})
    assert len({r["family"] for r in train[:half]}) == half, "the first of every family before the second of any"


def test_near_duplicates_join_their_families() -> None:
    near = np.zeros((4, 4), bool)
    near[0, 2] = True
    joined = merged([0, 0, 1, 2], near)
    assert joined[0] == joined[1] == joined[2] != joined[3]


def test_clip_art_is_named_by_its_file_without_the_artist() -> None:
    svg = "<svg><metadata><dc:title>Bee &amp; Co</dc:title><dc:creator><a><dc:title>Mia Moo</dc:title></a></dc:creator>"
    title, artist, tags = _metadata(svg + "<rdf:li>Insect</rdf:li><rdf:li>hash(0x1)</rdf:li></metadata></svg>")
    assert (title, artist, tags) == ("Bee & Co", "Mia Moo", ("insect",))
    assert _stem("animals/bugs/red_bee1_mia_mo_01.svg", artist) == "red bee"
    assert _stem("animals/mia.svg", artist) == "mia", "control: a name is never emptied"


def test_training_rows_that_must_stay_unseen_are_refused() -> None:
    def concept(code: str, name: str, split: str, novel: bool = False) -> dict[str, Any]:
        return {"code": code, "names": [name], "split": split, "novel": novel}

    items = [
        concept("1", "gorilla", "base", novel=True),
        concept("2", "red apple", "base"),
        concept("3", "violin", "heldout"),
    ]

    def row(code: str, name: str, style: str = "3D", split: str = "train") -> dict[str, Any]:
        return {"code": code, "name": name, "aliases": [], "style": style, "split": split}

    check_withheld([row("2", "red apple"), row("3", "violin", "blob"), row("1", "gorilla", split="measure")], items)
    for bad in (
        row("1", "ape"),
        row("a.svg", "two gorillas", "clip art"),
        row("3", "violin"),
        row("2", "red apple", "twemoji"),
    ):
        with pytest.raises(AssertionError, match="must not be trained on"):
            check_withheld([bad], items)
