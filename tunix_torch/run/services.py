"""Logs in to the services that `report_to` names, before the files of an earlier run are moved."""

import inspect

from transformers import Trainer
from transformers.integrations import INTEGRATION_TO_CALLBACK

from ..config.services import blamed_on


def log_in(trainer: Trainer) -> None:
    """Set up the services that `report_to` names and that may need an account and a network.

    Services that only write files have nothing to set up.

    Raises:
        ValueError: a service can't be reached.
    """
    for name in trainer.args.report_to:
        for callback in trainer.callback_handler.callbacks:
            if type(callback) is not INTEGRATION_TO_CALLBACK[name] or not hasattr(callback, "setup"):
                continue
            more = {"processing_class": trainer.processing_class}
            more = {n: v for n, v in more.items() if n in inspect.signature(callback.setup).parameters}
            with blamed_on("report_to", name, "; log in, let it work offline, or leave it out"):
                callback.setup(trainer.args, trainer.state, trainer.model, **more)
