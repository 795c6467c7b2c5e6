"""Publish a finished training on the hub: weights, configurations, card and images, chosen by a list of what MAY go.

What is not on the list stays: optimizer states, checkpoints, logs, every file of the user's own. Files that record where
things lay on this machine (`_name_or_path` in the models' configurations, paths in train_config.yaml) go as cleaned
copies, images without their metadata; the card is made anew, with the audit that may exist by now. The files on disk
are not touched. A README.md that a person wrote or edited, here or on the hub, is never replaced by the card.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import io
import json
import logging
import re
import shlex
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RemoteEntryNotFoundError
from PIL import Image

from ambient_sd.families import FAMILIES
from ambient_sd.guard.calibration import FILE_NAMES as THRESHOLD_NAMES
from ambient_sd.guard.calibration import Calibration
from ambient_sd.reporting.model_card import CARD_NAME, HUB_ID, Facts, is_ours, make_card, renamed
from ambient_sd.training.config import CONFIG_NAME, TrainConfig
from ambient_sd.training.record import CURVE_NAME
from ambient_sd.utils.errors import UserError, one_line

logger = logging.getLogger(__name__)

_PARTS = tuple(dict.fromkeys(part for family in FAMILIES for part in family.parts))
_TOKENIZERS = tuple(part for part in _PARTS if part.startswith("tokenizer"))
_MODELS = (*(part for part in _PARTS if part not in _TOKENIZERS), "safety_checker")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
ALLOWED = (
    CARD_NAME, "model_index.json", "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", CONFIG_NAME, *THRESHOLD_NAMES.values(),
    "scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json", "validation/step-*.png", CURVE_NAME,
    *(f"{part}/{name}" for part in _MODELS for name in ("config.json", "*model*.safetensors", "*.safetensors.index.json")),
    *(f"{part}/{name}" for part in _TOKENIZERS for name in _TOKENIZER),
)  # fmt: skip
_PATHS = (
    "train_data_dir",
    "class_data_dir",
    "cache_dir",
    "latent_cache_dir",
    "output_dir",
    "logging_dir",
    "resume_from_checkpoint",
)
_NAMES = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "single_file_config",
    "dataset_name",
    "lora_weights",
)  # a path or a hub id
# The hub's errors derive from those of the HTTP client in use (httpx or httpx2, by version): lost connections are caught too.
_CLIENT = [kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception)]
_WAITS = (1, 4)  # seconds before a commit that failed is tried again
_FAILURES: tuple[type[Exception], ...] = (*_CLIENT, OSError, RuntimeError, ValueError)


def prepare(repo: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Create the repository if it is missing, see that it can be written to, and return owner/name: before anything expensive.

    A name without owner belongs to the account whose token it is.

    Raises:
        UserError: a bad name, no token, a hub out of reach, or no right to write.
    """
    api = HfApi(token=token)
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo, flags=re.ASCII):
        raise UserError(f"hub repository is {repo!r}", rule="it must read owner/name, or name alone for your own account", remedy="give --hub_model_id (push: --repo) owner/name")  # fmt: skip
    try:
        owner = api.whoami()["name"]
        repo = repo if "/" in repo else f"{owner}/{repo}"
        api.create_repo(repo, private=private, exist_ok=True)
        api.auth_check(repo, write=True)
        public = bool(private) and not api.model_info(repo).private
    except HFValidationError as error:
        raise UserError(
            f"hub repository is {repo!r}", rule=_reason(error, token), remedy="choose another name"
        ) from None
    except _FAILURES as error:
        raise UserError(f"{repo} on the hub cannot be written to", rule=_reason(error, token),
                        remedy="log in with `hf auth login` or set HF_TOKEN, to an account that may write there") from None  # fmt: skip
    if public:
        # create_repo says nothing when the repository is there already and open to all.
        raise UserError(f"{repo} exists already and is public", rule="what was to be private would not be",
                        remedy="make it private in its settings on the hub, or name another")  # fmt: skip
    return repo


