"""Sheets: every image and every word in its place, for contact sheets and for the prompts of a run."""

from __future__ import annotations

import pytest
from PIL import Image

from ambient_sd.utils.errors import UserError
from ambient_sd.utils.sheets import contact_sheet, cut_sheet, prompt_sheet


def image(shade: int, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), (shade % 256, 40, 90))


def inked(sheet: Image.Image, box: tuple[int, int, int, int]) -> int:
    """Count the pixels of a part that are not white."""
    return sum(pixel != (255, 255, 255) for pixel in sheet.crop(box).get_flattened_data())


def test_contact_sheet_places_every_image_and_caption() -> None:
    sheet = contact_sheet([image(10 * i) for i in range(5)], columns=3, gap=2)
    assert sheet.size == (3 * 18 + 2, 2 * 18 + 2)
    assert [sheet.getpixel((2 + 18 * (i % 3), 2 + 18 * (i // 3)))[0] for i in range(5)] == [0, 10, 20, 30, 40]
    assert [p.tobytes() for p in cut_sheet(sheet, 5, 16, 3, gap=2)] == [image(10 * i).tobytes() for i in range(5)]
    for wrong in (
        {"images": []},
        {"images": [image(0)], "captions": ["a", "b"]},
        {"images": [image(0)], "columns": 0},
    ):
        with pytest.raises(UserError):
            contact_sheet(**wrong)  # type: ignore[arg-type]


def test_captions_wrap_under_their_image() -> None:
    few, many = (contact_sheet([image(0, 96)] * 2, 2, [text, ""]) for text in ("cat", "a cat on a mat beside a rat"))
    assert few.height < many.height and few.width == many.width
    assert inked(many, (4, 101, 100, many.height)) > inked(few, (4, 101, 100, few.height)) > 0
    assert inked(many, (104, 101, 200, many.height)) == 0  # the other image's caption is empty


def test_a_caption_ends_after_three_lines() -> None:
    long = contact_sheet([image(0, 96)], 1, ["word " * 500])
    assert long.height == contact_sheet([image(0, 96)], 1, ["word " * 12]).height


def test_parts_of_a_caption_have_lines_of_their_own() -> None:
    two = contact_sheet([image(0, 96)], 1, ["cat\nscore 1.2"])
    assert two.height == contact_sheet([image(0, 96)], 1, ["cat"]).height + 13


def test_other_scripts_and_control_characters_are_drawn_as_something() -> None:
    assert inked(contact_sheet([image(0, 96)], 1, ["日本\x00\u202e"]), (4, 101, 100, 120)) > 0


def test_a_prompt_sheet_carries_prompts_and_scores() -> None:
    rows = [[image(1, 96), image(2, 96)], [image(3, 96), image(4, 96)]]
    sheet = prompt_sheet(rows, ["a cat", "x" * 400], [["1.2", "1.3"], ["", "2.4"]])
    bare = prompt_sheet(rows, ["a cat", "x" * 400], [["", ""], ["", ""]])
    assert sheet.size == bare.size == (204, 2 * (96 + 26 + 4) + 4)
    assert sheet.getpixel((5, 18))[0] == 1 and sheet.getpixel((105, 18 + 126))[0] == 4
    assert inked(sheet, (0, 2, 204, 17)) == inked(bare, (0, 2, 204, 17)) > 0  # the prompt
    assert inked(sheet, (0, 113, 100, 127)) > inked(bare, (0, 113, 100, 127))  # the score
    assert inked(sheet, (199, 130, 204, 143)) == 0  # a long prompt ends inside
    with pytest.raises(UserError, match="one caption an image"):
        prompt_sheet(rows, ["a", "b"], [["1"], ["1", "2"]])
