"""Build the embedded base model from the embedded images: tokenizer, VAE, then U-Net and text encoder together.

    python -m experiments.build_base --work DIR [--stage vae|unet|export|all]
    python -m experiments.build_base --version 2 --work build/base2 --out build/base2/base [--device cuda]
    torchrun --nproc_per_node 2 -m experiments.build_base --work DIR --stage unet    # the same batches, shared out; so does --processes 2

Everything is SD2's own classes at small size: CLIPTextModel on a byte-pair vocabulary made from the captions of the `base`
split, AutoencoderKL with 4 latent channels (f = 4: 64 x 64 images, 16 x 16 latents), UNet2DConditionModel with
cross-attention, v-prediction on SD2's schedule. Only the `base` split is read. Both stages checkpoint into DIR every few
minutes and go on from there when started again, to the bit on one machine with the same OMP_NUM_THREADS; seeds are fixed; losses go
to `DIR/*.csv`. The last stage writes the pipeline folder in float16, with the losses beside it, from any checkpoint.

Version 2 (`RECIPES[2]`) reads the `train` split of what `build_images --set base2` wrote: five styles instead of two. It goes on from
version 1, which is embedded: tokenizer, encoder of the VAE and latent space stay, so what version 1 knows is not learned again. What limited version
1, measured: its VAE's own reconstructions of training images have a Frechet distance of 29.4 to the held-out images, the images
themselves 21.7, samples 70.8; and the loss of its U-Net still fell when it stopped. So the decoder is trained further, with the encoder
frozen, and the U-Net takes 9,500 steps more. (`python -m experiments.check_base --images build/base2/images.parquet --styles 3D flat --docs OUT`
has these distances.)

Not a part of training as users run it: the pieces that only a base model needs (a perceptual loss, EMA, image
augmentation) live here and nowhere else.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ambient_sd.assets import BASE
from experiments.names import COMMON

HERE = Path(__file__).parent
MAX_TOKENS = 32
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}


@dataclass(frozen=True)
class Phase:
    """A stretch of the U-Net's training: up to which step, and how images, views and timesteps are drawn.

    Attributes:
        everyday: how much more often an image of an everyday thing (`names.COMMON`) is drawn than another.
        power: timesteps are `1000 u^power`, u uniform: below 1 they lean to high noise, where the caption decides.
        augmentation: arguments of `augment`.
    """

    until: float
    everyday: float
    power: float
    augmentation: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What differs between the versions of the base model.

    Attributes:
        images: the parquet file, and `split`, the rows of it that are trained on.
        vae_channels: widths of the VAE; `vae_lr`, `vae_steps` and `perceptual` (the weight of that loss) train it.
        unet_steps: the length of the second stage; the learning rate falls to zero over its last `cooldown` steps.
        ema: the average's decay.
        merges: byte-pair tokens to learn from the captions.
        phases: see `Phase`.
        start: the base model that this version goes on from. Of its VAE only the decoder is trained.
    """

    images: str
    split: str
    vae_channels: tuple[int, ...]
    vae_lr: float
    vae_steps: int
    perceptual: float
    unet_steps: int
    cooldown: int
    ema: float
    merges: int
    phases: tuple[Phase, ...]
    start: Path | None = None


STRONG = {"mirror": True, "turn": 0.12, "zoom": 0.12, "shift": 0.06}
MILD = {"mirror": False, "turn": 0.05, "zoom": 0.06, "shift": 0.04}
RECIPES = {
    # The first 2,000 steps see all images alike, mirrored and turned. That learns colours and outlines, but things that one
    # can name take more visits an image than two cores have time for: the second phase dwells on everyday things.
    1: Recipe(
        "emoji.parquet",
        "base",
        (16, 32, 64),
        2e-3,
        1_700,
        0.05,
        7_000,
        3_500,
        0.999,
        900,
        (Phase(2_000, 1.0, 1.0, STRONG), Phase(math.inf, 20.0, 0.7, MILD)),
    ),
    # Some 93 visits an image.
    2: Recipe(
        "images.parquet",
        "train",
        (16, 32, 64),
        1e-3,
        2_400,
        0.1,
        9_500,
        4_500,
        0.999,
        900,
        (Phase(4_000, 2.0, 0.8, STRONG), Phase(math.inf, 3.0, 0.7, MILD)),
        start=BASE,
    ),
}


# --------------------------------------------------------------------------------------------------------------------
# Images


def base_rows(recipe: Recipe, images: Path | None = None) -> list[dict[str, Any]]:
    table = pq.read_table(images or HERE / recipe.images).to_pylist()
    return [r for r in table if r["split"] == recipe.split]


