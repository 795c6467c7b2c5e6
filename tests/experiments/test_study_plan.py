"""A study's file says what will be trained, and nothing that is wrong in it gets past the reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ambient_sd.utils.errors import UserError
from experiments.plan import Style, identity, read_plan

ROOT = Path(__file__).parents[2]
GOOD: dict[str, Any] = {
    "name": "tried",
    "base": {"pretrained_model_name_or_path": "base", "train_data_dir": "images", "resolution": 32},
    "runs": {"plain": {"objective": "plain"}, "ambient": {"objective": "ambient", "sweep": {"ambient_level": [0.5, 1.0], "reweight": [2, 0]}}},
    "seeds": [0, 3],
    "measure_at": [6, 2, 4],
    "sample": {"images": 16},
}  # fmt: skip


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_sweep_is_one_run_for_each_combination_and_seed(tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path, GOOD))
    assert plan.labels == ["plain", *(f"ambient level={s} q={q}" for s in (0.5, 1.0) for q in (2, 0))]
    assert [run.name for run in plan.runs[:3]] == ["plain seed=0", "plain seed=3", "ambient level=0.5 q=2 seed=0"]
    config = plan.runs[-1].config("somewhere")
    assert (config.ambient_level, config.reweight, config.seed, config.resolution) == (1.0, 0, 3, 32)
    assert list(plan.measure_at) == [2, 4, 6] and plan.checkpointing_steps == 2
    assert len({run.folder for run in plan.runs}) == 10 and all(" " not in run.folder for run in plan.runs)
    assert [run.seed for run in read_plan(written(tmp_path, GOOD), {"seeds": [7]}).runs] == [7] * 5


def test_a_chart_names_entries_or_labels_of_the_study(tmp_path: Path) -> None:
    plan = read_plan(
        written(tmp_path, GOOD | {"charts": {"levels": ["plain", "ambient"], "one": ["ambient level=0.5 q=0"]}})
    )
    assert dict(plan.charts) == {"levels": plan.labels, "one": ["ambient level=0.5 q=0"]}
    assert not read_plan(written(tmp_path, GOOD)).charts
    # The names that a chart takes are those that `--only` takes.
    assert plan.chosen(["ambient"]) == [label for label in plan.labels if label.startswith("ambient ")]
    assert plan.chosen(["ambient level=0.5 q=0", "plain", "plain"]) == ["ambient level=0.5 q=0", "plain"]
    assert plan.chosen([]) == plan.labels
    with pytest.raises(UserError, match="'plane' is not in the study"):
        plan.chosen(["plain", "plane"])


def test_an_identity_tells_settings_and_sampling_apart_but_not_where_results_go(tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path, GOOD))
    one, other = (identity(plan, run) for run in plan.runs[:2])
    assert one != other and "output_dir" not in one["settings"]
    changed = read_plan(written(tmp_path, GOOD | {"sample": {"images": 17}}))
    assert identity(changed, changed.runs[0]) != one
    longer = read_plan(written(tmp_path, GOOD | {"measure_at": [2, 4, 6, 8]}))
    assert identity(longer, longer.runs[0]) == one  # a study may be made longer


def test_a_style_belongs_to_the_identity_and_only_where_one_is_given(tmp_path: Path) -> None:
    style = {"images": 32, "others": {"train_data_dir": "others"}}
    plain, judged = read_plan(written(tmp_path, GOOD)), read_plan(written(tmp_path, GOOD | {"style": style}))
    assert judged.style == Style(32, {"train_data_dir": "others"}, {}, "name")
    one, other = (identity(plan, plan.runs[0]) for plan in (plain, judged))
    assert (
        "style" not in one and {k: v for k, v in other.items() if k != "style"} == one
    )  # folders of before are gone on with


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a list", ["must be a mapping"]),
        ("runs: [", ["cannot be read"]),
        (GOOD | {"sedes": [1]}, ["sedes", "entries are"]),
        (GOOD | {"charts": {"levels": ["plane"]}}, ["charts: levels; run 'plane'", "runs: plain, ambient level=0.5 q=2"]),
        (GOOD | {"charts": {"levels": "plain"}}, ["charts: levels", "list of runs"]),
        (GOOD | {"charts": {"../levels": ["plain"]}}, ["charts: ../levels", "a file's"]),
        (GOOD | {"seeds": []}, ["seeds", "something in it"]),
        (GOOD | {"seeds": [0, 0]}, ["seeds", "different"]),
        (GOOD | {"seeds": [True]}, ["seeds", "whole"]),
        (GOOD | {"measure_at": [0]}, ["measure_at", "at least 1"]),
        (GOOD | {"sample": {"image": 4}}, ["image", "entries are"]),
        (GOOD | {"sample": {"images": 4}}, ["at least 16"]),
        (GOOD | {"sample": {"captions": "all"}}, ["training or none"]),
        (GOOD | {"sample": {"guidance_scale": float("inf")}}, ["finite"]),
        (GOOD | {"runs": {"plain": "plain"}}, ["plain", "mapping"]),
        (GOOD | {"runs": {"a": {"objective": "ambient", "sweep": {"ambient_level": 1}}}}, ["sweep", "lists"]),
        (GOOD | {"runs": {"a": {"objective": "plain", "ambient_level": 1}}}, ["runs: a", "ambient_level"]),
        (GOOD | {"runs": {"a": {"objektive": "plain"}}}, ["objektive", "no setting"]),
        (GOOD | {"runs": {"a": {"objective": "plain", "output_dir": "x"}}}, ["output_dir", "the study sets it"]),
        (GOOD | {"runs": {"a": {"objective": "plain", "lr_scheduler": "cosine"}}}, ["lr_scheduler", "constant"]),
        (GOOD | {"runs": {"a b": {"objective": "plain"}, "a_b": {"objective": "gap", "gap_upper": 2.0, "ambient_level": 1}}}, ["one name"]),
        (GOOD | {"runs": {"x" * 101: {"objective": "plain"}}}, ["runs: xxx", "at most 100"]),
        (GOOD | {"runs": {"$x_{$": {"objective": "plain"}}}, ["$x_{$", "without $"]),
        (GOOD | {"runs": {"a\nb": {"objective": "plain"}}}, ["printable"]),
        (GOOD | {"style": {"images": 32}}, ["style: others", "needed"]),
        (GOOD | {"style": {"images": 4, "others": {"dataset_split": "base"}}}, ["style: images", "at least 16"]),
        (GOOD | {"style": {"images": "all"}}, ["style: images", "whole number"]),
        (GOOD | {"style": {"judge": {}}}, ["style: judge", "entries are"]),
        (GOOD | {"style": {"images": 32, "others": {"dataset_split": "base"}}, "sample": {"captions": "none"}}, ["style", "without"]),
        (GOOD | {"name": "<script>alert(1)</script>"}, ["name:", "without $ | <"]),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_study_is_said_in_one_line(tmp_path: Path, content: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_plan(written(tmp_path, content))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


# sd2-laion10k.yaml is a training of its own, not a study.
STUDIES = sorted(p for p in (ROOT / "configs" / "study").glob("*.yaml") if not p.stem.startswith("sd2"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_the_studies_that_come_along_are_studies(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = read_plan(path)
    assert "plain" in plan.labels and len(plan.runs) >= 4
    assert f"python -m experiments.sweep configs/study/{path.name}" in plan.text
