"""Where a base model comes from: its id on the hub, the name that an adapter's files give it, and its licence."""

import contextlib
import functools
import re
from pathlib import Path

import httpx
import huggingface_hub
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import validate_repo_id

from . import tiny

TINY_LICENCE = "apache-2.0"  # that of this package, which makes the model
# The licences of Google's Gemma models by the beginning of their model type; the first that fits counts.
GEMMA_LICENCES = {"gemma4": "apache-2.0", "gemma": "gemma"}
TIMEOUT = 10.0  # seconds to wait for what the hub says of a model


def hub_id(name: str) -> str | None:
    """The hub id of a model by the name that it was loaded by; None: it came from a folder of its own.

    A snapshot in the hub's cache on this machine is the model that was downloaded.
    """
    if is_tiny(name) or not name:
        return None
    path, cache = Path(name), Path(constants.HF_HUB_CACHE)
    if path.exists():
        inside = path.resolve().is_relative_to(cache.resolve()) and path.resolve().relative_to(cache.resolve()).parts
        found = re.fullmatch(r"models--(.+)", inside[0]) if inside else None
        return found[1].replace("--", "/") if found else None
    with contextlib.suppress(ValueError):
        validate_repo_id(name)
        return name
    return None


def is_tiny(name: str) -> bool:
    """Whether a name is that of the tiny model, or of a folder in which it lies."""
    return name == tiny.NAME or Path(name).name.startswith(tiny.FOLDER_PREFIX)


def public_name(name: str) -> str:
    """The name of a base model as an adapter's files give it: a hub id, or of the tiny model its folder's name.

    Both say the same on every machine. Any other folder keeps the name by which it was loaded.
    """
    return Path(name).name if is_tiny(name) else hub_id(name) or name


@functools.cache
def licence_of(name: str, model_type: str) -> str | None:
    """The licence of a base model by its short name on the hub, such as "gemma"; None: it is not known here.

    It is that of Google's Gemma where the model is one by its type and its hub id. Of other models it is what the
    model's own card says, in its folder, in the hub's cache, or on the hub.
    """
    if is_tiny(name) or not name:  # a model that was made from a config has no name
        return TINY_LICENCE if name else None
    repo = hub_id(name)
    if repo is not None and "gemma" in repo.lower():
        known = (licence for start, licence in GEMMA_LICENCES.items() if model_type.startswith(start))
        if (licence := next(known, None)) is not None:
            return licence
    card = Path(name) / "README.md" if repo is None else huggingface_hub.try_to_load_from_cache(repo, "README.md")
    if isinstance(card, str | Path) and Path(card).is_file():
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # a card that can't be read says nothing
            return ModelCard.load(card).data.license
    elif repo is not None:
        with contextlib.suppress(OSError, ValueError, httpx.HTTPError):  # there is no network, or no such model
            data = huggingface_hub.model_info(repo, timeout=TIMEOUT).card_data
            return None if data is None else data.license
    return None