def push(
    folder: str | Path, repo: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """Upload the results in `folder` to `repo` in one commit, and return the commit's address.

    Raises:
        UserError: nothing to upload, or the upload failed; what is on disk stays as it is.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("model_index.json", "pytorch_lora_weights.safetensors")):
        raise UserError(f"folder is {folder}", rule="it holds neither model_index.json nor pytorch_lora_weights.safetensors",
                        remedy="give the output_dir of a finished training")  # fmt: skip
    repo = prepare(repo, token=token, private=private)
    files = collect(folder, repo, revision=revision)
    api = HfApi(token=token)
    try:
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        if CARD_NAME in files and _edited_there(api, repo, revision, mine=files[CARD_NAME]):
            logger.warning("README.md of %s was edited there and stays; remove it there for the card of this run", repo)
            del files[CARD_NAME]
        address = _commit(api, repo, files, revision)
    except _FAILURES as error:
        extra = (f" --revision {shlex.quote(revision)}" if revision else "") + (" --private" if private else "")
        what = f"the upload to {repo} failed, the results are whole in {folder}"
        remedy = f"push again, what has arrived is not sent twice: ambient-sd push {shlex.quote(str(folder))} --repo {repo}{extra}"
        # One line has room for so much: what to do must not be what is cut.
        room = max(60, 580 - len(what) - len(remedy))
        raise UserError(what, rule=_reason(error, token, room), remedy=remedy) from None
    return address


def _commit(api: HfApi, repo: str, files: Mapping[str, Path | bytes], revision: str | None) -> str:
    """Upload and commit, again after a wait where the hub stumbles; parts that have arrived are not sent again."""
    for wait in (*_WAITS, None):
        # Anew each time: only then does the client ask what is there, and a commit whose answer was lost is not made twice.
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        try:
            done = api.create_commit(repo, operations, commit_message="Upload with ambient_sd", revision=revision)
            return str(done.commit_url)
        except tuple(_CLIENT) as error:
            # Large files the client sends again by itself, and raises a RuntimeError in the end.
            if wait is None or not _passes(error):
                raise
            time.sleep(wait)
    raise AssertionError


def _passes(error: Exception) -> bool:
    """Tell whether an error may be gone a moment later: a lost connection, a hub that is busy or down."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return not isinstance(error, OSError)


def _edited_there(api: HfApi, repo: str, revision: str | None, mine: Path | bytes) -> bool:
    """Tell whether the repository holds a README.md of a person's that a card made here would replace."""
    if not isinstance(mine, bytes) or not is_ours(mine.decode("utf-8")):
        return False  # a person's page replaces whatever is there: that person said so
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = api.hf_hub_download(repo, CARD_NAME, revision=revision, local_dir=folder)
        except RemoteEntryNotFoundError:
            return False
        return not is_ours(Path(path).read_text(encoding="utf-8", errors="replace"))


def collect(folder: Path, repo: str, *, revision: str | None = None) -> dict[str, Path | bytes]:
    """Return what goes to the hub: name in the repository -> file on disk, or the bytes of a cleaned copy.

    Raises:
        UserError: what the card is made from is damaged.
    """
    files: dict[str, Path | bytes] = {}
    facts = Facts.read(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # A link may lead anywhere; and `*` of fnmatch also matches `/`, hence the count of parts.
        if path.resolve() != folder.resolve() / name or not path.is_file():
            continue
        if not any(fnmatch.fnmatchcase(name, p) and name.count("/") == p.count("/") for p in ALLOWED):
            continue
        if name == CARD_NAME:
            text = path.read_text(encoding="utf-8", errors="replace")
            if facts is None or not is_ours(text):
                files[name] = renamed(text, repo).encode()
        elif name.endswith(".png"):
            if (image := _pixels(path)) is not None:
                files[name] = image
        elif (detector := {file: kind for kind, file in THRESHOLD_NAMES.items()}.get(name)) is not None:
            # Read and written anew: what is damaged, or is no threshold at all, does not go.
            files[name] = Calibration.load(path, detector=detector).text().encode()
        elif name == CONFIG_NAME:
            files[name] = _clean_settings(path)
        elif name.endswith(("config.json", "model_index.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            files[name] = (json.dumps(_without_origin(values), indent=2, sort_keys=True) + "\n").encode()
        else:
            files[name] = path
    if CARD_NAME not in files and facts is not None:
        files[CARD_NAME] = make_card(facts, folder, repo=repo, revision=revision).encode()
    return files


def _pixels(path: Path) -> bytes | None:
    """Return an image as PNG without metadata, which may name files of this machine; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            flat = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        logger.warning("%s stays here, for it cannot be read: %s", path, one_line(error, 200))
        return None
    out = io.BytesIO()
    flat.info.clear()
    flat.save(out, format="PNG")
    return out.getvalue()


def _clean_settings(path: Path) -> bytes:
    known = {item.name for item in dataclasses.fields(TrainConfig)} - {"hub_token"}
    values = {k: v for k, v in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items() if k in known}
    for key in _PATHS:
        if isinstance(values.get(key), str):
            values[key] = PurePath(values[key]).name
    for key in _NAMES:
        given = values.get(key)
        if isinstance(given, str) and (not HUB_ID.fullmatch(given) or Path(given).exists()):
            values[key] = PurePath(given).name
    for key in ("validation_prompts", "probe_prompts"):
        if isinstance(prompts := values.get(key), list):
            values[key] = [PurePath(p).name if str(p).endswith((".jsonl", ".txt")) else p for p in prompts]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()


def _without_origin(value: Any) -> Any:
    """Drop `_name_or_path` and `name_or_path`, in which diffusers and transformers keep where a part was loaded from."""
    if isinstance(value, dict):
        return {k: _without_origin(v) for k, v in value.items() if k not in ("_name_or_path", "name_or_path")}
    return [_without_origin(v) for v in value] if isinstance(value, list) else value


def _reason(error: Exception, token: str | None, limit: int = 300) -> str:
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client's "error while uploading", which does not say why
    text = f"{type(error).__name__}: {one_line(error)}"
    return one_line(text.replace(token, "***") if token else text, limit)
