"""A study on a tiny model: every run and step, the same after a kill, with the denoiser's errors held against their definition."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

from ambient_sd.data.sources import load_rows
from ambient_sd.data.stream import keyed_generator
from ambient_sd.reporting.sheets import contact_sheet
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.utils.errors import UserError
from experiments import sweep as sweeping
from experiments.fresh import fresh_base
from experiments.measures import Reals, error_curves, prompts_of
from experiments.pages import COLUMNS, sample_page, samples_of
from experiments.plan import Plan, Sampling, read_plan
from experiments.sweep import do_run, gather, main, merge, sweep, write_pages


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images of other colours than the training ones."""
    folder = tmp_path_factory.mktemp("study-heldout")
    rows = []
    for i in range(16):
        Image.linear_gradient("L").resize((32, 32)).rotate(23 * i).convert("RGB").save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"slope {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def plan(tiny_base: Path, tiny_images: Path, heldout: Path, tmp_path: Path) -> Plan:
    study = {
        "name": "tiny",
        "base": {
            "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(tiny_images), "resolution": tiny.SIZE,
            "center_crop": True, "train_batch_size": 2, "learning_rate": 1e-3,
        },
        "heldout": {"train_data_dir": str(heldout)},
        "runs": {"plain": {"objective": "plain"}, "ambient": {"objective": "ambient", "ambient_level": 0.8}},
        "seeds": [0],
        "measure_at": [2, 4],
        "sample": {"images": 16, "num_inference_steps": 2, "guidance_scale": 2.0},
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return read_plan(path)


def measured(out: Path) -> dict[str, Any]:
    """Return all measured steps of a study but their seconds."""
    found = {str(p.relative_to(out)): json.loads(p.read_text()) for p in sorted(out.glob("runs/*/step-*/figures.json"))}
    return {
        name: {k: v for k, v in record.items() if not k.startswith("seconds")} | {"samples": (out / name).with_name("samples.png").read_bytes()}
        for name, record in found.items()
    }  # fmt: skip


def timeless(results: dict[str, Any]) -> dict[str, Any]:
    for step in (step for run in results["runs"] for step in run["points"]):
        del step["seconds_trained"], step["seconds_measured"]
    return results


@pytest.mark.slow
def test_a_killed_study_ends_with_the_figures_of_one_that_ran_through(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep(plan, tmp_path / "whole")
    assert [p.name for p in write_pages(plan, tmp_path / "whole")] == ["samples.png"]
    assert [run["label"] for run in whole["runs"]] == ["plain", "ambient"] and not whole["missing"]
    kept = [p.name for p in (tmp_path / "whole").glob("runs/*/model/checkpoint-*")]
    assert kept == ["checkpoint-4"] * 2  # the last: a study that is made longer goes on from it

    out = tmp_path / "killed"
    real, calls = sweeping.measure_samples, iter(range(100))

    def killed(*args: Any, **options: Any) -> Any:
        if next(calls) == 1:  # in the measurement of plain's second step
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(sweeping, "measure_samples", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(plan, out)
    monkeypatch.setattr(sweeping, "measure_samples", real)
    assert len(measured(out)) == 1
    sweep(plan, out)
    assert measured(out) == measured(tmp_path / "whole")
    # Control: the runs themselves differ, so equality above says something.
    steps = list(measured(out).values())
    assert len({record["samples"] for record in steps}) == 4 and len({record["loss"] for record in steps}) == 4

    before = [p.stat().st_mtime_ns for p in sorted(out.glob("runs/*/step-*/figures.json"))]
    sweep(plan, out)
    assert [p.stat().st_mtime_ns for p in sorted(out.glob("runs/*/step-*/figures.json"))] == before

    other = Plan(plan.name, plan.runs, plan.measure_at, Sampling(images=17), plan.heldout, None, plan.text)
    with pytest.raises(UserError, match="other settings: sampl"):
        sweep(other, out)
    with pytest.raises(UserError, match="'none' is not in the study"):
        sweep(plan, out, only=["none"])

    # Another machine takes in what this one measured, and has only the rest to do.
    elsewhere = tmp_path / "elsewhere"
    sweep(dataclasses.replace(plan, measure_at=[2]), tmp_path / "half", only=["ambient"])
    assert merge(plan, elsewhere, tmp_path / "half" / "results.json") == 1
    assert gather(plan, elsewhere)["missing"] == ["plain seed=0", "ambient seed=0"]
    assert merge(plan, elsewhere, out / "results.json") == 3
    assert timeless(gather(plan, elsewhere)) == timeless(gather(plan, out)) and not gather(plan, elsewhere)["missing"]
    assert not write_pages(plan, elsewhere)  # samples stay where they were drawn
    with pytest.raises(UserError, match="'plain seed=0' has other settings"):
        merge(other, tmp_path / "new", out / "results.json")
    for break_it in (
        lambda given: given["runs"][0].pop("points"),
        lambda given: given["runs"][0]["points"][0].update(step="2"),
        lambda given: given["runs"][0]["points"][0].update(step=-2),
        lambda given: given["runs"][0]["points"][0]["figures"].pop("distance"),
        lambda given: given["runs"][0]["points"][0]["figures"]["copied"].update(value="many"),
        lambda given: given["runs"][0]["points"][0]["figures"]["copied"].update(low=float("nan")),
        lambda given: given["runs"][0]["points"][0]["errors"]["heldout"]["mean"].pop(),
        lambda given: given["runs"][0]["points"][0]["errors"].update(training=3),
        lambda given: given.update(runs={"plain": 1}),
        lambda given: given.update(plan=5),
        lambda given: given["runs"][1]["points"][1].update(loss=float("nan")),
        lambda given: given["runs"][0].update(label="another"),
        lambda given: given.update(runs=[]),
    ):
        given = json.loads((out / "results.json").read_text())
        break_it(given)
        (tmp_path / "broken.json").write_text(json.dumps(given))
        with pytest.raises(UserError, match="cannot be merged"):
            merge(plan, tmp_path / "new", tmp_path / "broken.json")
    for text in ("", "[]", '{"runs": []}', "\x00", "[" * 200_000):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(UserError, match=r"must be the results\.json of a study"):
            merge(plan, tmp_path / "new", tmp_path / "broken.json")
    assert not (tmp_path / "new").exists()
    given = json.loads((out / "results.json").read_text())
    given["runs"][0]["points"][0]["step"] = 10**300  # a step that this study does not measure is left alone
    (tmp_path / "broken.json").write_text(json.dumps(given))
    assert merge(plan, tmp_path / "new", tmp_path / "broken.json") == 3

    # A cut measurement's samples do not belong to figures of elsewhere.
    shutil.copy(
        out / "runs/plain_seed=0/step-000004/samples.png", elsewhere / "runs/plain_seed=0/step-000004/samples.png"
    )
    assert not write_pages(plan, elsewhere)
    # Figures of other settings do not pass for this plan's, nor do damaged ones.
    with pytest.raises(UserError, match="other settings: sampl"):
        gather(other, out)
    for name, text in (
        ("step-000002/figures.json", '{"step": 2'),
        ("step-000002/figures.json", "[]"),
        ("settings.json", ""),
    ):
        path = elsewhere / "runs/plain_seed=0" / name
        whole_text = path.read_text()
        path.write_text(text)
        with pytest.raises(UserError, match=r"is damaged|cannot be read"):
            gather(plan, elsewhere)
        path.write_text(whole_text)
    (out / "runs/plain_seed=0/step-000004/samples.png").write_bytes(b"none")
    with pytest.raises(UserError, match="cannot be shown"):
        write_pages(plan, out)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_goes_out_of_bounds_costs_no_other_run(
    plan: Plan, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    text = yaml.safe_load(plan.text) | {"runs": {
        "wild": {"objective": "plain", "learning_rate": 1e30, "max_grad_norm": 1e30}, "plain": {"objective": "plain"},
    }}  # fmt: skip
    study, out = tmp_path / "wild.yaml", tmp_path / "out"
    study.write_text(yaml.safe_dump(text, sort_keys=False))
    if workers == 1:
        with pytest.raises(SystemExit) as stopped:
            main([str(study), "--out", str(out)])
        said = capsys.readouterr()
        assert stopped.value.code == 2 and "wild seed=0 among them; the loss is NaN or Inf" in said.err
        assert "plain seed=0: copies" in said.out and (out / "results.md").exists()
        results = json.loads((out / "results.json").read_text())
        assert "failed" not in results  # a message may hold a local path
    else:
        results = sweep(read_plan(study), out, workers=2)
        assert list(results["failed"]) == ["wild seed=0"]
    assert [run["label"] for run in results["runs"]] == ["plain"] and results["missing"] == ["wild seed=0"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # images of what is left
def test_figures_that_are_no_numbers_end_their_run_and_no_other(plan: Plan, tmp_path: Path) -> None:
    # The loss of the only step is that of the base, which is finite; what the step leaves behind is not.
    text = yaml.safe_load(plan.text) | {"measure_at": [1], "runs": {
        "wild": {"objective": "plain", "learning_rate": 1e30}, "plain": {"objective": "plain"},
    }}  # fmt: skip
    (study := tmp_path / "wild.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    results = sweep(read_plan(study), tmp_path / "out")
    assert "figures at step 1 that are no finite numbers" in results["failed"]["wild seed=0"]
    assert [run["label"] for run in results["runs"]] == ["plain"] and results["missing"] == ["wild seed=0"]
    assert not list((tmp_path / "out").glob("runs/wild*/step-*/figures.json"))


def test_wrong_held_out_images_are_found_before_anything_is_trained_or_claimed(plan: Plan, tmp_path: Path) -> None:
    for heldout, says in (
        ({}, "are training images of 'plain'"), ({"dataset_split": "none"}, "no column 'split'"), ({"colour": "red"}, "entries are"),
        ({"train_data_dir": str(tmp_path / "none")}, "none"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            sweep(dataclasses.replace(plan, heldout=heldout), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="it must be a folder"):
        sweep(plan, tmp_path / "file")


def test_a_sample_page_shows_what_was_drawn_over_its_nearest_training_image_and_frames_copies(
    tiny_images: Path, tmp_path: Path
) -> None:
    training = load_rows(tiny_images)
    size, step = tiny.SIZE, tmp_path / "step-000004"
    step.mkdir()
    known = [
        training[i].image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS) for i in range(len(training))
    ]
    drawn = [*known, *(Image.new("RGB", (size, size), (9 * i, 0, 255 - 9 * i)) for i in range(25 - len(known)))]
    contact_sheet(drawn, COLUMNS).save(step / "samples.png")
    copies, originals = [i < len(known) for i in range(25)], [i % len(known) for i in range(25)]
    ratios = [0.0 if copy else 0.9 for copy in copies]
    (step / "figures.json").write_text(json.dumps({"ratios": ratios, "copies": copies, "originals": originals}))
    assert [p.tobytes() for p in samples_of(step, size)[0]] == [p.tobytes() for p in drawn]

    page = sample_page([("plain", step)], training, size, shown=25)
    for i in range(25):
        x = 130 + i * (size + 4)
        above, below = (page.crop((x, top, x + size, top + size)).tobytes() for top in (4, 4 + size))
        framed = page.getpixel((x - 2, 4 + size)) == (217, 45, 32)
        assert above == drawn[i].tobytes() and framed == (i < len(known))
        assert (below == above) == (i < len(known))  # an exact copy lies over its original

    # Where the decision was kept, its copies are framed, over the images that explain them.
    copies, originals = [i % 2 == 0 for i in range(25)], [i % len(known) for i in range(25)]
    (step / "figures.json").write_text(json.dumps({"ratios": [0.9] * 25, "copies": copies, "originals": originals}))
    page = sample_page([("plain", step)], training, size, shown=25)
    for i in range(25):
        x = 130 + i * (size + 4)
        assert (page.getpixel((x - 2, 4 + size)) == (217, 45, 32)) == copies[i]
        assert page.crop((x, 4 + size, x + size, 4 + 2 * size)).tobytes() == known[originals[i]].tobytes()


def test_a_run_that_another_process_holds_is_left_alone(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / plan.runs[0].folder
    folder.mkdir(parents=True)
    with sweeping._locked(folder) as mine:
        assert mine and do_run(plan, plan.runs[0], tmp_path, 1).endswith("another process is at it")
    with sweeping._locked(folder) as mine:
        assert mine  # the lock goes with its holder


def test_an_error_is_the_distance_of_the_denoised_image_from_the_clean_one(tiny_base: Path, tiny_images: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    images = [Image.open(p).convert("RGB") for p in sorted(tiny_images.glob("*.png"))][:3]
    captions = ["one", "two", "three"]
    reals = Reals({}, {}, images, captions, images[:1], captions[:1], [])
    curves = error_curves(pipe, reals, Sampling(), tiny.SIZE, 5, levels=[0.5, 2.0, 1e6])
    assert len(curves["training"]["level"]) == 2  # the schedule ends below 1e6

    # By hand, for the one held-out image: v-prediction, x0 = alpha x_t - sigma v.
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    t = round(schedule.timestep(2.0))
    alpha, sigma = (float(v) for v in schedule.coefficients(torch.tensor(t)))
    with torch.no_grad():
        x = pipe.image_processor.preprocess(images[0], height=tiny.SIZE, width=tiny.SIZE)
        x0 = pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor
        x_t = alpha * x0 + sigma * torch.randn(x0.shape[1:], generator=keyed_generator(5, "study error 2.0", 0))
        v = pipe.unet(x_t, t, pipe.encode_prompt("one", "cpu", 1, False)[0]).sample
    assert curves["heldout"]["mean"][1] == pytest.approx(
        float((alpha * x_t - sigma * v - x0).square().mean()), rel=1e-4
    )


def test_prompts_are_the_captions_in_turn_or_a_draw_of_them(tiny_images: Path) -> None:
    reals = Reals({}, {}, [], [f"caption {i}" for i in range(20)], [], [], [])
    assert prompts_of(reals, Sampling(images=50), 0)[:21] == [*reals.captions, "caption 0"]
    few = prompts_of(reals, Sampling(images=16), 0)
    assert len(set(few)) == 16 and few != prompts_of(reals, Sampling(images=16), 1)
    assert prompts_of(reals, Sampling(images=16, captions="none"), 0) == [""] * 16


def test_a_fresh_base_has_random_weights_by_seed_and_everything_else_of_its_base(
    tiny_base: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    one, again, other = (
        fresh_base(tiny_base, {"layers_per_block": 2}, s, tmp_path / str(i)) for i, s in enumerate((0, 0, 1))
    )
    weights = [load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (one, again, other)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(weights[0]["conv_in.weight"], weights[2]["conv_in.weight"])
    assert len(weights[0]) > len(load_file(tiny_base / "unet" / "diffusion_pytorch_model.safetensors"))
    for part in ("vae", "text_encoder"):
        for path in (tiny_base / part).iterdir():
            assert (one / part / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="colours, layers"):
        fresh_base(tiny_base, {"layers": 2, "colours": 3}, 0, tmp_path / "x")
    with pytest.raises(UserError, match="from_scratch"):
        fresh_base(tiny_base, {"block_out_channels": [16]}, 0, tmp_path / "x")
    shutil.rmtree(one)
    with pytest.raises(UserError, match="local folder"):
        fresh_base("owner/model", {}, 0, tmp_path / "x")
