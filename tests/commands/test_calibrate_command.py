"""`ambient-sd calibrate`: thresholds from known scores, and the command from prompts to a guard that uses its file."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ambient_sd import AmbientSDPipeline, MemorizationGuard
from ambient_sd.cli import main
from ambient_sd.commands.calibrate import CalibrateSettings
from ambient_sd.commands.calibrate import work as calibrate
from ambient_sd.commands.calibrate.work import SCORES_NAME, thresholds
from ambient_sd.commands.sample import work as sample
from ambient_sd.guard.anisotropy import anisotropy, screen
from ambient_sd.guard.calibration import FILE_NAME, FILE_NAMES, Calibration
from ambient_sd.sampling import SamplingConfig, image_seed, load_pipeline
from ambient_sd.utils.errors import UserError

ORDINARY = [f"a cat {i}" for i in range(6)]
# Prompts by which the tiny network's guidance is longest: what it would have memorized.
PULLING = ["w w w w w w", "xxxxxxxxxxxxxxxxxxxx", "0123456789", "Z Z Z Z", "a square of light"]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A model folder of one's own: the threshold is written into it."""
    return shutil.copytree(tiny_base, tmp_path / "model")


def settings(base: Path, ordinary: list[str] = ORDINARY, **changes: Any) -> CalibrateSettings:
    config = {"model": str(base), "num_inference_steps": 7, "batch_size": 5, "device": "cpu"}
    config |= {name: changes.pop(name) for name in list(changes) if name in SamplingConfig.__dataclass_fields__}
    return CalibrateSettings(SamplingConfig(**config), ordinary, **{"num_images_per_prompt": 2, "fpr": 0.2, **changes})


