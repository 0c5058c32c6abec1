"""The command `tunix-torch`: chooses the subcommand that does the work and hands it the flags that follow."""

import importlib
import sys
from collections.abc import Sequence

from ..config.settings import nearest
from .script import fail, run_script

# Name -> what it does. The module of this name in this folder has the rest.
COMMANDS = {
    "train": "train a model: GRPO with --use_grpo, else supervised fine-tuning",
    "evaluate": "sample answers to questions with known answers, judge them, and sum up",
    "ask": "ask a model questions; see its reasoning as numbered steps, then its answer",
    "export": "merge an adapter into its base model: a plain Hugging Face model",
    "report": "write a report of a run, one page of HTML; --compare two of them",
    "diagnose": "say what the curves of a run show that should not be so, and what to try",
    "replay": "compute a batch again that was not finite, and say which row and quantity was first",
    "plan": "plan a job for a TPU slice, on a machine without a TPU",
    "beside_tunix": "compare a job's graphs with those of Google's Tunix, both compiled for a TPU slice",
    "crosscheck": "compare this library's numbers with those of Google's Tunix on JAX",
}


def usage() -> str:
    """What `tunix-torch --help` prints."""
    lines = [f"  {name:<14}{does}" for name, does in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tunix-torch COMMAND [FLAGS]",
            "",
            "GRPO post-training of Gemma in PyTorch, on TPU through torch-xla, on CUDA and on the CPU.",
            "",
            *lines,
            "",
            "tunix-torch COMMAND --help lists the flags of a command.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run `tunix-torch`; None: with the arguments of this process. A mistake is one line, and exit code 2."""
    name, *flags = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        known = f"choose one of {', '.join(COMMANDS)}"
        fail(f"unknown command {name!r}{nearest(name, list(COMMANDS))}; {known}" if name else f"no command: {known}")
    module = importlib.import_module(f".{name}", __package__)
    run_script(lambda: module.main(flags, f"tunix-torch {name}"))
