"""Samples without loss (Wen's threshold, AGC) and changed captions (MC, GN, RC, RT, CWR): each against its definition, neutral
where it must be, resumed to the bit, beside the cache, and the same on two processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from launching import launch
from PIL import Image
from safetensors.torch import load_file, save_file

from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.data.stream import SampleStream
from ambient_sd.guard.scores import guidance_norm, noise_factor
from ambient_sd.training import adapters, checkpoints
from ambient_sd.training.caption_augmentation import CaptionAugmentation
from ambient_sd.training.config import TrainConfig, make_parser
from ambient_sd.training.dropping import BANK_NAME, Dropping, LossBank
from ambient_sd.training.loop import TrainingBatch, run
from ambient_sd.utils.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
Settings = Callable[..., TrainConfig]
HALF = {"memorization_threshold": 1.4}  # about half of the scores of `few_steps_base` are above it
AGC = {"agc": 1.0}


@pytest.fixture(scope="module")
def few_steps_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with four timesteps, s = 0.03, 0.29, 0.71, 1.66: each is met at every step, so AGC's means soon get somewhere."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, num_train_timesteps=4, beta_end=0.6)
    folder = tmp_path_factory.mktemp("few-steps")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def several_captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.tiny_folder(tmp_path_factory.mktemp("several"), count=4)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows[:3]:
        row["text"] = [row["text"], f"{row['text']} again", f"another {row['text']}"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def settings(few_steps_base: Path, tiny_images: Path, tmp_path: Path) -> Settings:
    def make(name: str = "out", **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(few_steps_base), "train_data_dir": str(tiny_images), "resolution": 32,
            "train_batch_size": 8, "max_train_steps": 10, "report_to": "none", "output_dir": str(tmp_path / name),
            "learning_rate": 3e-3, "ambient_level": 0.5,
        }  # fmt: skip
        if values.get("objective") == "plain":
            del defaults["ambient_level"]
        return TrainConfig(**{**defaults, **values})

    return make


class Stop(Exception):
    """The power goes out."""


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / (adapters.WEIGHTS_NAME if config.lora else UNET))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def records(config: TrainConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.output_dir) / "losses.jsonl").read_text().splitlines()]


def scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


# Samples without loss


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_sample_is_dropped_where_its_norm_in_units_of_noise_reaches_the_threshold(prediction_type: str) -> None:
    t = torch.tensor([100, 100, 900, 900])
    alpha = scheduler(prediction_type).alphas_cumprod[t].double().sqrt()
    factor = {"epsilon": alpha * 0 + 1, "v_prediction": alpha, "sample": alpha / (1 - alpha**2).sqrt()}[prediction_type]
    # || cond - uncond || of two entries of size d is d sqrt(2): by design 0.9 and 1.1 of the threshold.
    wanted = torch.tensor([0.9, 1.1, 0.9, 1.1], dtype=torch.float64) * 3.0
    size = (wanted / factor / 2**0.5).float().reshape(4, 1, 1, 1)
    uncond = torch.randn(4, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    drop = Dropping(3.0, None, scheduler=scheduler(prediction_type), timesteps=1000, checkpoint=None)
    keep = drop.keep(torch.ones(4), uncond + size, uncond, t)
    assert keep.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert drop.counts().tolist() == [2]
    if prediction_type != "epsilon":
        raw = guidance_norm(cond=uncond + size, uncond=uncond) >= 3.0
        assert (~raw).float().tolist() != keep.tolist(), "negative control: the raw norm is another rule"


def test_agc_drops_below_half_the_running_mean_of_the_timestep_and_the_mean_takes_in_every_sample() -> None:
    drop = Dropping(None, 0.5, scheduler=None, timesteps=4, checkpoint=None)
    t, output = torch.tensor([1, 1, 3]), torch.zeros(3, 1, 1, 1)
    assert drop.keep(torch.tensor([1.0, 0.1, 5.0]), output, None, t).tolist() == [1, 1, 1], "means begin at zero"
    drop.end_step(lambda x: x, torch.device("cpu"))
    assert drop.bank is not None
    m1, m3 = 0.8 * (0.2 * 1.0) + 0.2 * 0.1, 0.2 * 5.0
    assert drop.bank.mean.tolist() == pytest.approx([0.0, m1, 0.0, m3], rel=1e-6)
    error = torch.tensor([m1 / 2 * 1.01, m1 / 2 * 0.99, m3 / 2 * 0.99])
    assert drop.keep(error, output, None, t).tolist() == [1, 0, 0]
    assert drop.counts().tolist() == [2], "of both passes"
    drop.end_step(lambda x: x, torch.device("cpu"))
    assert float(drop.bank.mean[3]) == pytest.approx(0.8 * m3 + 0.2 * m3 / 2 * 0.99), "dropped ones count in the mean"


def test_the_means_take_samples_in_the_order_of_the_run_whatever_process_had_them() -> None:
    errors = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0))  # (pass, process, sample)
    t = torch.zeros(3, dtype=torch.long)
    both = [Dropping(None, 0.5, scheduler=None, timesteps=1, checkpoint=None) for _ in range(2)]
    for n, drop in enumerate(both):
        for part in range(2):
            drop.keep(errors[part, n], torch.zeros(3, 1, 1, 1), None, t)
    seen = [torch.stack([torch.stack([torch.zeros(3), errors[part, n]]) for part in range(2)]) for n in range(2)]
    wanted = LossBank(1, 0.5)
    wanted.take_in([0] * 12, errors.flatten().tolist())
    for drop in both:
        drop.end_step(lambda mine: torch.cat(seen), torch.device("cpu"))
        assert drop.bank is not None and torch.equal(drop.bank.mean, wanted.mean)
    wrong = LossBank(1, 0.5)
    wrong.take_in([0] * 12, errors.transpose(0, 1).flatten().tolist())
    assert not torch.equal(wrong.mean, wanted.mean), "negative control: order matters"


@pytest.mark.parametrize("objective", ["ambient", *(pytest.param(o, marks=pytest.mark.slow) for o in ("plain", "gap"))])
def test_a_limit_that_nothing_reaches_leaves_the_run_as_it_is_bit_for_bit(settings: Settings, objective: str) -> None:
    values: dict[str, Any] = {"objective": objective, **({"gap_upper": 2.0} if objective == "gap" else {})}
    without = settings("without", **values)
    never = settings("never", memorization_threshold=1e30, agc=1e-30, **values)
    acting = settings("acting", **HALF, **AGC, **values)
    losses = [run(c, progress=False).losses for c in (without, never, acting)]
    assert losses[0] == losses[1] and equal(weights(without), weights(never))
    assert [(r["threshold_dropped"], r["agc_dropped"]) for r in records(never)] == [(0, 0)] * 10
    assert "agc_dropped" not in records(without)[0]
    assert losses[0] != losses[2] and not equal(weights(without), weights(acting))
    assert any(0 < r["threshold_dropped"] < 1 for r in records(acting))
    assert any(0 < r["agc_dropped"] < 1 for r in records(acting))


def test_dropped_samples_are_those_of_the_score_and_leave_their_place_in_the_mean_empty(
    settings: Settings, few_steps_base: Path
) -> None:
    """The first step again by hand, with the stock U-Net."""
    config = settings(objective="plain", max_train_steps=1, caption_dropout=0.3, **HALF)
    batches: list[TrainingBatch] = []
    got = run(config, progress=False, on_batch=batches.append).losses[0]
    (batch,) = batches
    pipe = StableDiffusionPipeline.from_pretrained(few_steps_base)
    x_t = pipe.scheduler.add_noise(batch.x0, batch.noise, batch.timesteps)
    target = pipe.scheduler.get_velocity(batch.x0, batch.noise, batch.timesteps)
    with torch.no_grad():
        cond, uncond = (
            pipe.unet(x_t, batch.timesteps, pipe.encode_prompt(texts, "cpu", 1, False)[0]).sample
            for texts in (batch.captions, [""] * len(batch.captions))
        )
    score = guidance_norm(cond=cond, uncond=uncond) * noise_factor(pipe.scheduler, batch.timesteps)
    error = (cond - target).square().flatten(1).mean(1)
    kept = score < config.memorization_threshold
    assert 0 < int(kept.sum()) < 8
    empty = torch.tensor([c == "" for c in batch.captions])
    assert bool(empty.any()) and bool((score[empty] < 1e-4).all()) and bool(kept[empty].all())
    assert got == pytest.approx(float((error * kept).sum() / 8), rel=1e-4)
    assert records(config)[0]["threshold_dropped"] == pytest.approx(1 - int(kept.sum()) / 8)
    assert got != pytest.approx(float(error.mean()), rel=1e-2), "negative control: the loss without the rule"


def by_hand(
    config: TrainConfig, batches: list[TrainingBatch], base: Path, tau: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss over all samples kept, and the U-Net after one step of plain SGD on it, which is linear in the gradient."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    total, kept = 0.0, 0
    for batch in batches:
        x_t = pipe.scheduler.add_noise(batch.x0, batch.noise, batch.timesteps)
        target = pipe.scheduler.get_velocity(batch.x0, batch.noise, batch.timesteps)
        cond, uncond = (
            pipe.unet(x_t, batch.timesteps, pipe.encode_prompt(texts, "cpu", 1, False)[0]).sample
            for texts in (batch.captions, [""] * len(batch.captions))
        )
        alpha = pipe.scheduler.alphas_cumprod[batch.timesteps].sqrt()
        keep = (cond - uncond).flatten(1).norm(dim=1) * alpha < tau
        total = total + ((cond - target).square().flatten(1).mean(1) * keep).sum()
        kept += int(keep.sum())
    assert 0 < kept < sum(len(b.captions) for b in batches)
    loss = total / kept
    loss.backward()
    return float(loss), {name: p.grad for name, p in pipe.unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [1, 2])
def test_the_mean_over_the_samples_kept_is_that_of_the_loss_and_of_its_gradient(
    settings: Settings, few_steps_base: Path, parts: int
) -> None:
    values: dict[str, Any] = {"objective": "plain", "max_train_steps": 1, "train_batch_size": 8 // parts, **HALF,
                              "gradient_accumulation_steps": parts, "adam_weight_decay": 0.0, "max_grad_norm": 1e9}  # fmt: skip
    batches: list[TrainingBatch] = []
    norms: list[float] = []
    original = torch.optim.AdamW.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        norms.append(float(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()))
        return original(self, *args, **kwargs)

    config = settings("kept", dropped_mean="kept", **values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        got = run(config, progress=False, on_batch=batches.append).losses[0]
        other = run(settings("all", **values), progress=False).losses[0]
    loss, gradient = by_hand(config, batches, few_steps_base, HALF["memorization_threshold"])
    whole = float(torch.stack([g.norm() for g in gradient.values()]).norm())
    assert got == pytest.approx(loss, rel=1e-4) and norms[0] == pytest.approx(whole, rel=1e-3)
    share = records(config)[0]["threshold_dropped"]
    assert other == pytest.approx(loss * (1 - share), rel=1e-4), "negative control: the mean over all"
    assert norms[1] == pytest.approx(whole * (1 - share), rel=1e-3)


def test_a_step_in_which_everything_is_dropped_has_the_mean_zero(settings: Settings) -> None:
    config = settings(max_train_steps=2, memorization_threshold=1e-9, caption_dropout=0.0, dropped_mean="kept")
    assert run(config, progress=False).losses == [0.0, 0.0]


def test_agc_without_a_value_has_the_factor_of_the_stable_diffusion_release() -> None:
    base = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y"]
    given = [vars(make_parser().parse_args([*base, *words])) for words in (["--agc"], ["--agc", "0.5"], [])]
    assert [float(g["agc"]) if "agc" in g else None for g in given] == [1 / 1.25, 0.5, None]
    drop = Dropping(None, 1 / 1.25, scheduler=None, timesteps=1, checkpoint=None)
    assert drop.bank is not None
    drop.bank.mean[0] = 2.0  # mask = loss * 1.25 >= mean: 1.6 is the limit
    t = torch.zeros(2, dtype=torch.long)
    assert drop.keep(torch.tensor([1.59, 1.61]), torch.zeros(2, 1, 1, 1), None, t).tolist() == [0.0, 1.0]


def test_a_step_in_which_everything_is_dropped_is_taken_without_a_gradient(settings: Settings) -> None:
    config = settings(max_train_steps=4, memorization_threshold=1e-9, adam_weight_decay=0.0, caption_dropout=0.0)
    assert run(config, progress=False).losses == [0.0] * 4
    base = load_file(Path(config.pretrained_model_name_or_path or "") / UNET)
    assert equal(weights(config), base)
    assert [r["threshold_dropped"] for r in records(config)] == [1.0] * 4


ALL = {**HALF, **AGC}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("full", {**ALL, "gradient_accumulation_steps": 2, "train_batch_size": 4}),
    ("lora", {**ALL, "lora": True, "lora_dropout": 0.2, "objective": "plain"}),
    ("gn", {"caption_mitigation": "gn", "latent_cache_dir": "cache"}),
    ("rt", {"caption_mitigation": "rt", "caption_mitigation_p": 0.5, "latent_cache_dir": "cache", **ALL}),
]


@pytest.mark.parametrize(
    "values", [pytest.param(v, id=n, marks=[pytest.mark.slow] if n in ("lora", "rt") else []) for n, v in CASES]
)
def test_a_resumed_run_with_mitigations_equals_the_straight_one_bit_for_bit(
    settings: Settings, tmp_path: Path, values: dict[str, Any]
) -> None:
    values = {**values, "max_train_steps": 10, "checkpointing_steps": 5}
    if "latent_cache_dir" in values:
        values |= {"latent_cache_dir": str(tmp_path / "cache"), "center_crop": True}
    straight, stopped = settings("straight", **values), settings("stopped", **values)
    whole = run(straight, progress=False)

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 6:
            raise Stop

    with pytest.raises(Stop):
        run(stopped, progress=False, on_step=stop)
    resumed = settings("stopped", resume_from_checkpoint="latest", **values)
    rest = run(resumed, progress=False)
    assert rest.first_step == 5 and rest.losses == whole.losses
    assert equal(weights(straight), weights(resumed))
    assert records(straight) == records(resumed)
    if "agc" in values:
        assert any(r["agc_dropped"] for r in records(straight)[5:])
        banks = [load_file(Path(c.output_dir) / "checkpoint-10" / BANK_NAME)["mean_error"] for c in (straight, resumed)]
        assert torch.equal(*banks) and float(banks[0].sum()) > 0


def test_means_that_a_checkpoint_lacks_or_others_are_refused(settings: Settings) -> None:
    values: dict[str, Any] = {**AGC, "max_train_steps": 2, "checkpointing_steps": 2}
    config = settings(**values)
    run(config, progress=False)
    folder = Path(config.output_dir) / "checkpoint-2"
    again = settings(resume_from_checkpoint="latest", **values)
    for name, value in (("agc", 0.5), ("memorization_threshold", 1.0), ("caption_mitigation", "gn")):
        with pytest.raises(UserError, match=name):
            run(settings(resume_from_checkpoint="latest", **{**values, name: value}), progress=False)
    save_file({"mean_error": torch.zeros(3, dtype=torch.float64)}, folder / BANK_NAME)
    checkpoints.seal(folder)  # else the seal alone finds it
    with pytest.raises(UserError, match=f"{BANK_NAME} cannot be used"):
        run(again, progress=False)


def test_sdxl_trains_under_a_threshold(settings: Settings, tmp_path: Path) -> None:
    tiny.tiny_sdxl_pipeline().save_pretrained(tmp_path / "xl")
    shared: dict[str, Any] = {"pretrained_model_name_or_path": str(tmp_path / "xl"), "max_train_steps": 2}
    config = settings("threshold", memorization_threshold=1.0, caption_mitigation="gn", **shared)
    run(config, progress=False)
    assert any(r["threshold_dropped"] > 0 for r in records(config))


# Captions


class Images(ImageDataset):
    def __init__(self, captions: list[str], more: list[tuple[str, ...]] | None = None) -> None:
        super().__init__([b""] * len(captions), captions, captions, "test", more or [])


def wording(kind: str | None, p: float, images: ImageDataset | None = None, seed: int = 0) -> CaptionAugmentation:
    images = images or Images([f"a red disc {i}" for i in range(4)])
    return CaptionAugmentation(kind, p, 0.1, images=images, stream=SampleStream(len(images), seed), tokenizer=tiny.tiny_tokenizer())  # fmt: skip


def test_random_captions_words_and_repetitions_are_what_is_published_for_a_share_p_of_samples() -> None:
    n = 400
    plain = [wording(None, 0.0).caption(i) for i in range(n)]
    for kind in ("rc", "rt", "cwr"):
        w = wording(kind, 0.1)
        got = [w.caption(i) for i in range(n)]
        changed = [(a, b) for a, b in zip(plain, got, strict=True) if a != b]
        assert 20 <= len(changed) <= 65, "0.1 of 400"
        for a, b in changed:
            if kind == "rc":
                assert len(b.replace(" ", "")) == 4, "a token of the tiny tokenizer is a character"
                assert b not in plain
                continue
            old, new = a.split(), b.split()
            assert len(new) == len(old) + 2
            left = iter(new)
            assert all(word in left for word in old), "its own words stay, in their order"
            if kind == "cwr":
                assert set(new) == set(old)
        if kind == "rt":
            assert any(set(b.split()) - set(a.split()) for a, b in changed)
        assert [wording(kind, 0.1).caption(i) for i in reversed(range(n))] == got[::-1], "addressed, not consumed"
        assert [wording(kind, 0.1, seed=1).caption(i) for i in range(n)] != got
        assert [wording(kind, 0.0).caption(i) for i in range(n)] == plain
    assert wording("cwr", 1.0, Images([" "])).caption(0) == " "


def test_several_captions_are_drawn_evenly_at_each_visit() -> None:
    w = wording("mc", 1.0, Images(["a", "d"], [("b", "c"), ()]))
    rows = [(w.stream.image(i), w.caption(i)) for i in range(1200)]
    counts = {c: sum(caption == c for _, caption in rows) for c in "abcd"}
    assert counts["d"] == 600 and all(150 < counts[c] < 250 for c in "abc")
    never = wording("mc", 0.0, w.images)
    assert {never.caption(i) for i in range(40)} == {"a", "d"}


def test_noise_on_embeddings_has_its_size_is_addressed_and_spares_the_empty_caption() -> None:
    found = {"hidden": torch.ones(3, 50, 40), "pooled": torch.ones(3, 40)}
    w = wording("gn", 1.0)
    got = w.embeddings(found, ["a", "", "b"], [5, 6, 7])
    extra = got["hidden"] - 1
    assert float(extra[0].std()) == pytest.approx(0.1, rel=0.05) and abs(float(extra[0].mean())) < 0.01
    assert not torch.equal(extra[0], extra[2]) and float(extra[1].abs().max()) == 0.0
    assert torch.equal(found["hidden"], torch.ones(3, 50, 40)), "what is held stays as it is"
    other = w.embeddings({k: v[:1] for k, v in found.items()}, ["b"], [7])
    assert torch.equal(other["hidden"][0], got["hidden"][2]) and torch.equal(other["pooled"][0], got["pooled"][2])
    assert torch.equal(wording("gn", 0.0).embeddings(found, ["a"] * 3, [1, 2, 3])["hidden"], found["hidden"])
    assert wording("rc", 1.0).embeddings(found, ["a"] * 3, [1, 2, 3]) is found


@pytest.mark.parametrize("kind", ["mc", "gn", *(pytest.param(k, marks=pytest.mark.slow) for k in ("rc", "rt", "cwr"))])
def test_each_caption_mitigation_acts_under_ambient_is_neutral_at_p_0_and_has_the_same_bits_beside_the_cache(
    settings: Settings, several_captions: Path, tmp_path: Path, kind: str
) -> None:
    values: dict[str, Any] = {"train_data_dir": str(several_captions), "center_crop": True, "max_train_steps": 2}
    alone = {"caption_mitigation": kind, "caption_mitigation_p": 0.7}
    texts: dict[str, list[str]] = {}
    losses = {}
    for name, more in (
        ("control", {"caption_mitigation": kind, "caption_mitigation_p": 0.0}),
        ("acting", alone),
        ("cached", {**alone, "latent_cache_dir": str(tmp_path / "cache")}),
        ("again", {**alone, "latent_cache_dir": str(tmp_path / "cache")}),
        ("halves", {**alone, "train_batch_size": 4, "gradient_accumulation_steps": 2}),
    ):
        # A list of captions is taken under mc alone; elsewhere each row has one.
        if kind != "mc":
            del values["train_data_dir"]
            values = {**values, "train_data_dir": str(tiny.tiny_folder(tmp_path / "one", count=4))}
        seen: list[str] = []
        losses[name] = run(settings(name, **values, **more), progress=False, on_batch=lambda b, s=seen: s.extend(b.captions)).losses  # type: ignore[misc]  # fmt: skip
        texts[name] = seen
    if kind == "mc":
        one = tmp_path / "first"
        shutil.copytree(several_captions, one)
        rows = [json.loads(line) for line in (one / "metadata.jsonl").read_text().splitlines()]
        for row in rows:
            row["text"] = row["text"][0] if isinstance(row["text"], list) else row["text"]
        (one / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values["train_data_dir"] = str(one)
    without = run(settings("without", **values), progress=False).losses
    assert losses["control"] == without
    assert losses["acting"] != without
    assert losses["acting"] == losses["cached"] == losses["again"]
    assert losses["acting"] == pytest.approx(losses["halves"], rel=1e-4)
    assert texts["acting"] == texts["cached"] == texts["halves"]
    assert (texts["acting"] == texts["control"]) == (kind == "gn")
    assert [c == "" for c in texts["acting"]] == [c == "" for c in texts["control"]], "dropped captions stay dropped"


def test_several_captions_need_rows_that_have_them_and_a_list_needs_the_option(
    settings: Settings, several_captions: Path
) -> None:
    with pytest.raises(UserError, match=r"caption_mitigation is mc and no row .* has more than one caption"):
        run(settings(caption_mitigation="mc"), progress=False)
    with pytest.raises(UserError, match=r"not list.*--caption_mitigation mc takes a list"):
        load_rows(several_captions)
    rows = load_rows(several_captions, several_captions=True)
    assert [len(rows.captions_of(i)) for i in range(4)] == [3, 3, 3, 1]
    assert rows.subset([3, 0]).captions_of(1) == rows.captions_of(0)
    first = ImageDataset(rows._images, rows.captions, rows.names, rows.source)
    assert rows.fingerprint() != first.fingerprint(), "a checkpoint knows all captions"


@pytest.mark.parametrize("cell", [["a", 3], [], [["a"]], ["a", None], ["a", "\ud800"]], ids=str)
def test_a_list_with_something_else_than_texts_is_refused(tmp_path: Path, cell: Any) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": cell}))
    with pytest.raises(UserError, match=r"a\.png in .* has no caption"):
        load_rows(tmp_path, several_captions=True)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"memorization_threshold": 0}, ["memorization_threshold", "above 0"]),
        ({"agc": 1.5}, ["agc", "at most 1"]),
        ({"caption_mitigation": "xx"}, ["caption_mitigation", "mc, gn, rc, rt, cwr"]),
        ({"dropped_mean": "kept"}, ["dropped_mean", "memorization_threshold and agc are off"]),
        ({"dropped_mean": "some", "agc": 0.8}, ["dropped_mean", "all, kept"]),
        ({"caption_mitigation_p": 0.1}, ["caption_mitigation_p", "--caption_mitigation"]),
        ({"caption_noise_std": 0.1, "caption_mitigation": "rc"}, ["caption_noise_std", "gn"]),
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(
    settings: Settings, values: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        settings(**values)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_defaults_are_the_published_ones(settings: Settings) -> None:
    got = {k: settings(caption_mitigation=k) for k in ("mc", "gn", "rc", "rt", "cwr")}
    assert {k: c.caption_mitigation_p for k, c in got.items()} == {"mc": 1, "gn": 1, "rc": 0.1, "rt": 0.1, "cwr": 0.1}
    assert [k for k, c in got.items() if c.caption_noise_std == 0.1] == ["gn"]


# Two processes


WORKER = """
import json, sys
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run

