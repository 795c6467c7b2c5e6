"""Families of today's transformers, on tiny random pipelines of their real classes: the trainer's loss is that of diffusers' own script, the
network gets in training what its pipeline gives it, and what is trained is read back by the stock pipeline.

A family joins by a row in `CASES`.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_flow
import tiny_more
import torch
from accelerate import PartialState
from diffusers import AutoencoderKLQwenImage, Flux2KleinPipeline, FluxPipeline, QwenImagePipeline, SanaPipeline
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pad_sequence

from ambient_sd.data.cache import entry_id
from ambient_sd.data.sources import ImageDataset
from ambient_sd.data.stream import SampleStream
from ambient_sd.families import FAMILIES, guidance_of
from ambient_sd.families.auraflow import AURAFLOW
from ambient_sd.families.base import Model, check_base
from ambient_sd.families.chroma import CHROMA
from ambient_sd.families.encoders import CaptionEncoder, stacked
from ambient_sd.families.family import Family
from ambient_sd.families.flow import FlowTransformer
from ambient_sd.families.flux import FLUX
from ambient_sd.families.flux2 import KLEIN
from ambient_sd.families.lora import load_lora
from ambient_sd.families.lumina2 import LUMINA2
from ambient_sd.families.qwen_image import QWEN_IMAGE
from ambient_sd.families.sana import SANA
from ambient_sd.families.sd3 import SD3
from ambient_sd.families.z_image import Z_IMAGE
from ambient_sd.sampling import Request, SamplingConfig, generate, image_seed, in_batches
from ambient_sd.training import footprint, validation
from ambient_sd.training.caption_augmentation import CaptionAugmentation
from ambient_sd.training.config import TrainConfig
from ambient_sd.training.encode import fill_captions
from ambient_sd.training.loop import TrainingBatch, run
from ambient_sd.training.plan import plan_run
from ambient_sd.utils.errors import UserError

# (part, setting, another value, what the refusal says); a value of None takes the setting away.
Damage = tuple[str, str, Any, str]
Settings = Callable[..., TrainConfig]


@dataclass(frozen=True)
class Case:
    """A family on one tiny pipeline.

    Attributes:
        family: what is tested.
        make: a random pipeline.
        example: the forward pass of diffusers' training script for it: the flow (B, C, h, w) of noisy latents, timesteps and prompts.
        damage: settings that make parts which do not belong together.
        preconditioned: whether that script's loss is one of x0 by default.
        native: the side that the pipeline samples at by default; None: it has `default_sample_size`.
        bare: whether the pipeline puts an instruction before prompts, and none before the empty one of the unconditional half.
    """

    family: Family
    make: Callable[[], Any]
    example: Callable[[Any, torch.Tensor, torch.Tensor, list[str]], torch.Tensor]
    damage: tuple[Damage, ...] = field(default=())
    preconditioned: bool = False
    native: int | None = None
    bare: bool = False


def sd3_example(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    hidden, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return pipe.transformer(noisy, hidden, pooled, timesteps).sample


def flux_example(
    pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str], scale: float = 3.5, length: int = 512
) -> torch.Tensor:
    hidden, pooled, text_ids = pipe.encode_prompt(prompts, max_sequence_length=length)
    batch, channels, high, wide = noisy.shape
    guidance = torch.tensor([scale]).expand(batch) if pipe.transformer.config.guidance_embeds else None
    flow = pipe.transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, batch, channels, high, wide), timestep=timesteps / 1000, guidance=guidance,
        pooled_projections=pooled, encoder_hidden_states=hidden, txt_ids=text_ids,
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, high // 2, wide // 2, "cpu", noisy.dtype),
    ).sample  # fmt: skip
    factor = pipe.vae_scale_factor
    return FluxPipeline._unpack_latents(flow, high * factor, wide * factor, factor)


def klein_example(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    hidden, text_ids = pipe.encode_prompt(prompts)
    ids = Flux2KleinPipeline._prepare_latent_ids(noisy)
    flow = pipe.transformer(
        hidden_states=Flux2KleinPipeline._pack_latents(noisy), timestep=timesteps / 1000, guidance=None, encoder_hidden_states=hidden,
        txt_ids=text_ids, img_ids=ids,
    ).sample  # fmt: skip
    return Flux2KleinPipeline._unpack_latents_with_ids(flow, ids)


def chroma_example(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """There is no script for it: what its pipeline does."""
    hidden, text_ids, mask, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    batch, channels, high, wide = noisy.shape
    rows = FluxPipeline._pack_latents(noisy, batch, channels, high, wide)
    flow = pipe.transformer(
        hidden_states=rows, timestep=timesteps / 1000, encoder_hidden_states=hidden, txt_ids=text_ids,
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, high // 2, wide // 2, "cpu", noisy.dtype),
        attention_mask=pipe._prepare_attention_mask(batch, rows.shape[1], noisy.dtype, mask),
    ).sample  # fmt: skip
    factor = pipe.vae_scale_factor
    return FluxPipeline._unpack_latents(flow, high * factor, wide * factor, factor)


def z_image_example(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    texts = [pipe.encode_prompt([prompt], do_classifier_free_guidance=False)[0][0] for prompt in prompts]
    images = list(noisy.unsqueeze(2).unbind(dim=0))
    return -torch.stack(pipe.transformer(images, (1000 - timesteps) / 1000, texts, return_dict=False)[0]).squeeze(2)


def qwen_example(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    rows = [pipe.encode_prompt([prompt], max_sequence_length=512)[0][0] for prompt in prompts]
    batch, channels, high, wide = noisy.shape
    flow = pipe.transformer(
        hidden_states=QwenImagePipeline._pack_latents(noisy.unsqueeze(1), batch, channels, high, wide), timestep=timesteps / 1000,
        encoder_hidden_states=pad_sequence(rows, batch_first=True), img_shapes=[(1, high // 2, wide // 2)] * batch,
        encoder_hidden_states_mask=pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True),
    ).sample  # fmt: skip
    factor = pipe.vae_scale_factor
    return QwenImagePipeline._unpack_latents(flow, high * factor, wide * factor, factor).squeeze(2)


def gemma_texts(pipe: Any, prompts: list[str], **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and masks; of a dropped caption those of the pipeline's unconditional half."""
    found = [pipe.encode_prompt([prompt], negative_prompt=[""], **how)[0 if prompt else 2 :][:2] for prompt in prompts]
    return torch.cat([hidden for hidden, _ in found]), torch.cat([mask for _, mask in found])


