"""What text encoders do not read of a caption is said, and images that are enlarged several times are no silent default."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny

from ambient_sd.cli import main
from ambient_sd.commands.inspect import inspect
from ambient_sd.data.captions import find_cut, surely_cut
from ambient_sd.data.enlargement import check_enlargement, median_enlargement
from ambient_sd.training import plan_run, run
from ambient_sd.training.config import TrainConfig, parse
from ambient_sd.utils.errors import UserError

LONG = "a red disc on white paper beside\x1b[2J a blue one"  # the tiny tokenizer makes a token of every letter; 22 are read


def settings(base: Path, folder: Path, out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base), "train_data_dir": str(folder), "resolution": 32, "max_train_steps": 1,
        "train_batch_size": 1, "report_to": "none", "output_dir": str(out),
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def with_long_caption(folder: Path) -> Path:
    tiny.tiny_folder(folder, count=6)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[4]["text"] = LONG
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# --- captions


def test_what_is_lost_is_what_the_tokenizer_cuts_off() -> None:
    tokenizer = tiny.tiny_tokenizer()
    texts = ["a cat", "abcdefghij klmnopqrstuvwxyz", "x" * 22, "x" * 23]
    cuts = find_cut(texts, [tokenizer])
    assert [(c.index, c.tokens, c.limit, c.lost) for c in cuts] == [(1, 26, 22, "wxyz"), (3, 23, 22, "x")]
    kept = tokenizer(texts[1], truncation=True, max_length=24).input_ids[1:-1]
    assert tokenizer.decode(kept).replace(" ", "") + cuts[0].lost == texts[1].replace(" ", "")


def test_of_two_tokenizers_the_one_that_reads_less_counts() -> None:
    short, long = tiny.tiny_tokenizer(), tiny.tiny_tokenizer(pad_token="!")
    long.model_max_length = 40
    for both in ([short, long], [long, short]):
        (cut,) = find_cut(["y" * 30], both)
        assert (cut.limit, cut.lost) == (22, "y" * 8)
    assert find_cut(["y" * 30], [long]) == []


def test_without_a_tokenizer_only_what_any_clip_cuts_is_told() -> None:
    assert surely_cut(["word " * 75]) == []
    (cut,) = surely_cut(["a", "word, " * 38])
    assert (cut.index, cut.tokens, cut.lost) == (1, 76, ", ")


@pytest.mark.parametrize("base", ["tiny_base", "xl"])
def test_training_says_once_which_captions_are_cut(
    base: str, request: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if base == "xl":
        tiny.tiny_sdxl_pipeline().save_pretrained(tmp_path / "xl")
    place = tmp_path / "xl" if base == "xl" else request.getfixturevalue(base)
    folder = with_long_caption(tmp_path / "p")
    with caplog.at_level(logging.WARNING):
        summary = run(settings(place, folder, tmp_path / "o", center_crop=True), progress=False)
    said = [r.getMessage() for r in caplog.records if "are cut" in r.getMessage()]
    assert len(said) == 1 and said == list(summary.plan.notes)
    assert (
        said[0].startswith("1 of 6 captions are longer")
        and "004.png" in said[0]
        and "blueone" in said[0].replace(" ", "")
    )
    assert said[0].isprintable()
    plan = plan_run(settings(place, tiny.tiny_folder(tmp_path / "q"), tmp_path / "o2"))
    assert plan.notes == ()  # control


def test_inspect_lists_cut_captions(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    folder = with_long_caption(tmp_path / "p")
    main(["inspect", str(folder), "--resolution", "32", "--model", str(tiny_base), "--json", str(tmp_path / "f.json")])
    out, found = capsys.readouterr().out, json.loads((tmp_path / "f.json").read_text())
    assert found["counts"]["cut"] == 1 and "22 are read; lost:" in out and "\x1b" not in out
    assert [f["name"] for f in found["faults"] if f["kind"] == "cut"] == ["004.png"]
    main(["inspect", str(folder), "--resolution", "32", "--json", str(tmp_path / "f.json")])
    assert json.loads((tmp_path / "f.json").read_text())["counts"]["cut"] == 0  # no CLIP is known to cut it


def test_sample_says_and_records_what_was_not_read(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "o"
    main(["sample", str(tiny_base), "--prompt", "a cat", LONG, "--num_inference_steps", "1", "--out", str(out)])
    said = [line for line in capsys.readouterr().out.splitlines() if "are cut" in line]
    assert len(said) == 1 and "1 of 2 prompts" in said[0] and "number 2" in said[0] and said[0].isprintable()
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [r["truncated"] for r in records] == [False, True] and records[0]["lost_text"] is None
    assert records[1]["lost_text"].replace(" ", "").endswith("blueone")
    assert "the end of the prompt was not read" in (out / "index.html").read_text()


# --- resolution


def test_the_median_enlargement_decides() -> None:
    square = [(512, 512)] * 3
    assert median_enlargement([(64, 64), (64, 640), (512, 512)], square) == 8.0
    check = lambda side, **more: check_enlargement([(side, side)] * 3, square, resolution=512, **more)  # noqa: E731
    assert check(512) is None and check(400) is None
    assert "enlarged 2 times" in str(check(256)) and "--resolution 256" in str(check(256))
    with pytest.raises(UserError, match=r"8 times or more.*--resolution 64, or --allow_upscaling"):
        check(64)
    assert "8 times" in str(check(64, allowed=True))
    with pytest.raises(UserError, match="512, the default: half of the images are enlarged 2 times"):
        check(256, given=False)  # a default is no choice
    assert check(400, given=False) is None


def test_training_and_level_refuse_the_default_for_small_images(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tiny.tiny_folder(tmp_path / "p", count=12)  # 48 px
    words = ["--pretrained_model_name_or_path", str(tiny_base), "--train_data_dir", str(folder), "--report_to", "none",
             "--output_dir", str(tmp_path / "o"), "--max_train_steps", "1"]  # fmt: skip
    with pytest.raises(UserError, match=r"resolution is 512, the default.*--resolution 48"):
        plan_run(parse(words))
    with pytest.raises(UserError, match=r"resolution is 256: .*enlarged 5\.33 times"):
        plan_run(parse([*words, "--resolution", "256"]))
    assert "5.33 times" in plan_run(parse([*words, "--resolution", "256", "--allow_upscaling"])).notes[0]
    assert "enlarged 2 times" in plan_run(parse([*words, "--resolution", "96"])).notes[0]
    assert plan_run(parse([*words, "--resolution", "48"])).notes == ()
    assert not (tmp_path / "o").exists()

    level = ["level", str(folder), "--model", str(tiny_base)]
    with pytest.raises(SystemExit) as end:
        main(level)
    assert end.value.code == 2 and "the default" in capsys.readouterr().err
    main([*level, "--resolution", "96", "--center_crop"])
    assert "enlarged 2 times or more" in capsys.readouterr().err
    main([*level, "--resolution", "48", "--center_crop"])
    assert "enlarged" not in capsys.readouterr().err


def test_inspect_says_that_most_images_are_enlarged(tmp_path: Path, capsys: Any) -> None:
    folder = tiny.tiny_folder(tmp_path / "p")
    main(["inspect", str(folder)])
    assert "half of the images are enlarged 10.7 times or more" in capsys.readouterr().out
    assert inspect(folder, resolution=48)[0].enlargement == 1.0
