"""Train a model: GRPO with --use_grpo, else supervised fine-tuning. Every setting is a flag; --config reads a file."""

import sys
from collections.abc import Sequence

from .script import called_as, choose_device, quiet_transformers

EXAMPLES = """
# the embedded default: offline, in minutes
COMMAND --use_grpo --num_completions_per_prompt 4
# a model of the hub, and the questions of a data set that is known by name
COMMAND --use_grpo --model_name google/gemma-3-270m-it --dataset gsm8k --num_completions_per_prompt 8
# settings of a file, and flags, which win over it
COMMAND --config config_example.json --learning_rate 5e-4
"""


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Run the job that the flags describe.

    Args:
        argv: the flags; None: those of this process.
        command: what the user has called; None: the script of this process.

    Raises:
        ValueError: a setting, model, data set or folder that can't work.
    """
    argv, command = sys.argv[1:] if argv is None else argv, called_as(command)
    choose_device(argv)
    # The device is chosen: what knows Transformers may be imported.
    from ..config.flags import parse_job
    from ..run.job import train

    quiet_transformers()
    train(*parse_job(argv, command, f"{__doc__}\n{EXAMPLES}".replace("COMMAND", command)))