def curves(prompts: int, images: int, steps: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(prompts, images, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 10 + shift + noise


def test_rate_asked_is_kept_at_every_number_of_steps_and_images() -> None:
    ordinary, memorized = curves(200, 4, 12), curves(30, 4, 12, shift=1.5, seed=1)
    entries = thresholds(ordinary, memorized, 0.05)
    assert [(e.steps, e.images_per_prompt) for e in entries] == [(1, 1), (1, 4), (5, 1), (5, 4), ("all", 1), ("all", 4)]
    for entry in entries:
        upto = 12 if entry.steps == "all" else entry.steps
        scores = ordinary[:, :, :upto].mean(dim=2)
        scores = scores.flatten() if entry.images_per_prompt == 1 else scores.mean(dim=1)
        assert float((scores >= entry.value).double().mean()) == entry.rate.value == 0.05
        assert entry.rate.low < 0.05 < entry.rate.high
    # More evaluations and images average the noise away: the same memorized prompts are told apart better.
    assert entries[0].auc is not None and entries[-1].auc is not None and entries[0].tpr is not None
    assert entries[0].auc.value < 0.9 < entries[-1].auc.value and entries[0].tpr.value < 0.5
    assert entries[0].value > entries[-1].value


def test_thresholds_hold_on_ordinary_prompts_that_were_not_seen() -> None:
    (entry, *_) = thresholds(curves(400, 1, 1), torch.empty(0, 1, 1), 0.05)
    fresh = curves(20_000, 1, 1, seed=9).flatten()
    assert 0.02 < float((fresh >= entry.value).double().mean()) < 0.09
    assert entry.auc is None and entry.tpr is None


def test_memorized_prompts_do_not_move_the_threshold() -> None:
    ordinary = curves(100, 2, 6)
    assert [e.value for e in thresholds(ordinary, torch.empty(0, 2, 6), 0.1)] == [
        e.value for e in thresholds(ordinary, curves(9, 2, 6, 3.0), 0.1)
    ]


def test_command_writes_a_file_that_says_what_it_was_measured_on(base: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "ordinary.txt").write_text("\n".join(ORDINARY))
    (tmp_path / "memorized.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PULLING))
    main(["calibrate", str(base), "--ordinary", str(tmp_path / "ordinary.txt"), "--memorized", str(tmp_path / "memorized.jsonl"),
          "--num_inference_steps", "7", "--generations", "2", "--fpr", "0.2", "--scheduler", "dpm++", "--seed", "3",
          "--device", "cpu"])  # fmt: skip
    said = capsys.readouterr().out
    assert "calibrated: FPR 20 % on 6 ordinary prompts" in said and "all 7" in said and "[" in said
    found = Calibration.load(base)
    assert found.sampling.sampler == "DPMSolverMultistepScheduler" and found.sampling.num_inference_steps == 7
    assert (found.ordinary, found.memorized, found.seed, found.rate_asked) == (6, 5, 3, 0.2)
    assert "AUC 1.00 [0.57, 1.00] on 5 memorized ones" in said and all(e.tells for e in found.entries)
    assert found.versions["torch"] == torch.__version__ and found.sampling.prediction_type == "v_prediction"
    assert len(found.entries) == 6 and all(e.auc is not None for e in found.entries)
    for path in (base / FILE_NAME, base / SCORES_NAME):
        assert str(tmp_path) not in path.read_text()
    assert "cat" not in (base / SCORES_NAME).read_text()


def test_a_run_that_was_cut_goes_on_with_the_same_result(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    straight, _ = calibrate.calibrate(settings(base, output_dir=tmp_path / "straight"))
    calls = []

    call = StableDiffusionPipeline.__call__

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", stops)
    chosen = settings(base, output_dir=tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(chosen)
    scores = tmp_path / "cut" / SCORES_NAME
    assert len(scores.read_text().splitlines()) == 1 + 5 and not (tmp_path / "cut" / FILE_NAME).exists()
    # Killed while it wrote: the last line is torn.
    scores.write_text(scores.read_text()[:-20])
    resumed, _ = calibrate.calibrate(chosen)
    assert len(calls) == 3 + 1  # prompts 4 and 5, two images each
    for a, b in zip(straight.entries, resumed.entries, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-4) and a.rate.value == b.rate.value
    # Another rate is another reading of the same scores.
    other, _ = calibrate.calibrate(settings(base, output_dir=tmp_path / "cut", fpr=0.4))
    assert len(calls) == 4 and other.entries[-1].value < resumed.entries[-1].value


def test_scores_of_other_settings_are_refused(base: Path, tmp_path: Path) -> None:
    calibrate.calibrate(settings(base, ORDINARY[:2]))
    before = (base / SCORES_NAME).read_bytes()
    for change, named in (
        ({"seed": 1}, "seed was 0"),
        ({"num_images_per_prompt": 3}, "num_images_per_prompt"),
        ({"memorized": ["b"]}, "prompts.memorized changed"),
    ):
        with pytest.raises(UserError, match=named):
            calibrate.calibrate(settings(base, ORDINARY[:2], **change))
    assert (base / SCORES_NAME).read_bytes() == before
    (base / SCORES_NAME).write_text("{}\n")
    with pytest.raises(UserError, match="cannot be read"):
        calibrate.calibrate(settings(base, ORDINARY[:2]))


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--fpr", "0"], "fpr is 0"), (["--fpr", "nan"], "fpr is nan"), (["--generations", "0"], "num_images_per_prompt is 0"), (["--out", "p.txt"], "output_dir is"),
     (["--memorized", "p.txt"], "stands in both"), (["--guidance_scale", "nan"], "guidance_scale")],
)  # fmt: skip
def test_mistakes_are_one_line(
    base: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, words: list[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\nb\n")
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", str(base), "--ordinary", "p.txt", *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and named in error
    assert not (base / FILE_NAME).exists() and not (base / SCORES_NAME).exists()


def test_too_few_prompts_for_the_rate_are_said(base: Path) -> None:
    found, _ = calibrate.calibrate(settings(base, ORDINARY[:2], fpr=0.01))
    assert "cannot show a rate of 1 %" in calibrate.table(found) and found.entries[0].rate.value == 0
    assert found.entries[0].rate.high > 0.5  # two prompts say next to nothing


def command(base: Path, tmp_path: Path, memorized: list[str], *words: str) -> None:
    (tmp_path / "o.txt").write_text("\n".join(ORDINARY))
    given = []
    if memorized:
        (tmp_path / "m.txt").write_text("\n".join(memorized))
        given = ["--memorized", str(tmp_path / "m.txt")]
    main(["calibrate", str(base), "--ordinary", str(tmp_path / "o.txt"), *given, "--num_inference_steps", "2", "--generations", "1",
          "--fpr", "0.2", "--device", "cpu", *words])  # fmt: skip


@pytest.mark.parametrize("detector", ["norm", "anisotropy"])
def test_a_detector_that_cannot_tell_is_useless_and_leaves_no_threshold(
    base: Path, tmp_path: Path, capsys: Any, detector: Any
) -> None:
    """Prompts like the ordinary ones, and prompts that score lower: neither shows that memorized ones score higher."""
    path = base / FILE_NAMES[detector]
    alike = [f"a cat {i}" for i in (6, 7, 8, 9, 10)]
    for number, memorized in enumerate((alike, ["a", "b", "c", "d", "e"])):
        path.write_text("thresholds of an earlier run")
        with pytest.raises(SystemExit) as stopped:
            command(base, tmp_path, memorized, "--detector", detector, "--seed", str(number))
        said = capsys.readouterr()
        assert stopped.value.code == 1 and said.err.splitlines()[-1].startswith(
            "ambient-sd: useless: the detector does not tell"
        )
        assert "reaches 0.5" in said.err and "no threshold is written" in said.err and not path.exists()
        (base / calibrate.SCORES_NAMES[detector]).unlink()
    # Control: prompts that pull.
    command(base, tmp_path, PULLING, "--detector", detector)
    assert path.exists() and "useless" not in capsys.readouterr().out


def test_too_few_memorized_prompts_to_tell_are_said(base: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(base, tmp_path, PULLING[:3])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "3 memorized prompts cannot show" in said and not (base / FILE_NAME).exists()


def test_without_memorized_prompts_nothing_shows_that_it_works(base: Path, tmp_path: Path, capsys: Any) -> None:
    command(base, tmp_path, [])
    said = capsys.readouterr().out
    assert (
        "AUC unknown: without memorized prompts nothing shows" in said
        and "AUC unknown: nothing shows that it works" in said
    )
    assert all(entry["auc"] is None for entry in json.loads((base / FILE_NAME).read_text())["entries"])
    config = settings(base, num_inference_steps=2).sampling
    sample.sample(sample.SampleSettings(config, tmp_path / "out", ["a cat"]))
    assert "AUC unknown: nothing shows that it works" in (tmp_path / "out" / "index.html").read_text()


def test_a_threshold_of_zero_or_of_no_number_is_never_written(base: Path, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match="every ordinary score is 0"):
        calibrate.calibrate(settings(base, ["", " "], num_inference_steps=2))
    (base / SCORES_NAME).unlink()
    pipe = load_pipeline(settings(base).sampling)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("inf"))
    monkeypatch.setattr(calibrate, "load_pipeline", lambda _: pipe)
    with pytest.raises(UserError, match="score of ordinary prompt 1 is no finite number"):
        calibrate.calibrate(settings(base, num_inference_steps=2))
    assert not (base / FILE_NAME).exists() and len((base / SCORES_NAME).read_text().splitlines()) == 1


def test_zero_terminal_snr_is_calibrated_on_the_steps_with_a_signal(base: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(settings(base).sampling)
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    pipe.save_pretrained(base)
    made = calibrate.CalibrateSettings(settings(base).sampling, ORDINARY, PULLING, 0.2, 1)
    found, path = calibrate.calibrate(made)
    assert path is not None and found.evaluations == 6 and found.entries[0].steps == 1
    assert all(entry.value > 0.01 and entry.rate.value <= 0.2 for entry in found.entries)
    pipe = AmbientSDPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    flags = [pipe(text, num_inference_steps=7, output_type="latent", generator=torch.Generator().manual_seed(0)).memorization[0]
             for text in ("w w w w w w", "a")]  # fmt: skip
    assert [image.flagged for image in flags] == [True, False] and flags[0].threshold == found.threshold(7, 1)
    with MemorizationGuard(pipe, threshold=found, stop_after=1) as guard:
        early = [guard.decide(text, num_inference_steps=7)[0] for text in ("w w w w w w", "a")]
    assert [image.flagged for image in early] == [True, False] and early[0].threshold == found.threshold(1, 1)


def test_ordinary_prompts_are_not_flagged_because_of_a_policy(base: Path, tmp_path: Path) -> None:
    config = settings(base, num_inference_steps=7).sampling
    calibrate.calibrate(calibrate.CalibrateSettings(config, ORDINARY, [], 0.01, 1))
    for policy in ("static_transition", "opposite_guidance", "gaussian_embedding_noise:std=5"):
        rows = sample.sample(sample.SampleSettings(config, tmp_path / policy[:6], ORDINARY, policy=policy))
        assert [row["flagged"] for row in rows] == [False] * 6 and {row["decision_steps"] for row in rows} == {1}
        assert all(row["decision_score"] != pytest.approx(row["score"]) for row in rows)
    assert "unmitigated first step" in (tmp_path / policy[:6] / "index.html").read_text()
    # A number is one of a whole run, which there is not.
    (row,) = sample.sample(
        sample.SampleSettings(config, tmp_path / "n", ["a cat"], policy="static_transition", threshold=1e-9)
    )
    assert row["flagged"] is None and "not known" in (tmp_path / "n" / "index.html").read_text()


def call(pipe: Any, **changes: Any) -> Any:
    options = {"num_inference_steps": 7, "generator": torch.Generator().manual_seed(0), "output_type": "pt"} | changes
    return pipe("a cat", **options).memorization


def test_the_pipeline_finds_its_threshold_and_uses_it_where_it_fits(base: Path, tmp_path: Path, caplog: Any) -> None:
    found, _ = calibrate.calibrate(settings(base))
    pipe = AmbientSDPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.calibration == found
    (report,) = call(pipe)
    assert report.threshold == found.threshold(7, 1) and report.threshold_origin == found.origin
    assert report.flagged is (report.score >= report.threshold)
    # With a guard of one's own, the same object.
    with MemorizationGuard(pipe, threshold=found) as guard:
        call(pipe)
    assert guard.report[0].threshold == report.threshold
    for change in (
        {"num_inference_steps": 3},
        {"guidance_scale": 2.0},
        {"negative_prompt": "bad"},
        {"height": 64, "width": 64},
    ):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            (report,) = call(pipe, **change)
        assert report.flagged is None and "not used" in caplog.text
    torch.nn.init.zeros_(pipe.unet.conv_out.bias)
    pipe.save_pretrained(tmp_path / "other")
    shutil.copy(base / FILE_NAME, tmp_path / "other")
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert AmbientSDPipeline.from_pretrained(tmp_path / "other").calibration is None
    assert "its weights are others" in caplog.text


def test_sample_uses_the_calibrated_threshold_and_says_where_it_does_not_fit(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    found, _ = calibrate.calibrate(settings(base))
    config = settings(base).sampling
    (row,) = sample.sample(sample.SampleSettings(config, tmp_path / "a", ["a cat"]))
    assert row["threshold"] == found.threshold(7, 1) and row["threshold_origin"] == found.origin
    other = SamplingConfig(str(base), num_inference_steps=2, device="cpu")
    (row,) = sample.sample(sample.SampleSettings(other, tmp_path / "b", ["a cat"]))
    assert row["threshold"] is None and "num_inference_steps 7 was calibrated, not 2" in capsys.readouterr().out


def test_anisotropy_is_calibrated_from_the_same_noise_without_sampling_and_asked_before_it(
    base: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "o.txt").write_text("\n".join(ORDINARY))
    (tmp_path / "m.txt").write_text("\n".join(PULLING))
    monkeypatch.setattr(calibrate, "generate", None)  # nothing is sampled
    main(["calibrate", str(base), "--detector", "anisotropy", "--ordinary", str(tmp_path / "o.txt"), "--memorized", str(tmp_path / "m.txt"),
          "--num_inference_steps", "7", "--generations", "2", "--fpr", "0.2", "--device", "cpu"])  # fmt: skip
    said = capsys.readouterr().out
    assert "cannot use this threshold while sampling" in said and "alignment" in said
    assert sorted(p.name for p in base.glob("memorization*")) == ["memorization_scores_anisotropy.jsonl",
                                                                   FILE_NAMES["anisotropy"]]  # fmt: skip
    pipe = load_pipeline(settings(base).sampling)
    found = Calibration.load(base, pipe, detector="anisotropy")
    terms = found.anisotropy
    assert terms is not None and [(e.steps, e.images_per_prompt) for e in found.entries] == [(0, 1), (0, 2)]
    assert found.entries[0].auc is not None and (found.ordinary, found.memorized) == (6, 5)
    # The terms again, from the noise of the same addresses, and the weights: each term over its spread.
    generators = [torch.Generator().manual_seed(image_seed(0, i, k)) for i in range(6) for k in range(2)]
    texts = [ORDINARY[i] for i in range(6) for _ in range(2)]
    each = anisotropy(pipe, texts, generator=generators, num_inference_steps=7)
    norms, angles = torch.tensor([[a.norm, a.alignment] for a in each], dtype=torch.float64).T
    assert terms.norm_weight * float(norms.std()) == pytest.approx(1, rel=1e-3)
    assert terms.alignment_weight * float(angles.std()) == pytest.approx(1, rel=1e-3)
    scores = (norms / norms.std() + angles / angles.std()).view(6, 2)
    for entry, flagged in zip(found.entries, (scores.flatten(), scores.mean(1)), strict=True):
        # The threshold lies on a score itself, which other batches round otherwise.
        assert entry.rate.value == float((flagged >= entry.value * (1 - 1e-4)).double().mean()) <= 0.2
    # Asked before sampling.
    for noises in (1, 2):
        screened = screen(pipe, ["a cat", ""], found, noises=noises, generator=torch.Generator().manual_seed(1))
        (again,) = [screen(pipe, ["a cat", ""], found, noises=noises, generator=torch.Generator().manual_seed(1))]
        (alone,) = screen(pipe, "a cat", found, noises=noises, generator=torch.Generator().manual_seed(1))
        assert alone.prompt == "a cat" and screen(pipe, [], found) == []
        assert screened == again and [s.prompt for s in screened] == ["a cat", ""]
        assert screened[0].threshold == found.threshold(0, noises)
        assert all(s.flagged is (s.score >= s.threshold) for s in screened) and screened[1].score < screened[0].score
    with pytest.raises(UserError, match="no threshold for 0 steps and 3 images"):
        screen(pipe, ["a cat"], found, noises=3)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(UserError, match="timestep_spacing"):
        screen(pipe, ["a cat"], found)


def test_thresholds_of_the_two_detectors_are_not_mistaken_for_one_another(base: Path, tmp_path: Path) -> None:
    norm, _ = calibrate.calibrate(settings(base, ORDINARY[:2]))
    other, path = calibrate.calibrate(settings(base, ORDINARY[:2], detector="anisotropy"))
    pipe = AmbientSDPipeline.from_pretrained(base)
    assert pipe.calibration == norm == Calibration.load(base) and norm.detector == "norm"
    assert Calibration.load(base, detector="anisotropy") == other and other.detector == "anisotropy"
    with pytest.raises(UserError, match="calibrated for the detector anisotropy; while sampling the guard"):
        MemorizationGuard(pipe, threshold=other)
    with pytest.raises(UserError, match="calibration is of the norm"):
        screen(pipe, ["a"], norm)
    with pytest.raises(UserError, match="holds thresholds of the detector anisotropy; norm is asked for"):
        Calibration.load(path)
    with pytest.raises(UserError, match="has no spread"):
        calibrate.calibrate(
            settings(base, ["a"], detector="anisotropy", num_images_per_prompt=1, output_dir=tmp_path / "one")
        )
    with pytest.raises(UserError, match="detector is 'both'"):
        calibrate.calibrate(settings(base, ["a"], detector="both", output_dir=tmp_path / "two"))
    values = json.loads(path.read_text())
    values["anisotropy"]["norm_weight"] = float("inf")
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="cannot be read"):
        Calibration.load(base, detector="anisotropy")


def test_scores_lie_beside_an_adapter_where_one_is_calibrated(base: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="cannot be loaded"):
        calibrate.calibrate(settings(base, lora_weights=str(lora)))
    assert json.dumps([p.name for p in lora.iterdir()]) == '["pytorch_lora_weights.safetensors"]'


def test_scores_of_raw_outputs_are_calibrated_apart_and_do_not_mix(base: Path) -> None:
    raw, path = calibrate.calibrate(settings(base, score_space="output"))
    assert raw.score_space == "output" and json.loads(path.read_text())["score_space"] == "output"
    with pytest.raises(UserError, match="scores of other settings \\(score_space"):
        calibrate.calibrate(settings(base))
    (base / SCORES_NAME).unlink()
    noise, _ = calibrate.calibrate(settings(base))
    assert noise.score_space == "noise"
    first = [next(e.value for e in found.entries if e.steps == 1) for found in (raw, noise)]
    assert first[0] > 2 * first[1]  # a v-prediction model: alpha_t is far below 1 at the first step
    with pytest.raises(UserError, match="score_space is 'output' with the detector anisotropy"):
        calibrate.calibrate(settings(base, score_space="output", detector="anisotropy"))
