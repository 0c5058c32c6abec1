"""Asks once whether the Hugging Face hub answers, before its library asks: that one tries again for half a minute."""

import functools
from pathlib import Path

import httpx
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session

TIMEOUT = 10.0  # seconds


def require_hub_for_model(name: str) -> None:
    """Make sure that the hub answers where a model must come from there: it is no folder, and not in the cache.

    Raises:
        OSError: the hub does not answer.
        ValueError: the name can be no hub id.
    """
    if constants.HF_HUB_OFFLINE:
        return  # nobody is to be asked, and the hub's library says so at once
    files = ("config.json", "adapter_config.json")
    if not Path(name).is_dir() and not any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        _require_answer(constants.ENDPOINT)


def require_hub_for_data(name: str, cache: str | Path) -> None:
    """Make sure that the hub answers where a data set must come from there: it is no path, and not in the cache.

    Raises:
        OSError: the hub does not answer.
    """
    if (
        not constants.HF_HUB_OFFLINE
        and not Path(name).exists()
        and not (Path(cache) / name.replace("/", "___")).exists()
    ):
        _require_answer(constants.ENDPOINT)


@functools.cache  # once it has answered it is not asked again
def _require_answer(hub: str) -> None:
    try:
        get_session().head(hub, timeout=TIMEOUT)
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise OSError(f"it is not on this machine, and {hub} does not answer: {reason}") from error
