"""Checks that the packages of `report_to` are installed, and names the setting when other people's code fails."""

import contextlib
import re
from collections.abc import Iterator, Sequence

from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from .settings import require

# Services whose package has another name, or that need more than a package. Their callbacks say what is missing.
SAY_IT_THEMSELVES = ("azure_ml", "flyte", "kubeflow")


@contextlib.contextmanager
def blamed_on(name: str, value: object, hint: str = "") -> Iterator[None]:
    """Turn any exception of code that a setting has chosen into one line about the setting.

    Raises:
        ValueError: the code within this context raised something.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"{name}={value!r}: {said}{hint}") from error


@contextlib.contextmanager
def blamed_on_inherited(args: TrainingArguments, suspects: Sequence[str]) -> Iterator[None]:
    """Turn any exception of Transformers over its own settings into one line that names a setting.

    Args:
        suspects: the fields that are named, where they were given, when the message names none itself.

    Raises:
        ValueError: the code within this context raised something.
    """
    try:
        yield
    except Exception as error:  # of files that a setting names, of other libraries
        reason, fields = " ".join(str(error).split()) or type(error).__name__, type(args).__dataclass_fields__
        if isinstance(error, ValueError) and any(re.search(rf"\b{name}\b", reason) for name in fields):
            raise ValueError(reason) from error
        given = [name for name in suspects if getattr(args, name) != fields[name].default]
        named = ", ".join(f"{name}={getattr(args, name)!r:.80}" for name in given) or "a setting of TrainingArguments"
        raise ValueError(f"{named}: {reason}") from error


def check_reporting(names: Sequence[str]) -> None:
    """Check that the packages that `report_to` names are installed.

    Raises:
        ValueError: a package is not installed, or a name is not known.
    """
    for name in names:
        known = f"choose among {', '.join(INTEGRATION_TO_CALLBACK)}, all and none"
        require(name in INTEGRATION_TO_CALLBACK, "report_to", name, known)
        if name in SAY_IT_THEMSELVES:
            with blamed_on("report_to", name):
                INTEGRATION_TO_CALLBACK[name]()
        else:  # MLflow's callback, made without its package, prints a traceback as it is thrown away
            hint = f"needs its package to be installed: pip install {name.replace('_', '-')}"
            require(name in get_available_reporting_integrations(), "report_to", name, hint)