run(TrainConfig(**json.loads(sys.argv[1])), progress=False)
"""


@pytest.mark.slow
def test_two_processes_drop_the_samples_and_change_the_captions_that_one_does(
    few_steps_base: Path, tiny_images: Path, tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    for processes in (1, 2):
        values: dict[str, Any] = {
            "pretrained_model_name_or_path": str(few_steps_base), "train_data_dir": str(tiny_images), "resolution": 32,
            "train_batch_size": 4 // processes, "gradient_accumulation_steps": 2, "max_train_steps": 10,
            "checkpointing_steps": 10, "learning_rate": 3e-3, "report_to": "none", "output_dir": str(tmp_path / f"out{processes}"),
            "ambient_level": 0.5, "caption_mitigation": "cwr", "caption_mitigation_p": 0.5, "dropped_mean": "kept", **ALL,
        }  # fmt: skip
        if processes == 1:
            run(TrainConfig(**values), progress=False)
        else:
            done = launch(processes, tmp_path / "worker.py", values)
            assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        [json.loads(line) for line in (tmp_path / f"out{n}" / "losses.jsonl").read_text().splitlines()] for n in (1, 2)
    )
    for name in ("threshold_dropped", "agc_dropped"):
        assert [r[name] for r in one] == [r[name] for r in two] and any(r[name] for r in one)
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-4)
    banks = [load_file(tmp_path / f"out{n}" / "checkpoint-10" / BANK_NAME)["mean_error"] for n in (1, 2)]
    torch.testing.assert_close(*banks, rtol=1e-4, atol=1e-6)