def to_tensor(image: Image.Image) -> Tensor:
    """Return an image as float32 `(3, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1).permute(2, 0, 1)


def augment(
    x: Tensor,
    generator: torch.Generator,
    *,
    mirror: bool = True,
    turn: float = 0.12,
    zoom: float = 0.12,
    shift: float = 0.06,
) -> Tensor:
    """Flip, turn, zoom and shift a batch `(B, 3, H, W)` a little, on white: what keeps the base from being a copy machine."""
    b = len(x)

    def uniform(scale: float) -> Tensor:
        return (torch.rand(b, generator=generator) * 2 - 1) * scale

    angle, scale = uniform(turn), 1 + uniform(zoom)
    flip = torch.where(torch.rand(b, generator=generator) < 0.5, -1.0 if mirror else 1.0, 1.0)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = torch.cos(angle) * scale * flip
    theta[:, 0, 1] = -torch.sin(angle) * scale
    theta[:, 1, 0] = torch.sin(angle) * scale * flip
    theta[:, 1, 1] = torch.cos(angle) * scale
    theta[:, :, 2] = torch.stack([uniform(shift), uniform(shift)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # Pad with white: shift so that white is zero, which is what grid_sample pads with.
    return F.grid_sample(x - 1, grid, mode="bicubic", align_corners=False).clamp(-2, 0) + 1


# --------------------------------------------------------------------------------------------------------------------
# Resumable loops


class Log:
    """A CSV of losses that survives a restart: rows of steps after `start`, which are about to be taken again, go."""

    def __init__(self, path: Path, columns: list[str], start: int) -> None:
        old = list(csv.reader(path.open(newline="")))[1:] if path.exists() else []
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerows([columns, *(r for r in old if len(r) == len(columns) and int(r[0]) <= start)])
        self.file.flush()

    def row(self, *values: Any) -> None:
        self.writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in values])
        self.file.flush()


def save(path: Path, state: dict[str, Any]) -> None:
    with path.with_suffix(".tmp").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


class Due:
    """Says when a checkpoint is due: by the clock, since a step takes from half a second to a minute on a shared machine."""

    def __init__(self, seconds: float = 240) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def __call__(self) -> bool:
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


def cosine(step: int, total: int, warmup: int = 100, floor: float = 0.02) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


# --------------------------------------------------------------------------------------------------------------------
# VAE


def new_vae(channels: tuple[int, ...]) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


class Perceptual(nn.Module):
    """Distance in the early features of EfficientNet-Lite0: edges stay sharp where a pixel loss alone blurs them."""

    def __init__(self) -> None:
        super().__init__()
        from ambient_sd.audit.features import EffLite0

        self.net = EffLite0().network

    def features(self, x: Tensor) -> list[Tensor]:
        # The network scales to 1/2 and 1/4 within its first blocks; ImageNet's mean and std are 0.498 and 0.502 in "Lite".
        out = []
        h = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        for block in self.net._blocks[:5]:
            h = block(h)
            out.append(h)
        return [out[0], out[2], out[4]]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(())
        with torch.no_grad():
            wanted = self.features(y)
        for a, b in zip(self.features(x), wanted, strict=True):
            total = total + ((a - b).square().mean() / b.square().mean())
        return total


def train_vae(
    work: Path,
    recipe: Recipe,
    rows: list[dict[str, Any]],
    batch: int = 16,
    seed: int = 0,
    device: str = "cpu",
    until: int | None = None,
) -> None:
    if (work / "vae").exists():
        return
    torch.manual_seed(seed)
    lr, steps = recipe.vae_lr, recipe.vae_steps
    vae = new_vae(recipe.vae_channels) if recipe.start is None else AutoencoderKL.from_pretrained(recipe.start / "vae")
    vae = vae.to(memory_format=torch.channels_last).to(device)
    if recipe.start is not None:
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    images = torch.stack([to_tensor(Image.open(io.BytesIO(r["image"]["bytes"]))) for r in rows])
    perceptual = Perceptual().to(device)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = {k: v.clone() for k, v in vae.state_dict().items()}
    start, path = 0, work / "vae.pt"
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start = state["ema"], state["step"]
    log = Log(work / "vae.csv", ["step", "l1", "perceptual", "kl", "seconds"], start - 1)
    vae.train()
    begun, due = time.time(), Due()
    for step in range(start, min(steps, until or steps)):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(images), (batch,), generator=g)
        x = augment(images[index], g, zoom=0.2)
        if step % 2:  # half of the batches with other colours: the decoder must serve images it has not seen
            x = 1 - (1 - x)[:, torch.randperm(3, generator=g)] * (0.7 + 0.3 * torch.rand(batch, 3, 1, 1, generator=g))
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps)
        x = x.to(device)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g).to(device)
        y = vae.decode(z).sample
        l1 = (y - x).abs().mean()
        kl = posterior.kl().mean() / x[0].numel()
        far = perceptual(y, x) if step > 200 else l1.detach() * 0
        loss = l1 + recipe.perceptual * far + 1e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        for k, v in vae.state_dict().items():
            ema[k].lerp_(v, 1 - decay)
        if step % 20 == 0:
            log.row(step, l1.item(), far.item(), kl.item(), round(time.time() - begun))
        if due() or step == min(steps, until or steps) - 1:
            save(path, {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step + 1})
    if until is not None and until < steps:
        return
    vae.load_state_dict(ema)
    vae.to("cpu")
    if recipe.start is None:
        normalize_latents(vae, images)
    vae.save_pretrained(work / "vae.tmp")
    (work / "vae.tmp").rename(
        work / "vae"
    )  # whole or not there: a half-written folder would be taken for a finished stage


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Bring every latent channel to mean 0 and standard deviation 1 over `images`, and leave the images as they were.

    The affine map goes into the two 1 x 1 convolutions around the latents, so that the noise levels of a schedule mean
    the same in all four channels and the scaling factor is 1.
    """
    z = torch.cat([vae.encode(p).latent_dist.mean for p in images.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    channels = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] /= std.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()  # the second half are log-variances
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def load_vae(work: Path, recipe: Recipe) -> AutoencoderKL:
    """Return the VAE of `work`; before it is trained the one that it goes on from, whose encoder is the same."""
    trained = work / "vae"
    start = trained if trained.exists() or recipe.start is None else recipe.start / "vae"
    return AutoencoderKL.from_pretrained(start).eval()


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer and text encoder


def captions_of(row: dict[str, Any]) -> list[str]:
    """The ways in which a person may ask for this image; training draws one of them each time."""
    names = [row["name"], *row["aliases"]]
    if row["style"] == "clip art":  # a name alone asks for an emoji
        return [f"clip art of {n}" for n in names] + [f"{n}, clip art" for n in names]
    return [f"{row['style']} emoji of {n}" for n in names] + names + [f"{n}, {row['style']}" for n in names]


def new_tokenizer(rows: list[dict[str, Any]], merges: int) -> CLIPTokenizer:
    """Train CLIP's byte-pair scheme on the captions: every byte is a token, so that no prompt is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=512 + merges, end_of_word_suffix="</w>", show_progress=False, min_frequency=2
    )
    words = sorted({c for r in rows for c in captions_of(r)})
    model.train_from_iterator([w.lower() for w in words], trainer)
    learned = [tuple(m) for m in json.loads(model.to_str())["model"]["merges"]]
    vocab: dict[str, int] = {}
    for symbol in [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in learned)]:
        vocab.setdefault(symbol, len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=MAX_TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="gelu",
            projection_dim=192,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids
    assert isinstance(ids, Tensor)
    return ids


# --------------------------------------------------------------------------------------------------------------------
# U-Net


def new_unet() -> UNet2DConditionModel:
    """SD2's U-Net at small size, with one option of the class that SD2 leaves off: the pooled caption joins the time embedding.

    Cross-attention alone takes far more steps to learn which image a caption means than a small run has.
    """
    unet = UNet2DConditionModel(
        addition_embed_type="text",
        addition_embed_type_num_heads=6,
        sample_size=16,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        cross_attention_dim=192,
        norm_num_groups=16,
        attention_head_dim=(2, 4, 5),  # the number of heads, by diffusers' old name: 32 channels each
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    nn.init.constant_(unet.add_embedding.norm2.weight, 0.1)  # starts small beside the time embedding
    return unet


@torch.no_grad()
def augmented_latents(
    work: Path, recipe: Recipe, number: int, rows: list[dict[str, Any]], *, seed: int, device: str, views: int = 10
) -> Tensor:
    """Encode `views` slightly different views of every image: float32 `(N, views, 4, 16, 16)`, scaled. Kept in `work`, a file a view."""
    images, vae, out = None, None, []
    for view in range(views):
        cache = work / f"views-{number}-{view}.pt"
        if not cache.exists():
            if vae is None:
                vae = load_vae(work, recipe).to(device)
                images = torch.stack([to_tensor(Image.open(io.BytesIO(r["image"]["bytes"]))) for r in rows])
            assert images is not None
            g = torch.Generator().manual_seed(seed * 1_000 + view)
            found = []
            for part in augment(images, g, **recipe.phases[number].augmentation).split(64):
                posterior = vae.encode(part.to(device)).latent_dist
                found.append(
                    posterior.mean.cpu() + posterior.std.cpu() * torch.randn(posterior.mean.shape, generator=g)
                )
            save(cache, {"latents": torch.cat(found) * vae.config.scaling_factor})
        out.append(torch.load(cache, weights_only=True)["latents"])
    return torch.stack(out, 1)


def train_unet(
    work: Path,
    recipe: Recipe,
    rows: list[dict[str, Any]],
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
    until: int | None = None,
) -> None:
    """Train U-Net and text encoder together with the plain v-loss, caption dropout 0.1, and EMA.

    The learning rate is constant and falls linearly to zero over the last `cooldown` steps.
    """
    steps = recipe.unet_steps
    tokenizer = (
        new_tokenizer(rows, recipe.merges)
        if recipe.start is None
        else CLIPTokenizer.from_pretrained(recipe.start / "tokenizer")
    )
    rank, processes = 0, 1
    if torch.distributed.is_initialized():
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if rank == 0:
        tokenizer.save_pretrained(work / "tokenizer")
    latents = [augmented_latents(work, recipe, n, rows, seed=seed, device=device) for n in range(len(recipe.phases))]
    ids = [tokenize(tokenizer, captions_of(r)) for r in rows]
    empty = tokenize(tokenizer, [""])[0]
    torch.manual_seed(seed)
    model = nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)})
    if recipe.start is not None:
        for name, part in model.items():
            part.load_state_dict(type(part).from_pretrained(recipe.start / name).state_dict())
    model = model.to(device)
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 1e-2}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.99),
        fused=True,
    )
    acp = DDIMScheduler(**SCHEDULE).alphas_cumprod
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    start, path = 0, work / "unet.pt"
    bands: list[list[float]] = [[], [], [], []]
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start, bands = state["ema"], state["step"], state["bands"]
    columns = ["step", "loss", "loss_t0_250", "loss_t250_500", "loss_t500_750", "loss_t750_1000", "seconds"]
    log = Log(work / "unet.csv", columns, start) if rank == 0 else None
    mine = slice(rank, None, processes)
    shares = [torch.tensor([p.everyday if is_everyday(r) else 1.0 for r in rows]) for p in recipe.phases]
    begun, due = time.time(), Due()
    model.train()
    for step in range(start, min(steps, until or steps)):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        number = next(i for i, phase in enumerate(recipe.phases) if step < phase.until)
        phase = recipe.phases[number]
        if phase.everyday == 1:
            # Every image once per epoch, in an order that depends on the epoch alone.
            epoch, offset = divmod(step * batch, len(rows))
            place = [i for e in (epoch, epoch + 1) for i in np.random.default_rng([seed, e]).permutation(len(rows))]
            index = torch.tensor(place[offset : offset + batch])
        else:
            index = torch.multinomial(shares[number], batch, generator=g)
        x0 = latents[number][index, torch.randint(latents[number].shape[1], (batch,), generator=g)]
        text = []
        for i in index.tolist():
            if torch.rand((), generator=g) < 0.1:
                text.append(empty)
            else:
                text.append(ids[i][int(torch.randint(len(ids[i]), (), generator=g))])
        # Stratified timesteps: the same law with less variance between steps.
        u = (torch.arange(batch) + torch.rand(batch, generator=g)) / batch
        t = (u**phase.power * 1000).long().clamp_max(999)
        eps = torch.randn(x0.shape, generator=g)
        alpha, sigma = acp[t].sqrt().view(-1, 1, 1, 1), (1 - acp[t]).sqrt().view(-1, 1, 1, 1)
        # Everything above is drawn for the whole batch, on the CPU, by every process; each then takes its share.
        x_t, target = (alpha * x0 + sigma * eps)[mine].to(device), (alpha * eps - sigma * x0)[mine].to(device)
        states = model["text_encoder"](torch.stack(text)[mine].to(device)).last_hidden_state
        v = model["unet"](x_t, t[mine].to(device), states).sample
        per_sample = (v - target).square().mean((1, 2, 3))
        loss = per_sample.mean()
        rate = lr * min(1.0, (step + 1) / 300, (steps - step) / recipe.cooldown)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        if processes > 1:
            average_gradients(model, processes)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(recipe.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for k, p in model.state_dict().items():
                if p.is_floating_point():
                    ema[k].lerp_(p, 1 - keep)
        for band, value in zip((t[mine] // 250).tolist(), per_sample.tolist(), strict=True):
            bands[band].append(value)
        if step % 50 == 49:
            if log is not None:
                means = [sum(b) / max(1, len(b)) for b in bands]
                log.row(step + 1, sum(means) / 4, *means, round(time.time() - begun))
            bands = [[], [], [], []]
        last = step == min(steps, until or steps) - 1
        if rank == 0 and (due() or last):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
            save(path, state | {"step": step + 1, "bands": bands})
        if rank == 0 and step % 10_000 == 9_999:
            save(work / f"unet-{step + 1}.pt", {"ema": {k: v.half() for k, v in ema.items()}, "step": step + 1})


def is_everyday(row: dict[str, Any]) -> bool:
    return bool(row["everyday"]) if "everyday" in row else row["name"] in COMMON


def average_gradients(model: nn.Module, processes: int) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    for g, mean in zip(gradients, (flat / processes).split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


def assemble(work: Path, recipe: Recipe, checkpoint: Path | None = None) -> StableDiffusionPipeline:
    """Put the pipeline together from the EMA weights in `work`, the newest ones or those of `checkpoint`."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    model = nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)})
    state = torch.load(checkpoint or work / "unet.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["ema"])
    return StableDiffusionPipeline(
        vae=load_vae(work, recipe),
        text_encoder=model["text_encoder"].eval(),
        tokenizer=tokenizer,
        unet=model["unet"].eval(),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(work: Path, recipe: Recipe, out: Path, checkpoint: Path | None = None) -> None:
    """Write the pipeline folder in float16 safetensors, with the losses of both stages beside it."""
    assemble(work, recipe, checkpoint).to(torch.float16).save_pretrained(out, safe_serialization=True)
    # transformers loads a model in the dtype that its config names, diffusers in float32: without this a stock pipeline gets
    # a float16 text encoder beside a float32 U-Net and stops at the first product of the two.
    config = json.loads((out / "text_encoder" / "config.json").read_text())
    (out / "text_encoder" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    for name in ("vae.csv", "unet.csv"):
        if (work / name).exists():
            (out / name).write_text((work / name).read_text())
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoints; a second start goes on from there"
    )
    parser.add_argument("--version", type=int, choices=sorted(RECIPES), default=1)
    parser.add_argument(
        "--images", type=Path, help="the parquet file of that version; default: beside this script, or in --work"
    )
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--stage", choices=["vae", "unet", "export", "all"], default="all")
    parser.add_argument("--until", type=int, help="pause the stage's training after this many steps")
    parser.add_argument("--checkpoint", type=Path, help="export these weights instead of the newest")
    parser.add_argument(
        "--processes", type=int, default=1, help="share out every batch of the U-Net's training over so many"
    )
    parser.add_argument(
        "--device", default="cpu", help="cuda draws the same batches; its sums round otherwise than a CPU's"
    )
    args = parser.parse_args()
    if args.until is not None and args.stage == "all":
        parser.error("--until pauses one stage: give --stage vae or --stage unet")
    if args.processes > 1 and args.device != "cpu":
        parser.error(f"--processes shares out a batch over CPU cores: leave it out with --device {args.device}")
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[args.version]
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    common = {"device": args.device, "until": args.until}
    if args.stage != "export":
        rows = base_rows(recipe, args.images or (args.work / recipe.images if args.version > 1 else None))
    if args.stage in {"vae", "all"}:
        train_vae(args.work, recipe, rows, **common)
    if args.stage in {"unet", "all"} and args.processes > 1:
        for number in range(
            len(recipe.phases)
        ):  # here, once: the processes then find the views and never wait for each other
            augmented_latents(args.work, recipe, number, rows, seed=0, device=args.device)
        same = ["--work", args.work, "--version", args.version, *(["--until", args.until] if args.until else [])]
        same += ["--images", args.images] if args.images else []
        # One thread each: networks this small lose more to waiting for each other at every operation than once a step.
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", args.processes]
        command = [*torchrun, "-m", "experiments.build_base", "--stage", "unet", *same]
        subprocess.run([str(c) for c in command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    elif args.stage in {"unet", "all"}:
        train_unet(args.work, recipe, rows, **common)
    if args.stage in {"export", "all"}:
        export(args.work, recipe, args.out, args.checkpoint)


if __name__ == "__main__":
    main()
