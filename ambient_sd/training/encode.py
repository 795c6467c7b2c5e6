"""Images to latents and captions to embeddings, once for a run where they never change: in memory, on disk, or on the fly.

    held      in memory, if all of them fit; each process encodes its share
    cached    in `latent_cache_dir`, computed once for this run and later ones, read through memory mapping
    else      as they come up: random crops, or more than fits

The latent of an image has the id (content of the image, VAE draw: crop corner, mirrored or not, group), in a folder
for one VAE, resolution and noise seed; the embedding of a caption the id (caption), in a folder for one text encoder and
tokenizer. `ambient_sd.data.cache` says why nothing in there can be stale. Processes fill the cache in rounds of equal shares
and meet after each, so that none waits for long; an interrupted fill continues after its whole shards.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ambient_sd.data import latents
from ambient_sd.data.cache import SHARD_BYTES, Store, entry_id, fingerprint
from ambient_sd.data.captions import without
from ambient_sd.data.sources import ImageDataset
from ambient_sd.data.stream import SampleStream
from ambient_sd.data.views import Samples, View, ViewRule
from ambient_sd.families.encoders import CaptionEncoder, ImageEncoder, stacked
from ambient_sd.training.caption_augmentation import LIVE
from ambient_sd.training.plan import Plan
from ambient_sd.utils.errors import UserError

logger = logging.getLogger(__name__)

_VERSION = 1  # of what turns an image into pixels and a caption into tokens; a change of either must raise it
_FLUSH_SECONDS = 60.0  # a slow machine writes smaller shards: an interruption costs a minute, not a shard
_MAX_ROWS = 1024


class Encoder:
    """Give the latents and caption embeddings of a run; what never changes is computed here, once.

    To be built by every process. VAE and text encoders leave the device, or memory, where nothing needs them any more.

    Args:
        plan: the run.
        rule: of the views.
        stream: the run's samples.
        accelerator: who is here.
        progress: show bars.
        beside: of the training images; this one is of the run's class images, and shares text encoders that are trained.

    Attributes:
        image_encoder, caption_encoder: frozen; without prompts and probe they may be gone.

    Example:
        >>> from accelerate import PartialState
        >>> from ambient_sd.assets import BASE, IMAGES
        >>> from ambient_sd.training.config import TrainConfig
        >>> from ambient_sd.training.plan import plan_run
        >>> plan = plan_run(TrainConfig(str(BASE), train_data_dir=str(IMAGES), max_train_samples=3, resolution=64))
        >>> rule = ViewRule(resolution=64, center_crop=True, random_flip=False, per_image=True, noise_seed=0)
        >>> encoder = Encoder(plan, rule, SampleStream(3, seed=0), PartialState(), progress=False)
        >>> encoder.latents([0, 1]).shape
        torch.Size([2, 4, 16, 16])
    """

    def __init__(
        self,
        plan: Plan,
        rule: ViewRule,
        stream: SampleStream,
        accelerator: Accelerator,
        *,
        progress: bool,
        beside: Encoder | None = None,
    ) -> None:
        images = plan.images if beside is None or plan.prior is None else plan.prior.images
        self.config, self.images, self.rule, self.stream = plan.config, images, rule, stream
        self.accelerator, self.progress = accelerator, progress
        # Tells whether texts are made up on the way, and so are encoded on the way.
        self._captions_change = beside is None and plan.config.caption_mitigation in LIVE
        self.shapes = [plan.base.latent_shape(rule.target(key)) for key in images.noise_keys]
        if beside is not None and plan.config.train_text_encoder:
            self.caption_encoder: CaptionEncoder = beside.caption_encoder
        else:
            half = getattr(accelerator, "mixed_precision", "no") != "no" and not plan.config.train_text_encoder
            self.caption_encoder = plan.base.captions(half).to(accelerator.device)
        self._embed = self._embed_once()
        # Only now: where the text encoders are done they are off the device, and the largest of them are larger than the network.
        self.image_encoder: Any = plan.base.images().to(accelerator.device)
        self._cached = self._cache_latents()
        self._held = self._hold_latents() if self._cached is None else None
        looked_at = beside is None and (plan.prompts or plan.config.probe_steps is not None)
        if not looked_at and not plan.config.train_text_encoder:
            # Whatever is kept makes its maker superfluous.
            if self._held is not None or self._cached is not None:
                self.image_encoder = None
            if (self.caption_encoder.held or self._embed is not self.caption_encoder) and not self._captions_change:
                self.caption_encoder.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def embed(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the embeddings of captions: `hidden` (B, L, D), of SDXL also `pooled` (B, P), float32.

        Those made on the way are on the device, all others on the CPU. They have a gradient where the text encoders are trained.
        """
        return self._embed(captions)

    def latents(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the latents of some images of one shape, (B, C, h, w); to be called by every process."""
        if self._held is not None:
            return torch.stack([self._held[i] for i in rows])
        if self._cached is not None:
            fixed = SampleStream(len(self.images), 0)  # as in `encode_all`
            keys = self.images.noise_keys
            return torch.stack([self._cached.latent(i, self.rule.view(keys[i], fixed, 0)) for i in rows])
        return self._encode_shared(rows)

    def batches(self, places: Iterable[list[int]]) -> Iterator[tuple[list[int], list[str], torch.Tensor]]:
        """Yield (positions, keys of the images, x0) of each forward pass of this process.

        Args:
            places: positions of the samples of each pass.
        """
        if self._held is not None:
            for positions in places:
                rows = [self.stream.image(p) for p in positions]
                yield positions, [self.images.keys[i] for i in rows], self.latents(rows)
            return
        samples: Dataset[Any] = self._cached or Samples(self.images, self.rule, self.stream)
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=list(places),
            num_workers=self.config.dataloader_num_workers,
            collate_fn=list,
            # Its own generator: the loader would take a number from the global one.
            generator=torch.Generator(),
        )
        for positions, batch in zip(list(loader.batch_sampler), loader, strict=True):  # type: ignore[arg-type]
            if self._cached is not None:
                yield positions, [key for key, _ in batch], torch.stack([x0 for _, x0 in batch])
            else:
                yield (
                    positions,
                    [s.key for s in batch],
                    latents.encode(self.image_encoder, batch, noise_seed=self.config.noise_seed),
                )

    def _embed_once(self) -> Callable[[Sequence[str]], dict[str, torch.Tensor]]:
        """Encode all captions of the images, into the cache or into memory, and return what gives their embeddings."""
        captions, texts = self.caption_encoder, self.images.all_captions
        if left_out := self.config.distill_without:
            texts = list(dict.fromkeys([*texts, *(without(text, left_out) for text in texts)]))
        if self.config.train_text_encoder:
            return captions.embed
        rest = self.accelerator.device if self._captions_change else "cpu"
        if self.config.latent_cache_dir is not None:
            store = fill_captions(
                self.config.latent_cache_dir, captions, texts, self.accelerator, progress=self.progress
            )
            captions.to(rest)
            return CachedCaptions(store, captions if self._captions_change else None)
        if captions.hold(texts, limit=latents.MAX_HELD_BYTES, progress=self.progress):
            captions.to(rest)
        return captions

    def _cache_latents(self) -> CachedLatents | None:
        """Encode all views of the images into the cache, if there is one and the views are finite."""
        if self.config.latent_cache_dir is None:
            return None
        if self.rule.views(self.images) is None:
            if self.accelerator.is_main_process:
                logger.warning(
                    "latents are not cached: each step has random crops of its own; --center_crop fixes them"
                )
            return None
        store = fill_latents(
            self.config.latent_cache_dir,
            self.image_encoder,
            self.images,
            self.rule,
            self.accelerator,
            progress=self.progress,
        )
        self.image_encoder.to("cpu")
        return CachedLatents(store, self.images, self.rule, self.stream)

    def _hold_latents(self) -> list[torch.Tensor] | None:
        """Encode all images into memory, if their views are fixed and they fit."""
        if not self.rule.fixed(self.images) or sum(map(math.prod, self.shapes)) * 4 > latents.MAX_HELD_BYTES:
            return None
        held = [torch.empty(0)] * len(self.images)
        for shape in sorted(set(self.shapes)):
            rows = [i for i, other in enumerate(self.shapes) if other == shape]
            for i, latent in zip(rows, self._encode_shared(rows), strict=True):
                held[i] = latent
        self.image_encoder.to("cpu")
        return held

    def _encode_shared(self, rows: Sequence[int]) -> torch.Tensor:
        """Encode images of one shape, each process its share, and return all of them on every process."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        share = -(-len(rows) // ranks)
        mine = [rows[min(i * ranks + rank, len(rows) - 1)] for i in range(share)]
        part = latents.encode_all(self.image_encoder, self.images, self.rule, mine, progress=self.progress)
        if ranks > 1:
            gathered = self.accelerator.gather(part.to(self.accelerator.device)).cpu()
            part = gathered.reshape(ranks, share, *part.shape[1:]).transpose(0, 1).reshape(-1, *part.shape[1:])
        return part[: len(rows)].contiguous()


class CachedLatents(Dataset[tuple[str, torch.Tensor]]):
    """Give key and latent of the sample at each position, from a store that `fill_latents` has filled.

    Example:
        >>> import tempfile
        >>> from accelerate import PartialState
        >>> from ambient_sd.assets import BASE, IMAGES
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.data.sources import load_rows
        >>> from ambient_sd.families.base import Model
        >>> encoder, images = ImageEncoder(Model(str(BASE)).family, tiny_pipeline().vae), load_rows(IMAGES, max_samples=2).check()
        >>> rule = ViewRule(resolution=32, center_crop=True, random_flip=False, per_image=True, noise_seed=0)
        >>> store = fill_latents(tempfile.mkdtemp(), encoder, images, rule, PartialState(), progress=False)
        >>> key, latent = CachedLatents(store, images, rule, SampleStream(2, seed=0))[0]
        >>> latent.shape
        torch.Size([4, 16, 16])
    """

    def __init__(self, store: Store, images: ImageDataset, rule: ViewRule, stream: SampleStream) -> None:
        self.store, self.images, self.rule, self.stream = store, images, rule, stream

    def __getitem__(self, position: int) -> tuple[str, torch.Tensor]:
        index = self.stream.image(position)
        view = self.rule.view(self.images.noise_keys[index], self.stream, position)
        return self.images.keys[index], self.latent(index, view)

    def latent(self, index: int, view: View) -> torch.Tensor:
        """Return the latent of a view of an image."""
        (entry,) = self.store.read([_latent_id(self.images, index, self.rule, view)])
        return entry["latent"]


class CachedCaptions:
    """Give the embeddings of captions from a store that `fill_captions` has filled.

    Args:
        store: filled.
        encoder: encodes what is not in the store, on its own device; without it that is an error.

    Example:
        >>> import tempfile
        >>> store = Store(tempfile.mkdtemp(), "captions", {"text_encoder": "its digest"})
        >>> store.create()
        >>> store.open([store.add([entry_id("a cat")], [{"hidden": torch.zeros(24, 16)}])])
        >>> CachedCaptions(store)(["a cat", "a cat"])["hidden"].shape
        torch.Size([2, 24, 16])
    """

    def __init__(self, store: Store, encoder: CaptionEncoder | None = None) -> None:
        self.store, self.encoder = store, encoder

    def __call__(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the embeddings of captions, as a `CaptionEncoder` does."""
        ids = [entry_id(c) for c in captions]
        if self.encoder is None:
            found = self.store.read(ids)
        else:
            found = [
                {n: v[0] for n, v in self.encoder([c]).items()}
                if self.store.missing([key])
                else self.store.read([key])[0]
                for c, key in zip(captions, ids, strict=True)
            ]
        return stacked(found)


def fill_latents(
    root: str | Path,
    encoder: ImageEncoder,
    images: ImageDataset,
    rule: ViewRule,
    accelerator: Accelerator,
    *,
    progress: bool,
) -> Store:
    """Compute the latents of all views that a run can meet, where the cache lacks them; to be called by every process.

    Args:
        root: the cache's folder.
        encoder: of the base.
        images: checked.
        rule: of the views; `rule.views` must be finite.
        accelerator: who is here.
        progress: show a bar.

    Raises:
        UserError: the folder cannot be written, or not all processes see it.

    Example:
        >>> import tempfile
        >>> from accelerate import PartialState
        >>> from ambient_sd.assets import BASE, IMAGES
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.data.sources import load_rows
        >>> from ambient_sd.families.base import Model
        >>> encoder, images = ImageEncoder(Model(str(BASE)).family, tiny_pipeline().vae), load_rows(IMAGES, max_samples=2).check()
        >>> rule = ViewRule(resolution=32, center_crop=True, random_flip=False, per_image=True, noise_seed=0)
        >>> len(fill_latents(tempfile.mkdtemp(), encoder, images, rule, PartialState(), progress=False).shards())
        1
    """
    about = {
        "what": "latents", "version": _VERSION, "vae": fingerprint(encoder.vae), "resolution": rule.resolution,
        "noise_seed": rule.noise_seed, "device": accelerator.device.type,
        **({} if rule.interpolation == "lanczos" else {"interpolation": rule.interpolation}),
        **({} if encoder.family.draws else {"drawn": False}),
    }  # fmt: skip
    store = Store(root, "latents", about)
    views = rule.views(images)
    assert views is not None
    wanted = [(index, view) for index in range(len(images)) for view in views(index)]
    ids = [_latent_id(images, index, rule, view) for index, view in wanted]

    def make(places: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        samples = [rule.see(images[index], view) for index, view in (wanted[place] for place in places)]
        made: list[dict[str, torch.Tensor]] = []
        for _, alike in itertools.groupby(samples, lambda sample: sample.pixels.shape):
            made += [{"latent": latent} for latent in latents.encode(encoder, list(alike), noise_seed=rule.noise_seed)]
        return made

    many = latents.at_once(encoder, rule.resolution**2)
    _fill(store, ids, make, accelerator, what="latents", progress=progress, many=many)
    return store


def fill_captions(
    root: str | Path, encoder: CaptionEncoder, captions: Sequence[str], accelerator: Accelerator, *, progress: bool
) -> Store:
    """Compute the embeddings of all distinct captions and of the empty one, where the cache lacks them.

    Raises:
        UserError: as for `fill_latents`.

    Example:
        >>> import tempfile
        >>> from accelerate import PartialState
        >>> from ambient_sd.assets import BASE
        >>> from ambient_sd.assets.tiny import tiny_pipeline
        >>> from ambient_sd.families.base import Model
        >>> encoder = CaptionEncoder(Model(str(BASE)).family, tiny_pipeline().components)
        >>> store = fill_captions(tempfile.mkdtemp(), encoder, ["a cat", "a dog"], PartialState(), progress=False)
        >>> store.missing([entry_id("a cat"), entry_id("a bird")])
        [1]
    """
    about: dict[str, Any] = {
        "what": "caption embeddings", "version": _VERSION, "device": accelerator.device.type, "zero_empty": encoder.zero_empty,
    }  # fmt: skip
    if encoder.family.flow:  # two families read one text encoder in two ways
        about["family"] = encoder.family.name
    if encoder.family.text_length != type(encoder.family).text_length:
        about["max_sequence_length"] = encoder.family.text_length
    for tokenizer, model in zip(encoder.tokenizers, encoder.models, strict=True):
        tokens = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template or "")
        about[f"text_encoder_{len(about)}"] = fingerprint(model, tokens, str(tokenizer.model_max_length))
    store = Store(root, "captions", about)
    distinct = list(dict.fromkeys(["", *captions]))
    _fill(store, [entry_id(c) for c in distinct], lambda places: [encoder.encode(distinct[p]) for p in places], accelerator,
          what="captions", progress=progress)  # fmt: skip
    return store


def _latent_id(images: ImageDataset, index: int, rule: ViewRule, view: View) -> bytes:
    mirrored = images.mirrored[index]
    _, _, draw_key = rule.place(images.sizes[index], view, images.noise_keys[index], mirrored)
    return entry_id(images.keys[index], draw_key)


def _fill(
    store: Store,
    ids: Sequence[bytes],
    make: Callable[[Sequence[int]], list[dict[str, torch.Tensor]]],
    accelerator: Accelerator,
    *,
    what: str,
    progress: bool,
    many: int = 1,
) -> None:
    """Bring `ids` into the store, made `many` together, and open it, on every process."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    whole = _whole_shards(store, accelerator, what)
    store.open(whole)
    missing = store.missing(ids)
    mine = missing[rank::ranks]
    begin = time.perf_counter()
    with tqdm(total=len(ids), initial=len(ids) - len(missing), desc=f"caching {what}", unit="entry",
              disable=not (progress and missing and accelerator.is_main_process)) as bar:  # fmt: skip
        made: list[tuple[bytes, dict[str, torch.Tensor]]] = []
        rows, last = _MAX_ROWS, time.monotonic()
        # The first process has the largest share, so all of them count its rounds.
        for turn in range(math.ceil(len(missing) / ranks)):
            if turn < len(mine):
                if turn % many == 0:
                    together = mine[turn : turn + many]
                    made += zip([ids[place] for place in together], make(together), strict=True)
                bar.update(min(ranks, len(missing) - turn * ranks))
                rows = max(1, min(_MAX_ROWS, SHARD_BYTES // sum(t.nbytes for t in made[0][1].values())))
            if made and (len(made) >= rows or time.monotonic() - last > _FLUSH_SECONDS):
                _write(store, made)
                made, last = [], time.monotonic()
            if turn % 64 == 63:
                accelerator.wait_for_everyone()
        if made:
            _write(store, made)
    accelerator.wait_for_everyone()
    if missing:
        if accelerator.is_main_process:
            seconds = time.perf_counter() - begin
            logger.info("cached %d %s in %.0f s (%.1f a second)", len(missing), what, seconds, len(missing) / seconds)
        store.open(_from_first(store.shards(), accelerator))


def _write(store: Store, made: Sequence[tuple[bytes, dict[str, torch.Tensor]]]) -> None:
    """Write entries, those of one shape to one shard (buckets have many)."""
    by_shape: dict[Any, list[tuple[bytes, dict[str, torch.Tensor]]]] = {}
    for entry in made:
        by_shape.setdefault(tuple(tuple(t.shape) for t in entry[1].values()), []).append(entry)
    for entries in by_shape.values():
        store.add([i for i, _ in entries], [tensors for _, tensors in entries])


def _whole_shards(store: Store, accelerator: Accelerator, what: str) -> list[str]:
    """Make the folder, check every shard in it (each process its share), remove the damaged ones, name them."""
    fault: UserError | None = None
    if accelerator.is_main_process:
        try:
            store.create()
        except UserError as error:
            fault = error
    fault = _from_first(fault, accelerator)
    if fault is not None:
        raise fault
    seen = [store.folder.is_dir()]
    if not all(seen if accelerator.num_processes == 1 else gather_object(seen)):
        raise UserError("latent_cache_dir is not seen by all processes", rule="they share out the work through it",
                        remedy="name a folder on a file system that all machines share")  # fmt: skip
    names = _from_first(store.shards(), accelerator)
    mine = names[accelerator.process_index :: accelerator.num_processes]
    faults = [(name, why) for name in mine if (why := store.fault(name)) is not None]
    faults = faults if accelerator.num_processes == 1 else gather_object(faults)
    if accelerator.is_main_process:
        for name, why in faults:
            logger.warning(
                "cache of %s: %s/%s is damaged (%s) and will be computed again", what, store.folder.name, name, why
            )
            store.remove(name)
    accelerator.wait_for_everyone()
    damaged = {name for name, _ in faults}
    return [name for name in names if name not in damaged]


def _from_first(value: Any, accelerator: Accelerator) -> Any:
    """Return the first process's value on every process: what one of them saw, all act upon."""
    return value if accelerator.num_processes == 1 else broadcast_object_list([value])[0]
