"""Every base model of docs/training.md's table, on tiny random pipelines of its real classes: trained whole and by LoRA,
resumed to the bit, read back by diffusers' own pipeline, and what is given to SDXL's U-Net held against that pipeline."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from launching import launch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from ambient_sd.data import latents as data
from ambient_sd.data.sources import ImageDataset, load_rows
from ambient_sd.data.stream import SampleStream, process_batches
from ambient_sd.data.views import Samples, ViewRule
from ambient_sd.families import sgm
from ambient_sd.families.base import Base, check_base
from ambient_sd.families.encoders import CaptionEncoder
from ambient_sd.families.sdxl import SDXL
from ambient_sd.reporting.model_card import write_run_card
from ambient_sd.schedule import NoiseSchedule
from ambient_sd.training import adapters, validation
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import TrainingBatch, run
from ambient_sd.utils.errors import UserError

ROOT = Path(__file__).parents[2]
BASES: dict[str, Callable[[], Any]] = {
    "sd15": tiny.tiny_sd15_pipeline,
    "sd2-base": lambda: tiny.tiny_pipeline("epsilon"),
    "sd2": lambda: tiny.tiny_pipeline("v_prediction"),
    "sdxl": tiny.tiny_sdxl_pipeline,
}
UNET = "unet/diffusion_pytorch_model.safetensors"
Settings = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, make in BASES.items():
        make().save_pretrained(folder / name)
    return folder


@pytest.fixture
def settings(bases: Path, tiny_images: Path, tmp_path: Path) -> Settings:
    def make(base: str, name: str = "out", **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(bases / base), "train_data_dir": str(tiny_images), "resolution": 32,
            "train_batch_size": 2, "max_train_steps": 2, "report_to": "none", "output_dir": str(tmp_path / name),
            "learning_rate": 1e-2, "caption_dropout": 0.3,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "INFERENCE_STEPS", 2)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """Images wider and higher than the crop, each pixel column and row different, one of them a mirror image."""
    folder = tiny.tiny_folder(tmp_path_factory.mktemp("wide") / "p", count=4)
    for i, size in enumerate([(90, 40), (40, 70), (61, 33), (90, 40)]):
        image = Image.effect_mandelbrot(size, (-2, -1, 1, 1 + i % 3 / 4), 20).convert("RGB")
        (ImageOps.mirror(image) if i == 3 else image).save(folder / f"{i:03d}.png")
    return load_rows(folder).check(near_duplicates=True)


def sample(pipe: Any, prompt: str = "a red disc") -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.eval()
    g = torch.Generator().manual_seed(0)
    return pipe(prompt, height=32, width=32, num_inference_steps=2, generator=g, output_type="latent").images


def encoder_parts(pipe: Any) -> dict[str, Any]:
    return {n: getattr(pipe, n) for n in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")}


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / (adapters.WEIGHTS_NAME if config.lora else UNET))


@pytest.mark.parametrize(
    ("base", "lora"),
    [pytest.param(b, lora, id=f"{b}-{'lora' if lora else 'full'}", marks=[] if lora == (b in ("sdxl", "sd2-base")) else [pytest.mark.slow]) for b in BASES for lora in (False, True)],
)  # fmt: skip
def test_a_base_is_trained_resumed_to_the_bit_and_read_back_by_its_stock_pipeline(
    settings: Settings, bases: Path, monkeypatch: pytest.MonkeyPatch, base: str, lora: bool
) -> None:
    live: list[Any] = []
    save, pipeline = adapters.save, Base.pipeline
    monkeypatch.setattr(adapters, "save", lambda unet, *rest: (live.append(unet), save(unet, *rest)))
    monkeypatch.setattr(Base, "pipeline", lambda self, unet: (live.append(unet), pipeline(self, unet))[1])
    more = {"lora": True, "rank": 2, "lora_alpha": 6.0, "output_kohya_format": True} if lora else {}
    config = settings(base, checkpointing_steps=1, **more)
    losses, whole = run(config, progress=False).losses, weights(config)
    trained, out = live[-1], Path(config.output_dir)

    config.resume_from_checkpoint = "checkpoint-1"
    assert run(config, progress=False).losses == losses
    assert all(torch.equal(weights(config)[k], v) for k, v in whole.items())

    kind = StableDiffusionXLPipeline if base == "sdxl" else StableDiffusionPipeline
    expected = sample(kind.from_pretrained(bases / base, unet=trained))
    if lora:
        stock = kind.from_pretrained(bases / base)
        start = sample(stock)
        stock.load_lora_weights(out)
        kohya = kind.from_pretrained(bases / base)
        kohya.load_lora_weights(out, weight_name=adapters.KOHYA_NAME)
        torch.testing.assert_close(sample(kohya), expected, rtol=0, atol=1e-3)
    else:
        start, stock = sample(kind.from_pretrained(bases / base)), kind.from_pretrained(out)
        assert type(stock.scheduler) is type(BASES[base]().scheduler)
        assert stock.scheduler.config.prediction_type == BASES[base]().scheduler.config.prediction_type
        # The folder's other parts and settings are the base's own.
        index = [json.loads((folder / "model_index.json").read_text()) for folder in (out, bases / base)]
        assert [{k: v for k, v in i.items() if not k.startswith("_name")} for i in index] == [
            {k: v for k, v in index[1].items() if not k.startswith("_name")}
        ] * 2
    assert torch.equal(sample(stock), expected)
    assert not torch.allclose(start, expected, atol=1e-2), "negative control: training has changed something"


def test_the_table_of_bases_names_these_tests() -> None:
    page = (ROOT / "docs" / "training.md").read_text().partition("## Base models")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.M)) == set(BASES)


def test_a_safety_checker_stays_where_it_was_and_works(settings: Settings, bases: Path) -> None:
    config = settings("sd15", max_train_steps=1, validation_prompts=["a disc"], num_validation_images=1)
    run(config, progress=False)
    pipe = StableDiffusionPipeline.from_pretrained(config.output_dir)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a disc", height=32, width=32, num_inference_steps=1).nsfw_content_detected == [False]
    for part in ("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"):
        assert (Path(config.output_dir) / part).is_file()


@pytest.mark.parametrize("zero_empty", [True, False])
def test_sdxl_captions_are_embedded_as_its_pipeline_embeds_a_prompt(zero_empty: bool) -> None:
    pipe = tiny.tiny_sdxl_pipeline(zero_empty=zero_empty)
    encoder = CaptionEncoder(SDXL, encoder_parts(pipe), zero_empty=zero_empty)
    captions = ["a red disc 1", "x", "a caption much longer than the context of the tokenizer allows"]
    hidden, none, pooled, none_pooled = pipe.encode_prompt(captions, device="cpu")
    found = encoder([*captions, ""])
    torch.testing.assert_close(found["hidden"], torch.cat([hidden, none[:1]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["pooled"], torch.cat([pooled, none_pooled[:1]]), rtol=0, atol=1e-6)
    assert bool((found["hidden"][3] == 0).all()) == zero_empty, "the branch that the pipeline samples with"
    assert encoder.hold(captions, limit=2**30)
    encoder.release()
    assert torch.equal(encoder([*captions, ""])["pooled"], found["pooled"])
    swapped = CaptionEncoder(
        SDXL, {**encoder_parts(pipe), "tokenizer": pipe.tokenizer_2, "tokenizer_2": pipe.tokenizer}
    )
    assert not torch.allclose(swapped(captions)["hidden"], hidden, atol=1e-4), "negative control: padding differs"


@pytest.mark.parametrize("zero_empty", [True, False])
def test_a_dropped_caption_trains_the_branch_that_the_pipeline_samples_with(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_empty: bool
) -> None:
    pipe = tiny.tiny_sdxl_pipeline(zero_empty=zero_empty)
    pipe.save_pretrained(tmp_path / "base")
    _, none, _, none_pooled = pipe.encode_prompt("a disc", device="cpu")
    given: list[dict[str, Any]] = []
    make = SDXL.inputs
    monkeypatch.setattr(SDXL, "inputs", lambda *a: given.append(make(*a)) or given[-1])
    run(settings("sdxl", pretrained_model_name_or_path=str(tmp_path / "base"), caption_dropout=1.0, max_train_steps=1),
        progress=False)  # fmt: skip
    (inputs,) = given
    torch.testing.assert_close(inputs["encoder_hidden_states"], none.expand(2, -1, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(inputs["added_cond_kwargs"]["text_embeds"], none_pooled.expand(2, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_time_ids_say_where_the_pixels_of_a_sample_lie(wide: ImageDataset, per_image: bool, center: bool) -> None:
    """Independent of the view: the image, mirrored as a whole where the sample is, cropped at the corner that is told."""
    assert sum(wide.mirrored) == 1
    rule = ViewRule(32, center_crop=center, random_flip=True, per_image=per_image, noise_seed=1)
    stream = SampleStream(len(wide), 3)
    samples, flips = Samples(wide, rule, stream), set()
    for position, ids in enumerate(rule.sizes(wide, stream, range(24)).int().tolist()):
        image, seen = wide[stream.image(position)].image, samples[position]
        height, width, top, left, *target = ids
        assert (width, height, target) == (*image.size, [32, 32])
        scale = 32 / min(image.size)
        full = image.resize([max(32, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS)
        flips.add(flip := "mirrored" in seen.draw_key)
        shown = (ImageOps.mirror(full) if flip else full).crop((left, top, left + 32, top + 32))
        pixels = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).reshape(32, 32, 3).permute(2, 0, 1)
        assert torch.equal(pixels.float() / 127.5 - 1.0, seen.pixels)
    assert flips == {True, False}


def test_time_ids_have_the_order_of_the_pipeline(tiny_images: Path) -> None:
    images, rule = load_rows(tiny_images).check(), ViewRule(32, True, False, True, 0)
    ids = rule.sizes(images, SampleStream(8, 0), [0])
    told = tiny.tiny_sdxl_pipeline()._get_add_time_ids((48, 48), (0, 0), (32, 32), torch.float32, 20)
    assert torch.equal(ids, told)


WORKER = """
import hashlib, json, os, sys
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.loop import run
config, seen = TrainConfig(**json.loads(sys.argv[1])), {}
def watch(batch):
    for i, position in enumerate(batch.positions):
        seen[position] = [batch.captions[i], *(
            hashlib.sha256(t[i].numpy().tobytes()).hexdigest() for t in (batch.time_ids, batch.noise, batch.eps_n)
        )]
