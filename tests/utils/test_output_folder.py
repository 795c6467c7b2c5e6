"""The output folder: it takes nothing from others, resumes its own, and is only emptied when told to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ambient_sd.utils.errors import UserError
from ambient_sd.utils.output_folder import FILE, OutputFolder, difference

CONTENTS = ("images", "page.html", FILE)


def folder(out: Path, kind: str = "sample", **options: Any) -> OutputFolder:
    return OutputFolder(out, kind, CONTENTS, **{"overwrite": False, **options})


def fill(out: Path, **options: Any) -> OutputFolder:
    made = folder(out, **options)
    made.claim({"seed": 0, "weights": "a" * 64})
    (out / "images").mkdir()
    (out / "images" / "0.png").write_bytes(b"an image")
    return made


def test_a_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds 'thesis\.tex' and no settings\.json.*name another folder"):
            folder(tmp_path, overwrite=overwrite).claim({})
    with pytest.raises(UserError, match="must be a folder"):
        folder(tmp_path / "thesis.tex").check({})
    (tmp_path / "thesis.tex").rename(tmp_path / ".hidden")
    folder(tmp_path).check({})  # hidden files are the system's
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden"], "checking writes nothing"


def test_another_commands_folder_is_refused_even_to_overwrite(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(UserError, match="holds another command's output: sample"):
        folder(tmp_path, "audit", overwrite=True).check({})


def test_equal_settings_resume_and_leave_every_byte(tmp_path: Path) -> None:
    fill(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    again = folder(tmp_path)
    again.check({"seed": 0})  # what is known so far
    again.claim({"weights": "a" * 64, "seed": 0})
    assert (tmp_path / FILE).read_bytes() == before and (tmp_path / "images" / "0.png").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"seed": 1}, "seed was 0 and is 1"), ({"seed": 0, "weights": "b" * 64}, "weights changed"),
     ({"seed": 0, "weights": "a" * 64, "policy": "STP"}, "policy was None and is STP"), ({"seed": 0}, "weights changed")],
)  # fmt: skip
def test_other_settings_are_named_in_one_line(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    fill(tmp_path)
    with pytest.raises(UserError, match=f"other settings: {said}; a folder holds one run; .*--overwrite") as caught:
        folder(tmp_path).claim(settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        folder(tmp_path, overwrite=None).claim(settings)
    assert "--overwrite" not in str(caught.value), "a command without the flag does not name it"


def test_overwriting_removes_its_own_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path).finish()
    (tmp_path / "notes.txt").write_text("mine")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (tmp_path / "page.html").symlink_to(outside)
    new = folder(tmp_path, overwrite=True)
    new.check({"seed": 1})
    assert (tmp_path / "images").exists(), "checking removes nothing"
    new.claim({"seed": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", FILE] and (outside / "kept").exists()
    assert json.loads((tmp_path / FILE).read_text())["settings"] == {"seed": 1} and not new.finished
    (tmp_path / "images").mkdir()
    new.claim({"seed": 1})
    assert (tmp_path / "images").exists(), "what the run itself has written stays"


def test_a_finished_run_that_cannot_resume_is_kept(tmp_path: Path) -> None:
    fill(tmp_path, resumable=False).finish()
    with pytest.raises(UserError, match=r"holds a finished sample; it is kept; .*--overwrite"):
        folder(tmp_path, resumable=False).check({"seed": 0})
    folder(tmp_path, resumable=False, overwrite=True).claim({"seed": 0})
    assert not (tmp_path / "images").exists()


def test_a_run_that_was_cut_and_cannot_resume_begins_anew(tmp_path: Path) -> None:
    fill(tmp_path, resumable=False)
    folder(tmp_path, resumable=False).claim({"seed": 1})
    assert not (tmp_path / "images").exists()


def test_mappings_that_may_grow_grow(tmp_path: Path) -> None:
    def claim(models: dict[str, str]) -> None:
        folder(tmp_path, grows=("models",)).claim({"models": models})

    claim({"a": "1"})
    claim({"b": "2"})
    with pytest.raises(UserError, match=r"models\.a was 1 and is 3"):
        claim({"a": "3"})
    assert json.loads((tmp_path / FILE).read_text())["settings"] == {"models": {"a": "1", "b": "2"}}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "sample", "settings": 3, "finished": false}', "[" * 10**5])
def test_a_damaged_settings_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"settings\.json cannot be read; name another folder"):
            folder(tmp_path, overwrite=overwrite).check({})


def test_differences_are_found_in_nested_settings() -> None:
    assert difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == "a.b changed"
    assert difference({"a": {"b": 1.5}}, {"a": {}}) == "a.b was 1.5 and is None"
    assert difference({"a": 1, "b": None}, {"b": None, "a": 1}) is None
