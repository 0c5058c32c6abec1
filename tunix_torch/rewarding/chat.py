"""Asks an OpenAI-compatible server for answers: attempts, pauses and time limits, and a cache of answers on disk."""

import asyncio
import hashlib
import json
import logging
import os
import random
import re
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

logger = logging.getLogger(__name__)

SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before another attempt; each pause is twice the one before
TRY_AGAIN = (408, 409, 425, 429)  # statuses that may be other ones a little later, besides those from 500 on
LARGEST_ANSWER = 4_000_000  # bytes of a response; a server that sends more sends something else than an answer
SHOWN = 120  # characters of a response in an error message


class NoAnswerError(Exception):
    """A request got no answer, after all attempts or within its time."""


class _FailedAttemptError(Exception):
    """One attempt got no answer. `pause` is how long the server asks to wait, in seconds; None: it does not ask."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass(frozen=True)
class ChatServer:
    """A server that answers `POST {base_url}/chat/completions`.

    Args:
        base_url: begins with http:// or https://, without a user, a password or a query.
        api_key_env: the environment variable that holds the key; None: no key is sent.
        timeout: seconds for one request, with all its attempts and pauses.
        retries: how many further attempts follow one that got no answer.

    Raises:
        ValueError: one of them can't work. No message shows a key, also where one was given in the wrong place.
    """

    base_url: str
    api_key_env: str | None
    timeout: float
    retries: int

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("base_url: must have no user, password or query; the key is given by api_key_env")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url={self.base_url!r}: expected a URL such as http://localhost:8000/v1")
        # What looks unlike the name of a variable may be a key, so it is not shown.
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            raise ValueError(
                "api_key_env: expected the name of an environment variable in capitals, such as OPENAI_API_KEY, and "
                "not the key itself"
            )
        for name, value, least in (("timeout", self.timeout, 1e-3), ("retries", self.retries, 0)):
            if not value >= least:
                raise ValueError(f"{name}={value!r}: must be {'above 0' if name == 'timeout' else 'at least 0'}")

    def key(self) -> str | None:
        """The key, or None where no key is sent.

        Raises:
            ValueError: the variable is not set, or holds what can't be sent in a header.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ValueError(f"api_key_env={self.api_key_env!r}: this environment variable is not set")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"api_key_env={self.api_key_env!r}: its value has spaces or other characters of no key")
        return key

    async def ask(self, client: httpx.AsyncClient, body: dict[str, Any], key: str | None) -> str:
        """The text that the model answers to a request.

        Args:
            client: has no time limit of its own.
            body: the fields of the request.

        Raises:
            NoAnswerError: there was none.
            ValueError: the server refuses the request, so that no further attempt would help.
        """
        deadline, chance = time.monotonic() + self.timeout, random.Random()
        for attempt in range(self.retries + 1):
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    return await self._attempt(client, body, key)
            except TimeoutError:
                raise NoAnswerError(f"no answer within timeout={self.timeout:g} seconds") from None
            except _FailedAttemptError as error:
                reason, pause = str(error), error.pause
            if pause is None:  # not all requests that failed together come back together
                pause = min(LONGEST_PAUSE, SHORTEST_PAUSE * 2**attempt) * chance.uniform(0.5, 1.0)
            if attempt == self.retries:
                raise NoAnswerError(f"no answer in {attempt + 1} attempts; the last one: {reason}")
            if time.monotonic() + pause >= deadline:
                raise NoAnswerError(f"no answer within timeout={self.timeout:g} seconds; the last attempt: {reason}")
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, client: httpx.AsyncClient, body: dict[str, Any], key: str | None) -> str:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        content, url = bytearray(), f"{self.base_url.rstrip('/')}/chat/completions"
        try:
            async with client.stream("POST", url, json=body, headers=headers) as response:
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > LARGEST_ANSWER:
                        raise _FailedAttemptError(f"it sent more than {LARGEST_ANSWER} bytes")
        except httpx.HTTPError as error:
            raise _FailedAttemptError(_shown(f"{type(error).__name__}: {error}", key)) from None
        text = content.decode(errors="replace")
        status, said = response.status_code, _shown(text, key)
        if status in TRY_AGAIN or status >= 500:
            raise _FailedAttemptError(f"status {status}, {said}", _pause_of(response))
        if status != 200:
            hint = {401: "check api_key_env", 403: "check api_key_env", 404: "check base_url and model"}
            raise ValueError(f"{url} refuses the request: status {status}, {said}; {hint.get(status, 'it is wrong')}")
        try:
            answer = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _FailedAttemptError(f"it sent no chat completion, but {said}") from None
        if answer is not None and not isinstance(answer, str):
            raise _FailedAttemptError(f"it sent no text, but {said}")
        return _without(answer or "", key)


def _without(text: str, key: str | None) -> str:
    """A text of the server's in which no key stands, as it does where a server repeats the request."""
    return text if key is None else text.replace(key, "***")


def _shown(text: str, key: str | None) -> str:
    """A text of the server's for an error message, in one line."""
    return repr(" ".join(_without(text, key).split())[:SHOWN])


def _pause_of(response: httpx.Response) -> float | None:
    """The seconds that `Retry-After` names, as a number or as a date; None where there is no such header."""
    value = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


class AnswerCache:
    """Answers on disk, one file each. Several processes may use one folder at the same time.

    Args:
        folder: is made if it is not there; None: nothing is kept.

    Raises:
        ValueError: nothing can be written there.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"cache_dir={str(folder)!r}: can't be written ({error.strerror})") from error

    @staticmethod
    def name_of(base_url: str, body: dict[str, Any]) -> str:
        """The name of an answer: a hash of all that decides it, the server and every field of the request."""
        return hashlib.sha256(json.dumps([base_url, body], sort_keys=True).encode()).hexdigest()

    def get(self, name: str) -> str | None:
        """An answer that was kept; None: there is none, or its file is damaged, which a warning says."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            answer = json.loads(path.read_text(encoding="utf-8"))["answer"]
            if isinstance(answer, str):
                return answer
        except (ValueError, LookupError, TypeError):
            pass
        logger.warning("%s holds no answer, so the judge is asked again", path)
        return None

    def put(self, name: str, answer: str) -> None:
        """Keep an answer. A process that is killed meanwhile leaves no half of a file under this name."""
        path = self._path(name)
        if path is None:
            return
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({"answer": answer}, file)
        os.replace(file.name, path)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name[:2] / f"{name[2:]}.json"