losses = run(config, progress=False, on_batch=watch).losses
with open(f"{config.output_dir}-rank{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump({"seen": seen, "losses": losses}, file)
"""


@pytest.mark.slow
def test_two_processes_and_one_give_sdxl_the_same_samples_to_the_bit(
    settings: Settings, wide: ImageDataset, tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    values: dict[str, Any] = {"train_data_dir": wide.source, "random_flip": True, "max_train_steps": 2}
    two = settings("sdxl", "two", **values)
    done = launch(2, tmp_path / "worker.py", two.to_dict())
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"two-rank{r}.json").read_text()) for r in (0, 1)]
    seen: dict[str, TrainingBatch] = {}
    summary = run(settings("sdxl", "one", **{**values, "train_batch_size": 4}), progress=False,
                  on_batch=lambda batch: seen.update({str(p): batch for p in batch.positions}))  # fmt: skip
    for place, batch in seen.items():
        i = batch.positions.index(int(place))
        tensors = [t[i] for t in (batch.time_ids, batch.noise, batch.eps_n) if t is not None]
        bits = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in tensors]
        assert {**ranks[0]["seen"], **ranks[1]["seen"]}[place] == [batch.captions[i], *bits]
    assert len(seen) == 8
    assert ranks[0]["seen"].keys().isdisjoint(ranks[1]["seen"])
    assert ranks[0]["losses"] == pytest.approx(summary.losses, rel=1e-4)
    assert list(process_batches(0, 1, batch_size=2, accumulation=1, rank=1, processes=2)) == [[2, 3]]


@pytest.mark.slow
def test_sdxl_is_watched_drawn_and_described_as_what_it_is(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking changes nothing, and the card's snippet runs as it stands, guard included."""
    looks = {"validation_prompts": ["a disc"], "num_validation_images": 1, "probe_steps": 1, "probe_images": 1}
    watched, quiet = (
        settings("sdxl", "watched", max_train_steps=1, **looks),
        settings("sdxl", "quiet", max_train_steps=1),
    )
    summary = run(watched, progress=False)
    write_run_card(summary)
    assert summary.losses == run(quiet, progress=False).losses
    assert all(torch.equal(weights(quiet)[k], v) for k, v in weights(watched).items())
    assert summary.evaluations[0]["guard_score"] > 0
    assert (tmp_path / "watched" / "validation" / "step-1.png").is_file()
    card = (tmp_path / "watched" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("THIS_FOLDER", watched.output_dir)
    code = code.replace('"a caption"', '"a caption", height=32, width=32, num_inference_steps=2')
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert type(names["pipe"]) is StableDiffusionXLPipeline
    assert names["guard"].report[0].score > 0


def test_the_vae_stays_float32_and_may_be_another(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny.tiny_sdxl_pipeline(seed=5).vae
    other.register_to_config(scaling_factor=0.5)
    other.save_pretrained(tmp_path / "vae")
    seen: list[Any] = []
    encode = data.encode
    monkeypatch.setattr(data, "encode", lambda encoder, *a, **k: seen.append(encoder.vae) or encode(encoder, *a, **k))
    x0: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {"max_train_steps": 1, "mixed_precision": "bf16"}
    own = settings("sdxl", "own", **values, lora=True, validation_prompts=["a disc"], num_validation_images=1)
    run(own, progress=False, on_batch=lambda b: x0.update(own=b.x0))
    config = settings("sdxl", "other", pretrained_vae_model_name_or_path=str(tmp_path / "vae"), **values)
    run(config, progress=False, on_batch=lambda b: x0.update(other=b.x0))
    assert {vae.dtype for vae in seen} == {torch.float32}
    assert {vae.config.scaling_factor for vae in seen} == {0.13025, 0.5}
    assert not torch.allclose(x0["own"], x0["other"])
    saved = AutoencoderKL.from_pretrained(config.output_dir, subfolder="vae")
    assert all(torch.equal(v, saved.state_dict()[k]) for k, v in other.state_dict().items())
    assert str(tmp_path) not in (tmp_path / "other" / "vae" / "config.json").read_text()
    lora = settings(
        "sdxl", "lora", pretrained_vae_model_name_or_path=str(tmp_path / "vae"), lora=True, max_train_steps=1
    )
    write_run_card(run(lora, progress=False))
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "trained with another VAE" in card
    assert str(tmp_path) not in card


def test_the_training_schedule_of_an_euler_scheduler_is_that_of_its_betas() -> None:
    euler = tiny.tiny_sdxl_pipeline().scheduler
    assert isinstance(euler, EulerDiscreteScheduler)
    euler.set_timesteps(5)
    schedule = NoiseSchedule.from_scheduler(euler)
    other = NoiseSchedule.from_scheduler(
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    )
    assert (schedule.prediction_type, schedule.num_train_timesteps) == ("epsilon", 1000)
    assert schedule.alphas_cumprod is not None
    assert torch.equal(schedule.alphas_cumprod, torch.as_tensor(other.alphas_cumprod))


def test_kohya_names_of_sdxl_are_those_of_its_own_unet_and_every_layer_comes_back(tmp_path: Path) -> None:
    with torch.device("meta"):  # SDXL's blocks
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2), up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            block_out_channels=(32, 64, 128), norm_num_groups=8, cross_attention_dim=8, attention_head_dim=(2, 4, 8),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        )  # fmt: skip
    names = sgm.names(unet)
    assert len(set(names.values())) == len(names), "no two layers have one name"
    # From sd-scripts' and Stability's files, which have two layers a block.
    for ours, theirs in {
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": "input_blocks.4.1.transformer_blocks.1.attn2.to_k",
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2": "middle_block.1.transformer_blocks.9.ff.net.2",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
        "add_embedding.linear_2": "label_emb.0.2",
    }.items():
        assert names[ours] == theirs
    pipe = tiny.tiny_sdxl_pipeline()
    # All layers that an adapter can have inside the blocks.
    layers = [name for name, m in pipe.unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    names = [name for name in layers if name.startswith(("down_blocks.", "mid_block.", "up_blocks."))]
    adapters.attach(pipe.unet, rank=2, alpha=4.0, targets=names, seed=0)
    for name, value in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    adapters.save_kohya(pipe.unet, tmp_path, SDXL)
    state = load_file(tmp_path / adapters.KOHYA_NAME)
    assert len([k for k in state if k.endswith(".alpha")]) == len(names)
    assert {k.split("_blocks_")[0].split("_block_")[0] for k in state} == {
        "lora_unet_input", "lora_unet_middle", "lora_unet_output",
    }  # fmt: skip
    expected, stock = sample(pipe), tiny.tiny_sdxl_pipeline()
    start = sample(stock)
    stock.load_lora_weights(tmp_path, weight_name=adapters.KOHYA_NAME)
    torch.testing.assert_close(sample(stock), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(start, expected, atol=1e-2), "negative control"


def test_bases_that_cannot_be_trained_are_refused_in_one_line(
    settings: Settings, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: object) -> None:
        raise AssertionError("weights were loaded before the base was checked")

    monkeypatch.setattr(Base, "load", no_weights)

    def doctored(name: str, base: str = "sdxl", file: str = "model_index.json", **values: Any) -> dict[str, Any]:
        folder = Path(shutil.copytree(bases / base, tmp_path / name))
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))
        return {"pretrained_model_name_or_path": str(folder)}

    flux = tmp_path / "flux"
    flux.mkdir()
    index = {"_class_name": "FluxFillPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (flux / "model_index.json").write_text(json.dumps(index))
    sizes = 20 + 5 * 8
    headless = doctored("headless")
    shutil.rmtree(tmp_path / "headless" / "text_encoder_2")
    (tmp_path / "no-vae").mkdir()
    cases: list[tuple[dict[str, Any], list[str]]] = [
        (doctored("refiner", _class_name="StableDiffusionXLImg2ImgPipeline"), ["StableDiffusionXLImg2ImgPipeline", "refiner"]),
        (doctored("aesthetic", requires_aesthetics_score=True), ["refiner", "aesthetic score", "SDXL base"]),
        (doctored("five", file="unet/config.json", projection_class_embeddings_input_dim=sizes), ["refiner takes five"]),
        (doctored("one-text", text_encoder=[None, None]), ["has no text_encoder", "CLIPTextModel"]),
        (doctored("narrow", file="unet/config.json", cross_attention_dim=24), ["cross_attention_dim = 24", "40"]),
        (doctored("unsized", file="unet/config.json", addition_embed_type=None), ["addition_embed_type = None", "text_time"]),
        (doctored("inpaint-class", _class_name="StableDiffusionXLInpaintPipeline"), ["inpainting"]),
        (doctored("inpaint", "sd2", "unet/config.json", in_channels=9), ["9 channels", "4", "inpainting"]),
        (doctored("inpaint-xl", file="unet/config.json", in_channels=9), ["9 channels", "4", "inpainting"]),
        (doctored("sd3", _class_name="StableDiffusion3Pipeline", transformer=["diffusers", "SD3Transformer2DModel"]),
         ["is a CLIPTextModel", "CLIPTextModelWithProjection"]),
        ({"pretrained_model_name_or_path": str(flux)}, ["FluxFillPipeline", "transformer"]),
        (doctored("odd", _class_name="WuerstchenPipeline"), ["WuerstchenPipeline", "StableDiffusionXLPipeline"]),
        (doctored("swapped", text_encoder_2=["transformers", "T5EncoderModel"]), ["T5EncoderModel", "WithProjection"]),
        (doctored("conditioned", "sd2", "unet/config.json", addition_embed_type="text_time"), ["addition_embed_type"]),
        (headless, ["headless", "no text_encoder_2/"]),
        ({"pretrained_vae_model_name_or_path": str(tmp_path / "no-vae")}, ["pretrained_vae_model_name_or_path", "no-vae"]),
        ({"pretrained_vae_model_name_or_path": str(bases / "sdxl" / "unet")}, ["UNet2DConditionModel", "AutoencoderKL"]),
        ({"pretrained_vae_model_name_or_path": str(tmp_path / "gone")}, ["gone", "cannot be read"]),
    ]  # fmt: skip
    for values, parts in cases:
        with pytest.raises(UserError) as caught:
            run(settings("sdxl", "never", **values), progress=False)
        text = str(caught.value)
        assert "\n" not in text
        assert all(part in text for part in parts), text
    assert not (tmp_path / "never").exists()
    assert check_base(str(bases / "sdxl")).family is SDXL, "negative control: the base itself is taken"
