"""Whether the packages are installed that `report_to` names; and whose setting it is when other code fails."""

import contextlib
from collections.abc import Iterator, Sequence

from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from .settings import require

# Services whose package has another name, or which need more than a package; their callbacks say so as they are made.
SAY_IT_THEMSELVES = ("azure_ml", "flyte", "kubeflow")


@contextlib.contextmanager
def blamed_on(name: str, value: object, hint: str = "") -> Iterator[None]:
    """Within this context other people's code follows a setting; whatever it raises becomes one line about it.

    Raises:
        ValueError: anything was raised within.
    """
    try:
        yield
    except Exception as error:
        said = str(error).strip().rstrip(".") or type(error).__name__
        raise ValueError(f"{name}={value!r}: {said}{hint}") from error


def check_reporting(names: Sequence[str]) -> None:
    """See that the packages that `report_to` names are installed.

    Raises:
        ValueError: one is not, or is not known.
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
