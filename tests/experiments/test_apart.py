"""Recipes that are no settings of the trainer: filtered adapters, students of samples, averages of shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ambient_sd.assets.tiny import tiny_pipeline
from ambient_sd.audit.closest import FEATURES, NAMES
from ambient_sd.utils.errors import UserError
from experiments import closest, filter_lora, private_distillation, shards
from experiments.filter_lora import FILE, alignment, channels, filter_file, filtered
from experiments.plan import read_plan
from experiments.sweep import gather, main, merge, sweep


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_channels_are_the_singular_value_decomposition_of_the_update() -> None:
    down, up = drawn(4, 12), drawn(9, 4, seed=1)
    u, sigma, v = channels(down, up)
    assert torch.allclose((u * sigma) @ v.T, (up @ down).double(), atol=1e-6)
    assert torch.allclose(sigma, torch.linalg.svdvals((up @ down).double())[:4], atol=1e-6)
    assert torch.allclose(u.T @ u, torch.eye(4).double(), atol=1e-9)


def test_alignment_is_one_inside_the_principal_subspace_and_zero_outside() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 0.1, 0.1]))  # two directions hold 90 % of the energy
    aligned = alignment(weight, torch.eye(4).double(), torch.eye(4).double())
    assert aligned.tolist() == pytest.approx([1, 1, 0, 0])
    half = torch.tensor([[0.5**0.5, 0, 0.5**0.5, 0]]).T.double()
    assert alignment(weight, half, half).tolist() == pytest.approx([0.5])


def test_the_filter_keeps_what_is_aligned_and_the_control_what_is_large() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 0.1, 0.1]))
    down, up = torch.eye(4)[[0, 3]], torch.eye(4)[[0, 3]].T * torch.tensor([1.0, 5.0])  # e0 e0^T + 5 e3 e3^T
    left = {kind: filtered(down, up, weight, kind, 1) for kind in ("anchored", "cut")}
    products = {kind: b @ a for kind, (a, b) in left.items()}
    first, last = torch.zeros(4, 4), torch.zeros(4, 4)
    first[0, 0], last[3, 3] = 1, 5
    assert torch.allclose(products["anchored"], first, atol=1e-6) and torch.allclose(products["cut"], last, atol=1e-6)
    both = filtered(down, up, weight, "anchored", 2)
    assert torch.allclose(both[1] @ both[0], up @ down, atol=1e-6)


def test_a_filtered_file_has_the_names_and_head_of_its_source(tmp_path: Path) -> None:
    unet = tiny_pipeline().unet
    name, layer = next((n, m) for n, m in unet.named_modules() if n.endswith("to_q"))
    tensors = {
        f"unet.{name}.lora_A.weight": drawn(2, layer.in_features),
        f"unet.{name}.lora_B.weight": drawn(layer.out_features, 2),
    }
    save_file(tensors, tmp_path / FILE, metadata={"said": "so"})
    made = filter_file(tmp_path / FILE, unet.state_dict(), "cut", 1, tmp_path / "out") / FILE
    with safe_open(made, "pt") as file:
        assert file.metadata() == {"said": "so"}
    found = load_file(made)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in tensors.items()}
    assert torch.linalg.matrix_rank(found[f"unet.{name}.lora_B.weight"] @ found[f"unet.{name}.lora_A.weight"]) == 1
    save_file({"unet.gone.to_q.lora_A.weight": drawn(2, 8)}, tmp_path / FILE)
    with pytest.raises(UserError, match=r"unet\.gone\.to_q"):
        filter_file(tmp_path / FILE, unet.state_dict(), "cut", 1, tmp_path / "out")


def test_shards_part_the_images_whatever_their_order() -> None:
    keys = [f"{i:03x}" for i in range(20)]
    parts = shards.deal(keys, 3, seed=0)
    assert sorted(i for part in parts for i in part) == list(range(20)) and sorted(map(len, parts)) == [6, 7, 7]
    again = shards.deal(keys[::-1], 3, seed=0)
    assert [{keys[::-1][i] for i in part} for part in again] == [{keys[i] for i in part} for part in parts]
    assert shards.deal(keys, 3, seed=1) != parts


def test_an_average_has_the_mean_of_all_weights(tmp_path: Path) -> None:
    models = []
    for k in range(2):
        pipe = tiny_pipeline()
        with torch.no_grad():
            for p in pipe.unet.parameters():
                p.fill_(float(k + 1))
        pipe.save_pretrained(tmp_path / str(k))
        models.append(tmp_path / str(k))
    made = UNet2DConditionModel.from_pretrained(shards.average(models, tmp_path / "mean"), subfolder="unet")
    assert all((p == 1.5).all() for p in made.parameters()) and (tmp_path / "mean" / "model_index.json").is_file()


# --- a whole study of a style ----------------------------------------------------------------------------------------


@pytest.fixture
def study(tiny_base: Path, tmp_path: Path) -> Path:
    """A study of a style on tiny models: gradients of grey, four to train on and sixteen to test by; the others are in red."""

    def images(name: str, colour: Any, numbers: range) -> str:
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for i in numbers:
            grey = Image.linear_gradient("L").resize((32, 32)).rotate(17 * i)
            Image.merge("RGB", [grey.point(lambda v, c=c: v * c) for c in colour]).save(folder / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": f"{name} {i}", "name": f"slope {i}"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        return str(folder)

    raw = {
        "name": "tiny",
        "base": {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": images("grey", (1, 1, 1), range(6)), "resolution": tiny.SIZE,
            "center_crop": True, "train_batch_size": 2, "learning_rate": 1e-3,
        },
        "heldout": {"train_data_dir": images("unseen", (1, 1, 1), range(6, 24))},
        "style": {
            "images": 16, "these": {"train_data_dir": str(tmp_path / "unseen")},
            "others": {"train_data_dir": images("red", (1, 0, 0), range(6, 24))},
        },
        "runs": {"plain": {"objective": "plain"}, "lora": {"objective": "plain", "lora": True, "rank": 2},
                 "prior": {"objective": "plain", "with_prior_preservation": True, "class_data_dir": "class-images", "class_prompt": "a slope",
                           "num_class_images": 2}},
        "seeds": [0], "measure_at": [4], "sample": {"images": 16, "num_inference_steps": 2, "guidance_scale": 2.0},
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


@pytest.mark.slow
def test_a_study_of_a_style_runs_whole_with_the_recipes_apart(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main([str(study), "--out", str(out)])
    filter_lora.main([str(study), "--output_dir", str(out), "--keep", "1"])
    private_distillation.main([str(study), "--output_dir", str(out), "--samples", "24"])
    others = [
        "--samples",
        "12",
        "--others",
        "grey {}",
        "--teacher_steps",
        "2",
        "--teacher_guidance",
        "1.5",
        "--steps",
        "2",
    ]
    private_distillation.main([str(study), "--output_dir", str(out), *others])
    taught = out / "distilled" / "plain_2_distilled_other_things_guidance=1.5_seed=0" / "images" / "metadata.jsonl"
    drawn_for = [json.loads(line)["text"] for line in taught.read_text().splitlines()]
    assert drawn_for and set(drawn_for) <= {f"grey slope {i}" for i in range(6, 24)}  # no caption that was trained
    with pytest.raises(SystemExit):
        private_distillation.main([str(study), "--output_dir", str(out), "--others", "grey"])
    with pytest.raises(SystemExit):  # other captions: not the images that lie there
        private_distillation.main(
            [str(study), "--output_dir", str(out), *["pale {}" if w == "grey {}" else w for w in others]]
        )
    shards.main([str(study), "--output_dir", str(out), "--shards", "2", "--rounds", "2"])
    main([str(study), "--out", str(out), "--results_only"])
    results = json.loads((out / "results.json").read_text())
    assert results["base"]["step"] == 0 and not results["missing"] and (out / "class-images-0" / "00001.png").is_file()
    apart = {run["label"]: [p["step"] for p in run["points"]] for run in results["apart"]}
    assert apart == {
        "lora anchored keep=1": [4],
        "lora cut keep=1": [4],
        "plain distilled": [4],
        "plain 2 distilled, other things guidance=1.5": [2],
        "plain shards=2": [2, 4],
    }
    text = (out / "results.md").read_text()
    assert (
        all(f"**{label}**" in text for label in ("base alone", "plain", "lora", *apart)) and "samples-new.png" in text
    )
    figures = {run["label"]: run["points"][-1]["figures"] for run in [*results["runs"], *results["apart"]]}
    assert figures["plain"]["distance"]["value"] != figures["plain shards=2"]["distance"]["value"]
    assert figures["lora"]["style, real"] == figures["plain"]["style, real"]  # one classifier

    # What a study measured before there was such a figure is filled in, and equals what is measured now.
    steps = [out / "base" / "step-000000", out / "runs" / "plain_seed=0" / "step-000004"]
    before = [(step / "figures.json").read_text() for step in steps]
    for step, text in zip(steps, before, strict=True):
        kept = json.loads(text)
        names = [f"{name}-{feature}" for name in NAMES for feature in FEATURES]
        assert all(kept["figures"].pop(name)["n"] == 16 for name in names)
        (step / "figures.json").write_text(json.dumps(kept))
    closest.main([str(study), "--output_dir", str(out)])
    assert [json.loads((step / "figures.json").read_text()) for step in steps] == [json.loads(text) for text in before]

    # Another machine takes in what this one measured, the base too.
    other = read_plan(study)
    assert merge(other, tmp_path / "elsewhere", out / "results.json") == 3
    assert gather(other, tmp_path / "elsewhere")["base"]["figures"] == results["base"]["figures"]


def test_captions_that_were_trained_judge_no_style(study: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(study.read_text())
    names = tmp_path / "unseen" / "metadata.jsonl"
    names.write_text(names.read_text().replace('"unseen 6"', '"grey 0"'))
    with pytest.raises(UserError, match="1 captions of held-out images are trained by 'plain'"):
        sweep(read_plan(study), tmp_path / "out")
    raw["style"]["concept"] = "colour"
    names.write_text(names.read_text().replace('"grey 0"', '"unseen 6"'))
    study.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match="no column 'colour'"):
        sweep(read_plan(study), tmp_path / "out")
