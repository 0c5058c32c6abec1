"""What a run needs of other packages and services, tried before anything of an earlier run is moved."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence

from transformers import Trainer
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
            right = f"needs its package to be installed: pip install {name.replace('_', '-')}"
            require(name in get_available_reporting_integrations(), "report_to", name, right)


def log_in(trainer: Trainer) -> None:
    """Set up the services that `report_to` names, where it may take an account and a network.

    Those that only write files have nothing to set up.

    Raises:
        ValueError: one can't be reached.
    """
    for name in trainer.args.report_to:
        for callback in trainer.callback_handler.callbacks:
            if type(callback) is not INTEGRATION_TO_CALLBACK[name] or not hasattr(callback, "setup"):
                continue
            more = {"processing_class": trainer.processing_class}
            more = {n: v for n, v in more.items() if n in inspect.signature(callback.setup).parameters}
            with blamed_on("report_to", name, "; log in, let it work offline, or leave it out"):
                callback.setup(trainer.args, trainer.state, trainer.model, **more)
