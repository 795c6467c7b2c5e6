"""The training of the embedded base: a killed run goes on to the bit, a log holds each step once, version 1 is still what it was."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from ambient_sd.assets import IMAGES
from experiments import build_base
from experiments.build_base import RECIPES, Log, Recipe, assemble, base_rows, captions_of, export, train_unet, train_vae


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return base_rows(RECIPES[1], IMAGES)[:6]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    first, second = RECIPES[2].phases
    phases = (dataclasses.replace(first, until=2), second)
    return dataclasses.replace(
        RECIPES[2], vae_channels=(8, 8, 8), vae_steps=3, unet_steps=4, cooldown=2, merges=20, phases=phases, start=None
    )


def weights(path: Path) -> dict[str, Any]:
    state = torch.load(path, weights_only=True)
    return {f"{part}.{k}": v for part in ("model", "ema") for k, v in state[part].items()}


def test_a_cut_run_ends_in_the_same_bits(
    rows: list[dict[str, Any]], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_base, "new_unet", small_unet)
    for name, stops in {"whole": [None], "cut": [1, None], "other": [None]}.items():
        folder = tmp_path / name
        folder.mkdir()
        for until in stops:
            train_vae(folder, recipe, rows, batch=2, until=until)
        for until in [3, None] if name == "cut" else [None]:
            train_unet(folder, recipe, rows, batch=2, until=until, seed=name == "other")
    for file in ("vae.pt", "unet.pt"):
        whole, cut = weights(tmp_path / "whole" / file), weights(tmp_path / "cut" / file)
        assert all(torch.equal(whole[k], cut[k]) for k in whole), file
    other = weights(tmp_path / "other" / "unet.pt")
    assert not all(torch.equal(whole[k], other[k]) for k in whole), "control: another seed, other bits"


def test_a_later_version_goes_on_from_an_earlier_one(
    rows: list[dict[str, Any]], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_base, "new_unet", small_unet)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    train_vae(tmp_path / "first", recipe, rows, batch=2)
    train_unet(tmp_path / "first", recipe, rows, batch=2)
    export(tmp_path / "first", recipe, tmp_path / "base")
    later, work = dataclasses.replace(recipe, start=tmp_path / "base"), tmp_path / "second"
    train_unet(work, later, rows[:3], batch=2, until=1)
    start = assemble(tmp_path / "first", recipe)
    assert CLIPTokenizer.from_pretrained(work / "tokenizer").get_vocab() == start.tokenizer.get_vocab()
    averaged = torch.load(work / "unet.pt", weights_only=True)["ema"]
    for (
        name,
        before,
    ) in start.unet.state_dict().items():  # one step of a warming rate, averaged with a weight of a tenth; fp16
        assert torch.allclose(averaged[f"unet.{name}"], before, atol=1e-3), name
    train_vae(work, later, rows, batch=2)
    old, new = (AutoencoderKL.from_pretrained(path).state_dict() for path in (tmp_path / "base" / "vae", work / "vae"))
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder", "post_quant_conv"}, "the latents stay what the network knows"


def small_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        cross_attention_dim=192,
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def test_steps_taken_again_are_logged_once(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    first = Log(path, ["step", "loss"], 0)
    for step in (50, 100, 150):
        first.row(step, 1.0)
    first.file.close()
    with path.open("a") as file:
        file.write("20")  # the kill came in the middle of a row
    again = Log(path, ["step", "loss"], 100)
    again.row(150, 2.0)
    assert [r[:2] for r in csv.reader(path.open())] == [["step", "loss"], ["50", "1"], ["100", "1"], ["150", "2"]]


def test_version_1_reads_the_base_split_alone() -> None:
    assert {r["split"] for r in base_rows(RECIPES[1], IMAGES)} == {"base"}
    assert (RECIPES[1].vae_steps, RECIPES[1].unet_steps, RECIPES[1].merges) == (1_700, 7_000, 900)


def test_clip_art_is_asked_for_by_style() -> None:
    row = {"name": "owl", "aliases": [], "style": "clip art"}
    assert captions_of(row) == ["clip art of owl", "owl, clip art"]
    assert "owl" in captions_of(row | {"style": "blob"})