def lumina2_example(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Its script names the share of the image sigma, and learns x0 - noise."""
    hidden, mask = gemma_texts(pipe, prompts)
    sigmas = 1 - timesteps / 1000
    return -pipe.transformer(noisy, timestep=sigmas, encoder_hidden_states=hidden, encoder_attention_mask=mask).sample


def sana_example(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    how = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    hidden, mask = gemma_texts(pipe, prompts, complex_human_instruction=how)
    return pipe.transformer(noisy, encoder_hidden_states=hidden, encoder_attention_mask=mask, timestep=timesteps).sample


def auraflow_example(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """There is no script for it: what its pipeline does."""
    hidden, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    return pipe.transformer(noisy, encoder_hidden_states=hidden, timestep=timesteps / 1000).sample


CASES: dict[str, Case] = {
    "sd3.5": Case(SD3, tiny_flow.tiny_sd3_pipeline, sd3_example, preconditioned=True, damage=(
        ("transformer", "pooled_projection_dim", 30, "CLIP text encoders come to 32"),
        ("transformer", "joint_attention_dim", 64, "its T5 has 48"), ("transformer", "in_channels", 33, "takes 33 channels"),
        ("vae", "shift_factor", None, "StableDiffusion3Pipeline adds it"),
    )),
    "sd3-without-t5": Case(SD3, lambda: tiny_flow.tiny_sd3_pipeline(t5=False, dual=False), sd3_example, preconditioned=True),
    "flux-dev": Case(FLUX, tiny_flow.tiny_flux_pipeline, flux_example, damage=(
        ("transformer", "pooled_projection_dim", 32, "its text encoder has 16"),
        ("transformer", "joint_attention_dim", 64, "its text encoder has 24"), ("transformer", "in_channels", 384, "takes 384 channels"),
        ("transformer", "in_channels", None, "no 'in_channels'"), ("vae", "latent_channels", 4, "its VAE gives 16"),
        ("scheduler", "_class_name", "DDIMScheduler", "FLUX.1 is trained by flow matching"),
    )),
    "flux-schnell": Case(FLUX, lambda: tiny_flow.tiny_flux_pipeline(dev=False), flux_example),
    "klein": Case(KLEIN, tiny_flow.tiny_klein_pipeline, klein_example, damage=(
        ("transformer", "joint_attention_dim", 32, "come to 24"), ("text_encoder", "hidden_size", 16, "come to 48"),
        ("transformer", "in_channels", 128, "takes 128 channels"), ("transformer", "joint_attention_dim", None, "no 'joint_attention_dim'"),
    )),
    "chroma": Case(CHROMA, tiny_flow.tiny_chroma_pipeline, chroma_example, damage=(
        ("transformer", "joint_attention_dim", 64, "its text encoder has 24"), ("transformer", "in_channels", 16, "takes 16 channels"),
    )),
    "z-image": Case(Z_IMAGE, tiny_more.tiny_z_image_pipeline, z_image_example, native=1024, damage=(
        ("transformer", "cap_feat_dim", 32, "its text encoder has 24"), ("transformer", "in_channels", 32, "takes 32 channels"),
        ("transformer", "siglip_feat_dim", 16, "Omni"), ("transformer", "all_patch_size", [4], "patches of 2 x 2"),
        ("transformer", "cap_feat_dim", None, "no 'cap_feat_dim'"), ("transformer", "all_patch_size", 2, "all_patch_size = 2"),
    )),
    "qwen-image": Case(QWEN_IMAGE, tiny_more.tiny_qwen_image_pipeline, qwen_example, damage=(
        ("transformer", "joint_attention_dim", 32, "its text encoder has 24"), ("transformer", "in_channels", 64, "takes 64 channels"),
        ("transformer", "guidance_embeds", True, "editing, layered"), ("transformer", "zero_cond_t", True, "editing, layered"),
        ("vae", "latents_std", [1.0, 1.0, 0.0, 1.0], "each of 4 channels"), ("vae", "latents_mean", [0.5], "each of 4 channels"),
        ("vae", "z_dim", None, "no 'z_dim'"),
    )),
    "lumina2": Case(LUMINA2, tiny_more.tiny_lumina2_pipeline, lumina2_example, bare=True, damage=(
        ("transformer", "cap_feat_dim", 32, "its text encoder has 24"), ("transformer", "in_channels", 4, "takes 4 channels"),
        ("vae", "block_out_channels", [8, 8, 8], "counts on 8 x 8"), ("transformer", "sample_size", None, "no 'sample_size'"),
    )),
    "sana": Case(SANA, lambda: tiny_more.tiny_sana_pipeline(euler=True), sana_example, native=32, bare=True, damage=(
        ("transformer", "caption_channels", 32, "its text encoder has 24"), ("transformer", "in_channels", 4, "has out_channels = 8"),
        ("transformer", "guidance_embeds", True, "Sprint"), ("transformer", "out_channels", 16, "learned variance"),
        ("vae", "encoder_block_out_channels", None, "no 'encoder_block_out_channels'"), ("vae", "latent_channels", 4, "its VAE gives 4"),
        ("scheduler", "_class_name", "DDIMScheduler", "Sana is trained by flow matching"),
    )),
    "auraflow": Case(AURAFLOW, tiny_more.tiny_auraflow_pipeline, auraflow_example, native=1024, damage=(
        ("transformer", "joint_attention_dim", 32, "its text encoder has 24"), ("transformer", "in_channels", 16, "takes 16 channels"),
    )),
}  # fmt: skip
WHOLE = [name for name, case in CASES.items() if case.damage]  # one pipeline of each family
CAPTIONS = ["a red disc", "x", "", "a much longer caption, " * 40]
LISTS_AND_MASKS = ["z-image", "qwen-image"]  # how texts of several lengths are given to a network
each = pytest.mark.parametrize("name", CASES)
each_family = pytest.mark.parametrize("name", WHOLE)


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    """Every pipeline once; no test changes them."""
    made = {name: case.make() for name, case in CASES.items()}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def bases(pipes: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, pipe in pipes.items():
        pipe.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def settings(bases: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    def make(base: str, **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "pretrained_model_name_or_path": str(bases / base), "train_data_dir": str(tiny_images), "resolution": 32,
            "train_batch_size": 2, "max_train_steps": 1, "report_to": "none", "output_dir": str(tmp_path_factory.mktemp(base) / "out"),
            "learning_rate": 1e-2, "caption_dropout": 0.3, "lora": True, "rank": 2,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **values})

    return make


@dataclass(frozen=True)
class Trained:
    """A run of one step: its folder, its one batch, and the loss that it reports."""

    folder: str
    batch: TrainingBatch
    loss: float


def trained(config: TrainConfig) -> Trained:
    batches: list[TrainingBatch] = []
    losses = run(config, progress=False, on_batch=batches.append).losses
    (batch,) = batches
    return Trained(config.output_dir, batch, losses[0])


@pytest.fixture(scope="module")
def plain(settings: Settings) -> Callable[[str], Trained]:
    """A LoRA under the plain objective, of each base once."""

    def make(name: str) -> Trained:
        loss = {"objective": "plain", "weighting_scheme": "cosmap", "precondition_outputs": CASES[name].preconditioned}
        return trained(settings(name, lora_alpha=6.0, **loss))

    return functools.cache(make)


@pytest.fixture(scope="module")
def ambient(settings: Settings) -> Callable[[str], Trained]:
    """Samples above and below a level, of each base once."""
    return functools.cache(lambda name: trained(settings(name, ambient_level=1.0, train_batch_size=6)))


def sampled(pipe: Any, family: Family, scale: float = 3.0) -> torch.Tensor:
    """An image's latents, under guidance."""
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": g, "output_type": "latent"}
    return pipe(prompt=["a red disc"], **family.guided(pipe, scale, 1), **options).images


def network_calls(pipe: Any, family: Family, act: Callable[[], Any]) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """What the network was given by name, and what it returned, while something ran."""
    network, seen = getattr(pipe, family.network), list[tuple[dict[str, Any], torch.Tensor]]()
    names = [*inspect.signature(type(network).forward).parameters][1:]
    layout = family.guidance[family.pipeline]

    def look(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given |= {"hidden_states": layout.tensor(given.pop(layout.sample)), "timestep": given.pop(layout.time)}
        given[layout.embeds] = torch.stack(list(given[layout.embeds]))
        seen.append(({k: v for k, v in given.items() if isinstance(v, torch.Tensor)}, layout.tensor(output[0])))

    hook = network.register_forward_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            act()
    finally:
        hook.remove()
    return seen


@each
def test_plain_loss_equals_diffusers_script(
    name: str, plain: Callable[[str], Trained], pipes: Mapping[str, Any]
) -> None:
    case, pipe, (batch, loss) = CASES[name], pipes[name], (plain(name).batch, plain(name).loss)
    assert bool((batch.timesteps != batch.timesteps.round()).any()) or name == "flux-schnell", "a shift was at work"
    sigmas = (batch.timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * batch.x0 + sigmas * batch.noise
    with torch.no_grad():
        flow = case.example(pipe, noisy, batch.timesteps, batch.captions)
    target = batch.noise - batch.x0
    if case.preconditioned:
        flow, target = flow * -sigmas + noisy, batch.x0
    weighting = compute_loss_weighting_for_sd3("cosmap", sigmas)
    expected = (weighting * (flow - target) ** 2).reshape(len(target), -1).mean(1).mean()
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert loss != pytest.approx(float(((flow - target) ** 2).mean()), rel=1e-3), "negative control: the weight"


@each
def test_ambient_loss_follows_its_closed_form(
    name: str, ambient: Callable[[str], Trained], pipes: Mapping[str, Any]
) -> None:
    """Above the level: x_t = (1 - sigma) (x0 + s_n eps_n) + sigma sqrt(a) xi, the loss a^2 |o - (xi / sqrt(a) - x0*)|^2."""
    batch, loss = ambient(name).batch, ambient(name).loss
    assert batch.eps_n is not None
    sigma = (batch.timesteps.double() / 1000).view(-1, 1, 1, 1)
    s = sigma / (1 - sigma).clamp(min=1e-300)
    assert 0 < int((s > 1.0).sum()) < 6, "on both sides of the level"
    level = torch.where(s > 1.0, 1.0, 0.0)
    a = 1 - (level / s) ** 2
    xi, y_n = batch.noise.double(), batch.x0.double() + level * batch.eps_n.double()
    x_t = (1 - sigma) * y_n + sigma * a.sqrt() * xi
    target = xi / a.sqrt() - (y_n - level**2 / (s * a.sqrt()) * xi)
    with torch.no_grad():
        flow = CASES[name].example(pipes[name], x_t.float(), batch.timesteps, batch.captions).double()
    expected = (a**2 * (flow - target) ** 2).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert loss != pytest.approx(float(((flow - (batch.noise - batch.x0)) ** 2).mean()), rel=1e-3), "negative control"


@each
def test_timesteps_are_those_of_the_sampler_s_shift(
    name: str, ambient: Callable[[str], Trained], pipes: Mapping[str, Any]
) -> None:
    """The scheduler, asked by its pipeline for a thousand steps at this size, names every timestep that is trained."""
    pipe, batch = pipes[name], ambient(name).batch
    scheduler, asked = pipe.scheduler, list[dict[str, Any]]()
    with pytest.MonkeyPatch.context() as patch:
        known = type(scheduler).set_timesteps

        @functools.wraps(known)
        def listen(self: Any, *args: Any, **given: Any) -> Any:
            asked.append(given)
            raise StopIteration

        patch.setattr(type(scheduler), "set_timesteps", listen)
        with pytest.raises(StopIteration):
            pipe(prompt=["x"], height=32, width=32)
    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(
        sigmas=torch.linspace(1, 1 / 1000, 1000).tolist(), **{k: v for k, v in asked[-1].items() if k == "mu"}
    )
    torch.testing.assert_close(
        (own.timesteps[None] - batch.timesteps[:, None]).abs().min(1).values, torch.zeros(6), rtol=0, atol=1e-3
    )
    unshifted = torch.arange(1.0, 1001.0)
    apart = (unshifted[None] - batch.timesteps[:, None]).abs().min(1).values.max()
    assert apart > 1e-2 or name == "flux-schnell", "negative control: without the shift they would be whole"


def test_flux_trains_at_the_guidance_and_length_asked_for(settings: Settings, pipes: Mapping[str, Any]) -> None:
    asked = {"guidance_scale": 1.5, "max_sequence_length": 64}
    found = trained(settings("flux-dev", objective="plain", **asked))
    batch, loss = found.batch, found.loss
    sigmas = (batch.timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * batch.x0 + sigmas * batch.noise
    for given, expected in (((1.5, 64), True), ((3.5, 64), False), ((1.5, 512), False)):
        with torch.no_grad():
            flow = flux_example(pipes["flux-dev"], noisy, batch.timesteps, batch.captions, *given)
        assert (loss == pytest.approx(float(((flow - (batch.noise - batch.x0)) ** 2).mean()), rel=1e-6)) == expected


def test_guidance_and_length_belong_to_a_run_s_identity(settings: Settings) -> None:
    names = ("max_sequence_length", "guidance_scale")
    for given, told in (({}, [None, None]), (dict(zip(names, (512, 3.5), strict=True)), [None, None]), (dict(zip(names, (64, 1.0), strict=True)), [64, 1.0])):  # fmt: skip
        identity = plan_run(settings("flux-dev", **given)).identity(1)
        assert [identity[name] for name in names] == told


@pytest.mark.parametrize(
    ("base", "given", "words"),
    [
        ("flux-dev", {"max_sequence_length": 513}, "gives its text encoder at most 512; lower it"),
        ("z-image", {"max_sequence_length": 3}, "tokens stand around every caption of Z-Image; raise it"),
        ("flux-schnell", {"guidance_scale": 3.5}, "takes no guidance scale as an input"),
        ("klein", {"guidance_scale": 3.5}, "takes no guidance scale as an input"),
    ],
)
def test_a_length_or_guidance_without_meaning_is_refused(
    base: str, given: dict[str, Any], words: str, settings: Settings
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        plan_run(settings(base, **given))
    assert "\n" not in str(caught.value)
    plan_run(settings("qwen-image", max_sequence_length=1024))  # negative control


@pytest.mark.parametrize(
    ("base", "target", "words"),
    [
        ("klein", "attn.to_out", "transformer_blocks.0.attn.to_out is no layer but a ModuleList; name the layers inside it: attn.to_out.0; "
         "for the others their whole names, such as single_transformer_blocks.0.attn.to_out"),
        ("flux-dev", "to_out", "no linear or convolution layer of the network has this name or ending; name the layers inside it: to_out.0"),
        ("flux-dev", "norm_q", "no linear or convolution layer of the network has this name or ending; some that exist: to_out.0, "),
    ],
)  # fmt: skip
def test_a_target_that_is_no_layer_is_one_line(base: str, target: str, words: str, settings: Settings) -> None:
    with pytest.raises(UserError, match=f"lora_target_modules names '{target}'; {words}") as caught:
        plan_run(settings(base, lora_target_modules=[target]))
    assert "\n" not in str(caught.value)
    plan_run(
        settings(base, lora_target_modules=["to_q, attn.to_out.0"])
    )  # negative control: layers, with commas between them too


@each
def test_captions_are_embedded_as_by_the_pipeline(name: str, pipes: Mapping[str, Any]) -> None:
    same_captions(name, pipes)


@each_family
def test_captions_are_cut_as_by_the_pipeline(name: str, pipes: Mapping[str, Any]) -> None:
    same_captions(name, pipes, 240)


def same_captions(name: str, pipes: Mapping[str, Any], length: int | None = None) -> None:
    case, pipe = CASES[name], pipes[name]
    asked = {} if length is None else {"max_sequence_length": length}
    parts = {part: getattr(pipe, part) for part in case.family.text_parts if getattr(pipe, part) is not None}
    encoder = CaptionEncoder(case.family.trained_with(length, None), parts)
    for caption in CAPTIONS:
        guide = 1.0 if caption or not case.bare else 3.0
        (given, _), *more = network_calls(
            pipe, case.family, lambda text=caption, scale=guide: sampled_from(pipe, case.family, text, scale, **asked)
        )
        if guide > 1:
            given = more[0][0] if case.family.guidance[case.family.pipeline].halves == "calls" else first_half(given)
        (ours, _), *_ = network_calls(
            pipe, case.family, lambda text=caption: predicted(pipe, case.family, encoder([text]))
        )
        texts = {k: v for k, v in given.items() if k not in ("hidden_states", "timestep")}
        assert texts.keys() == ours.keys() - {"hidden_states", "timestep"}
        assert all(torch.equal(value, ours[key]) for key, value in texts.items())
    alone = [encoder([caption]) for caption in CAPTIONS]
    for key, rows in encoder(CAPTIONS).items():
        for row, one in zip(rows, alone, strict=True):
            assert torch.equal(row[: len(one[key][0])], one[key][0])
            assert not row[len(one[key][0]) :].any(), "behind shorter texts are zeros"
    most = CaptionEncoder(case.family, parts)(CAPTIONS[3:])["hidden"].shape[1]
    assert (alone[3]["hidden"].shape[1] < most) == (length is not None), "negative control: the default"
    few = [one["hidden"][:, : alone[1]["hidden"].shape[1]] for one in alone[:2]]
    assert not torch.allclose(*few, atol=1e-4), "negative control"


SIGMAS = [0.6, 0.3]


def first_half(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[: len(value) // 2] for name, value in given.items()}


def sampled_from(pipe: Any, family: Family, prompt: str, scale: float, **asked: Any) -> Any:
    """A pipeline's own call from noise of a seed, at levels between the ends."""
    noise = start_noise(pipe, family)
    return pipe(prompt=[prompt], latents=family.start(noise), height=32, width=64, sigmas=SIGMAS, output_type="latent",
                **family.guided(pipe, scale, 1), **asked)  # fmt: skip


def start_noise(pipe: Any, family: Family) -> torch.Tensor:
    return torch.randn(1, *family.start_shape(pipe, (64, 32)), generator=torch.Generator().manual_seed(7))


def predicted(
    pipe: Any, family: Family, embedded: Mapping[str, torch.Tensor], x_t: torch.Tensor | None = None, step: int = 0
) -> torch.Tensor:
    """What the family makes of the network at one of those levels."""
    x_t = start_noise(pipe, family) if x_t is None else x_t
    timestep = pipe.scheduler.timesteps[step : step + 1].float()
    return family.predict(getattr(pipe, family.network), x_t, timestep, family.inputs(embedded, None, "cpu"))


@each
def test_network_gets_and_returns_what_its_pipeline_has(name: str, pipes: Mapping[str, Any]) -> None:
    """Without guidance, in two steps: bit for bit in the first; the second has x + (sigma' - sigma) flow, which shows the flow's sign."""
    case, pipe = CASES[name], pipes[name]
    first, second = network_calls(pipe, case.family, lambda: sampled_from(pipe, case.family, "a red disc", 1.0))
    parts = {part: getattr(pipe, part) for part in case.family.text_parts if getattr(pipe, part) is not None}
    embedded, flows = CaptionEncoder(case.family, parts)(["a red disc"]), list[torch.Tensor]()
    ((ours, output),) = network_calls(pipe, case.family, lambda: flows.append(predicted(pipe, case.family, embedded)))
    assert ours.keys() == first[0].keys()
    for key, value in first[0].items():
        assert torch.equal(ours[key], value.to(ours[key].dtype)), key
    assert torch.equal(output, first[1])
    start, sigmas = start_noise(pipe, case.family), pipe.scheduler.sigmas
    for sign in (1, -1):
        x_t = start + sign * (sigmas[1] - sigmas[0]) * flows[0]
        ((ours, output),) = network_calls(
            pipe, case.family, lambda x_t=x_t: predicted(pipe, case.family, embedded, x_t, 1)
        )
        assert torch.allclose(output, second[1], rtol=0, atol=1e-4) == (sign > 0), "negative control: the other sign"
    assert torch.equal(ours["timestep"], second[0]["timestep"])


def through(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What a VAE makes of pixels and back: one of videos takes one frame, one without a posterior has no mode."""
    several = isinstance(vae, AutoencoderKLQwenImage)
    found = vae.encode(pixels.unsqueeze(2) if several else pixels)
    back = vae.decode(found.latent if hasattr(found, "latent") else found.latent_dist.mode()).sample
    return back.squeeze(2) if several else back


def zeros(output: Any) -> Any:
    return [torch.zeros_like(one) for one in output] if isinstance(output, list) else torch.zeros_like(output)


@each_family
def test_latents_come_back_through_the_pipeline(name: str, pipes: Mapping[str, Any], bases: Path) -> None:
    case, pipe, base = CASES[name], pipes[name], check_base(str(bases / name))
    pixels = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shape = base.latent_shape((64, 32))
    with torch.no_grad():
        x0 = case.family.encode(pipe.vae, pixels, torch.zeros(1, *shape))
        assert tuple(x0.shape[1:]) == shape
        expected = through(pipe.vae, pixels)
        # A network that returns zeros leaves the latents as they are.
        hook = getattr(pipe, case.family.network).register_forward_hook(lambda *a: (zeros(a[-1][0]),))
        try:
            image = pipe(prompt=["x"], latents=case.family.start(x0), height=32, width=64, num_inference_steps=1, output_type="pt",
                         **case.family.guided(pipe, 1.0, 1)).images  # fmt: skip
        finally:
            hook.remove()
        drawn = case.family.encode(pipe.vae, pixels, torch.ones(1, *shape))
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert torch.equal(drawn, x0) != case.family.draws
    tokens = case.family.image_tokens(pipe.transformer.config, shape)
    (given, _), *_ = network_calls(pipe, case.family, lambda: sampled_from(pipe, case.family, "x", 1.0))
    rows = given["hidden_states"]
    patch = case.family.patch(pipe.transformer.config) if isinstance(case.family, FlowTransformer) else 2
    assert tokens == (rows.shape[1] if rows.ndim == 3 else rows.shape[2] * rows.shape[3] // patch**2)
    step = case.family.pixel_step(base.network_config, base.vae_config)
    assert step * step * tokens == 32 * 64
    odd = case.family.vae_factor(base.vae_config)
    if step > odd:
        with pytest.raises(UserError, match=f"multiple of {step} for this transformer"):
            check_base(str(bases / name), resolution=step + odd)
    assert check_base(str(bases / name), resolution=2 * step)
    assert case.family.native_size(pipe) == (case.native or pipe.default_sample_size * pipe.vae_scale_factor,) * 2


@each
def test_sampling_draws_what_the_stock_pipeline_draws(name: str, pipes: Mapping[str, Any]) -> None:
    case, pipe = CASES[name], pipes[name]
    config = SamplingConfig("tiny", num_inference_steps=2, guidance_scale=3.0, resolution=32, seed=5, device="cpu")
    with torch.no_grad():
        ((ours,),) = generate(pipe, [Request("a red disc", 0)], config)
        g = torch.Generator().manual_seed(image_seed(5, *Request("a red disc", 0).place))
        stock = pipe(prompt="a red disc", height=32, width=32, num_inference_steps=2, generator=g,
                     **{k: v[0] if isinstance(v, list) else v for k, v in case.family.guided(pipe, 3.0, 1).items()})  # fmt: skip
    assert ours.image is not None
    assert ours.image.tobytes() == stock.images[0].tobytes()


@each
@pytest.mark.parametrize("lora", [True, False])
def test_stock_pipeline_reads_what_was_trained(
    name: str, lora: bool, plain: Callable[[str], Trained], settings: Settings, pipes: Mapping[str, Any], bases: Path
) -> None:
    if not lora and name not in WHOLE:
        pytest.skip("the whole network of each family is trained once")
    case, kind = CASES[name], type(pipes[name])
    absent = {part: None for part in case.family.optional if getattr(pipes[name], part) is None}
    if lora:
        out = plain(name).folder
        stock, twice = kind.from_pretrained(bases / name, **absent), Model(str(bases / name)).load_pipeline()
        stock.load_lora_weights(out)
        assert load_lora(twice, out)["alpha"] == 6.0
        torch.testing.assert_close(sampled(twice, case.family), sampled(stock, case.family), rtol=0, atol=1e-5)
    else:
        stock = kind.from_pretrained(trained(settings(name, lora=False, rank=None, use_ema=True)).folder, **absent)
        theirs, own = stock.scheduler.config, pipes[name].scheduler.config
        assert {k: v for k, v in theirs.items() if k[0] != "_"} == {k: v for k, v in own.items() if k[0] != "_"}
    moved = (sampled(stock, case.family) - sampled(pipes[name], case.family)).abs().max()
    assert moved > 1e-2, "negative control: training has changed something"


@pytest.mark.parametrize("name", LISTS_AND_MASKS)
@pytest.mark.parametrize("lora", [True, False])
def test_training_resumes_to_the_bit(name: str, lora: bool, settings: Settings) -> None:
    more = {} if lora else {"lora": False, "rank": None, "use_ema": True}
    config = settings(name, max_train_steps=2, checkpointing_steps=1, **more)
    losses = run(config, progress=False).losses
    out = Path(config.output_dir)
    files = {
        path.relative_to(out): path.read_bytes()
        for path in out.glob("**/*.safetensors")
        if "checkpoint" not in str(path)
    }
    config.resume_from_checkpoint = "checkpoint-1"
    assert run(config, progress=False).losses == losses
    assert files
    assert all((out / path).read_bytes() == data for path, data in files.items())
    assert losses[0] != losses[1], "negative control"


@each_family
def test_memory_is_predicted_without_weights(name: str, settings: Settings, bases: Path) -> None:
    base, size = check_base(str(bases / name)), (32, 32)
    found = footprint.predict(settings(name, validation_prompts=["a disc"]), base, size)
    count = sum(p.numel() for p in base.load("transformer").parameters())
    assert found.weights == 4 * (count + found.trained) and found.gradients == 4 * found.trained
    assert 0 < found.gradients < found.weights / 5
    assert found.sampling > 0 < found.activations
    if name in LISTS_AND_MASKS:
        whole, larger = (
            footprint.predict(settings(name, lora=False, rank=None), base, sides) for sides in (size, (64, 64))
        )
        assert whole.gradients == whole.weights == 4 * count and whole.sampling == 0
        assert larger.activations > whole.activations


def test_distilled_klein_is_sent_to_its_base(bases: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases / "klein", tmp_path / "distilled"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    with pytest.raises(UserError, match=r"distilled to a few steps.*FLUX.2-klein-base-4B: the LoRA serves both"):
        check_base(str(folder))
    pipe = Model(str(folder)).load_pipeline()
    with pytest.raises(UserError, match="no unconditional half"):
        guidance_of(pipe)
    assert guidance_of(Model(str(bases / "klein")).load_pipeline()).halves == "calls", "negative control: the base"


@each_family
def test_buckets_cache_checkpointing_and_looks_go_together(
    name: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run with all of them, of a LoKr; from the cache, and with no activation kept, its losses have the same bits."""
    monkeypatch.setattr(validation, "INFERENCE_STEPS", 2)
    buckets = {"aspect_ratio_buckets": "32,48;32,32;48,32", "lora_kind": "lokr", "max_train_steps": 2}
    losses = run(settings(name, **buckets), progress=False).losses
    cache = {"latent_cache_dir": str(tmp_path / "cache"), "gradient_checkpointing": True}
    looks = {"validation_prompts": ["a disc"], "num_validation_images": 1, "validation_steps": 2, "probe_steps": 2, "probe_images": 2}  # fmt: skip
    seen = run(settings(name, **buckets, **cache, **looks), progress=False)
    assert seen.losses == losses
    assert seen.evaluations[0]["guard_score"] > 0
    assert list((Path(seen.output) / "validation").glob("*.png"))
    if name in ("z-image", "sana"):  # texts of several lengths, latents that nothing is drawn for
        assert run(settings(name, **buckets, **cache), progress=False).losses == losses, "read from disk"
    assert losses[0] != losses[1], "negative control"


@each_family
def test_parts_that_do_not_belong_together_are_refused(name: str, bases: Path, tmp_path: Path) -> None:
    case = CASES[name]
    for part, key, value, words in case.damage:
        folder = Path(shutil.copytree(bases / name, tmp_path / f"{part}-{key}-{value}"))
        (file,) = [*folder.glob(f"{part}/config.json"), *folder.glob(f"{part}/scheduler_config.json")]
        known = json.loads(file.read_text())
        assert key in known
        known = {**known, key: value} if value is not None else {k: v for k, v in known.items() if k != key}
        file.write_text(json.dumps(known))
        with pytest.raises(UserError, match=words) as caught:
            check_base(str(folder), lora=True)
        assert "\n" not in str(caught.value)
    assert check_base(str(bases / name)).family is case.family, "negative control: the base itself is taken"


@each_family
def test_usual_guidance_is_that_of_the_pipeline(name: str, pipes: Mapping[str, Any]) -> None:
    """Sampled without a scale: the images of its own call, but of FLUX.1, which has no true guidance by default."""
    case, pipe = CASES[name], pipes[name]
    with torch.no_grad():
        ((ours,),), ((other,),) = (
            generate(pipe, [Request("a red disc", 0)], SamplingConfig("tiny", num_inference_steps=1, guidance_scale=scale, resolution=32, seed=5, device="cpu"))
            for scale in (None, 1.5)
        )  # fmt: skip
        g = torch.Generator().manual_seed(image_seed(5, *Request("a red disc", 0).place))
        own = {
            FLUX: {"true_cfg_scale": 2.0, "negative_prompt": ""},
            QWEN_IMAGE: {"negative_prompt": ""},
            SANA: {"use_resolution_binning": False},
        }.get(case.family, {})
        stock = pipe(prompt="a red disc", height=32, width=32, num_inference_steps=1, generator=g, **own)
    assert ours.image is not None and other.image is not None
    assert ours.image.tobytes() == stock.images[0].tobytes() != other.image.tobytes()


def test_models_page_has_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| yes", page, re.M)
    assert rows == [family.name for family in FAMILIES]
    scales = re.findall(r"^\| [^|]+ \| yes.*\| ([\d.]+) \|$", page, re.M)
    assert scales == [f"{family.usual_scale:g}" for family in FAMILIES]
    assert {case.family for case in CASES.values()} == {family for family in FAMILIES if family.flow}


@pytest.mark.parametrize("name", ["z-image", "sana"])
def test_start_noise_is_exact_in_half_precision(name: str) -> None:
    """Where a pipeline in bfloat16 draws its noise in float32, its images come from all of it."""
    pipe = CASES[name].make().to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    config = SamplingConfig("tiny", num_inference_steps=1, guidance_scale=3.0, resolution=32, seed=5, device="cpu")
    (noise,) = in_batches(pipe, [Request("x", 0)], config, lambda batch, options: [options["latents"]])
    drawn = list[torch.Tensor]()
    known = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **given: drawn.append(known(*args, **given)) or drawn[-1]
    g = torch.Generator().manual_seed(image_seed(5, *Request("x", 0).place))
    pipe(
        prompt=["x"], height=32, width=32, num_inference_steps=1, generator=g, **CASES[name].family.guided(pipe, 3.0, 1)
    )
    assert torch.equal(noise[0], drawn[0])
    assert not torch.equal(noise[0], noise[0].bfloat16().float()), "negative control"


def test_two_families_of_one_text_encoder_share_no_cache(tmp_path: Path) -> None:
    model, stores = tiny_more.tiny_gemma(24), []
    for family in (LUMINA2, SANA, SANA, SANA.trained_with(64, None)):
        encoder = CaptionEncoder(family, {"text_encoder": model, "tokenizer": tiny_more.tiny_gemma_tokenizer()})
        stores.append(fill_captions(tmp_path, encoder, ["a cat"], PartialState(), progress=False))
    assert stores[0].folder != stores[1].folder == stores[2].folder != stores[3].folder
    lengths = [store.read([entry_id("a cat")])[0]["hidden"].shape[0] for store in stores]
    assert lengths == [256, 300, 300, 64]


def test_held_captions_of_any_length_stay_within_the_limit() -> None:
    pipe = tiny_more.tiny_z_image_pipeline()
    encoder = CaptionEncoder(Z_IMAGE, {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer})
    empty = sum(value.nbytes for value in encoder.encode("").values())
    texts = ["a caption of many words, " * 5] * 3
    assert not encoder.hold(texts, limit=3 * empty)  # enough for two like the empty one
    assert encoder.held == {}
    assert encoder.hold(texts, limit=20 * empty), "negative control"


def test_caption_noise_of_a_sample_is_its_own_in_any_batch() -> None:
    images = ImageDataset([b"", b""], ["a", "b"], ["a.png", "b.png"], "my-images")
    stream = SampleStream(count=2, seed=0)
    noisy = CaptionAugmentation("gn", 1.0, 0.1, images=images, stream=stream, tokenizer=None)
    short, long = ({"hidden": torch.zeros(n, 4), "mask": torch.ones(n, dtype=torch.long)} for n in (2, 5))
    both = noisy.embeddings(stacked([short, long]), ["a", "b"], [0, 1])
    alone = noisy.embeddings(stacked([short]), ["a"], [0])
    assert torch.equal(both["hidden"][0, :2], alone["hidden"][0])
    assert not both["hidden"][0, 2:].any()
    assert both["mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert both["hidden"][1].abs().min() > 0, "negative control"


def test_predicted_memory_counts_the_longest_texts(settings: Settings, bases: Path) -> None:
    """Networks that read lengths off a mask, which fake tensors do not have, are acted out too."""
    config, base = settings("z-image"), check_base(str(bases / "z-image"))
    outlines, tokenizer = footprint._outlines(config, base, None), base.load("tokenizer")
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = {part: footprint._fake(outline) for part, outline in outlines.items()} | {"tokenizer": tokenizer}
        act = footprint._Act(config, base, parts, (32, 32), None)
        assert act.embedded["hidden"].shape[1] < 32, "the empty caption is short"
        assert act._repeated(2)["hidden"].shape == (2, 512, 24)
    found = footprint.predict(settings("lumina2", train_batch_size=1), check_base(str(bases / "lumina2")), (32, 32))
    assert found.activations > 256 * 32 * 4, "more than the text's rows once"
