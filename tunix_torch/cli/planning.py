"""What the commands that compile a job for a TPU slice share: their flags, and a process with as many devices."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.help import HELP_ALL, help_asked
from ..preflight.chips import Topology
from ..runtime.choice import tpu_is_present
from .script import Parser, check_output_file, choose_device


def planning_parser(command: str, description: str, written: str) -> Parser:
    """A parser of the flags that say which job is meant and for which slice.

    Args:
        written: what the flag `--json` writes, as words.
    """
    parser = Parser(command, description)
    parser.add_argument("--config", help="a JSON or YAML file with settings, as train.py takes it")
    parser.add_argument("--topology", required=True, help="a slice: v5e:2x4, v6e:4x4, v5p:2x2x1, ...")
    parser.add_argument("--json", type=Path, help=f"also write {written} to this file")
    parser.add_argument(*HELP_ALL[:1], action="store_true", help="these flags, and all settings of train.py by group")
    return parser


def own_flags(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the parser, and those of train.py.

    Raises:
        ValueError: a flag that is missing, or a file that can't be written.
        SystemExit: with code 0, after `--help-all` was printed.
    """
    if help_asked(argv) == "help-all":
        parser.print_help()
        choose_device(["--device=cpu"])
        from ..config.flags import print_settings  # knows Transformers

        print_settings([])
        sys.exit(0)
    ours, rest = parser.parse_known_args(argv)
    check_output_file("json", ours.json)
    return ours, ["--config", ours.config, *rest] if ours.config else rest


def stand_for(topology: Topology) -> None:
    """Give this process as many devices on the CPU as a slice has chips, before torch_xla is imported."""
    os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(topology.num_chips)}
    choose_device(["--device=xla"])


def stand_for_one_chip() -> None:
    """Choose torch_tpu for this process, before it is imported, and let it cut no graph while it is traced.

    Raises:
        ValueError: torch_tpu has nothing to run on here.
    """
    if "TPU_LIBRARY_PATH" not in os.environ and not tpu_is_present():
        raise ValueError(
            "torch_tpu traces on a TPU or a plugin that stands for one: make plan-tpu ARGS='--topology v5e:1x1 ...', "
            "or plan in torch-xla's environment (make setup)"
        )
    os.environ["TORCH_TPU_INTERNAL_DETECT_REPEATED_OPS"] = "off"  # it would run what comes before a repetition
    choose_device(["--device=tpu"])


def say(text: str) -> None:
    """Print progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
