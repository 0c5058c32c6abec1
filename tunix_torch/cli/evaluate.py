"""How good is a model? Sample answers to questions with known answers, judge them, and sum up."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence

from ..config.data import DataConfig
from ..config.settings import require, said_as
from .script import Parser, called_as, choose_device, quiet_transformers

EXAMPLES = """
COMMAND                                                   # newest run, generated arithmetic, greedy
COMMAND --model_path ./outputs --data_path test.jsonl --output_file results.jsonl
COMMAND --model_path google/gemma-3-270m-it --dataset gsm8k --preset standard --num_passes 8

A base model, an adapter folder, a checkpoint folder and a merged model will do. Where a flag has two names, the second
is that of train.py. With --output_file every completion is kept as a line of JSON, and the same command continues after
an interruption.
"""
# agent-tunix's: the likeliest token; some variety; much. (temperature, top_k, top_p)
PRESETS = {"greedy": (1e-4, 1, 1.0), "standard": (0.7, 50, 0.95), "liberal": (0.85, 2000, 1.0)}


def parse_args(argv: Sequence[str], command: str) -> argparse.Namespace:
    """The settings; temperature, top_k and top_p are filled in from the preset.

    Raises:
        ValueError: a value that can't be.
    """
    parser = Parser(command, f"{__doc__}\n{EXAMPLES}")
    _add_flags(parser)
    args = parser.parse_args(argv)
    if args.top_k is None and PRESETS[args.preset][1] == 1 and (args.temperature or args.top_p):
        args.top_k = 0  # who gives a temperature wants a choice
    for name, value in zip(("temperature", "top_k", "top_p"), PRESETS[args.preset], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("num_passes", "max_samples", "max_new_tokens", "max_prompt_length", "batch_size"):
        value = getattr(args, name)
        require(value is None or value >= 1, name, value, "must be at least 1")
    require(math.isfinite(args.temperature), "temperature", args.temperature, "must be finite")
    for name in ("temperature", "top_k", "seed"):
        require(getattr(args, name) >= 0, name, getattr(args, name), "must not be negative")
    require(0 < args.top_p <= 1, "top_p", args.top_p, "must be in (0, 1]")
    timeout = args.reward_timeout
    require(timeout is None or 0 < timeout < math.inf, "reward_timeout", timeout, "must be above 0, and finite")
    return args


def _add_flags(parser: Parser) -> None:
    parser.add_argument(
        "--model_path",
        "--model_name",
        help="model, adapter or checkpoint folder, or hub id (default: the newest in ./outputs, else the tiny model)",
    )
    parser.add_argument(
        "--data_path",
        help="questions and answers: .json or .jsonl file, or data set (default: the tiny model's held-out arithmetic)",
    )
    for name in ("data_source", "dataset", "dataset_config", "question_column", "answer_column"):
        parser.add_argument(f"--{name}", help=DataConfig.__dataclass_fields__[name].metadata["help"])
    parser.add_argument("--split", default="test", help="split of the data set (default: test)")
    parser.add_argument("--preset", choices=PRESETS, default="greedy", help="how tokens are chosen (default: greedy)")
    parser.add_argument(
        "--temperature", "--generation_temperature", type=float, help="instead of the preset's; 0: the likeliest token"
    )
    parser.add_argument("--top_k", "--generation_top_k", type=int, help="instead of the preset's; 0 is off")
    parser.add_argument("--top_p", "--generation_top_p", type=float, help="instead of the preset's; 1 is off")
    parser.add_argument("--num_passes", type=int, default=1, help="completions of each question: K of pass@K")
    parser.add_argument("--max_samples", "--num_eval_rows", type=int, help="use at most so many questions")
    parser.add_argument("--max_new_tokens", "--generation_max_length", type=int, default=512)
    parser.add_argument("--max_prompt_length", type=int, help="leave out questions with longer prompts, in tokens")
    parser.add_argument("--batch_size", type=int, default=64, help="completions at a time")
    parser.add_argument("--output_file", help="write every completion here, one JSON object a line")
    parser.add_argument(
        "--rewards",
        "--reward_funcs",
        nargs="+",
        help="their values go into output_file: names from rewards/, or functions by dotted path (my_module.my_reward; "
        "default: correctness, or math_equal with dataset=math, and format)",
    )
    parser.add_argument(
        "--judge",
        help="the reward function by which an answer is right, at a value of 1 or more, and by which answers are equal "
        "for maj@K; default: as train.py evaluates, correctness, or math_equal with dataset=math",
    )
    parser.add_argument(
        "--reward_timeout", type=float, help="seconds that judge and rewards may take for a batch, with maj@K"
    )
    parser.add_argument("--system_message", help="put before the question (default: that of the training run)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto", help="auto, tpu, xla, cuda or cpu")


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Evaluate as the flags say.

    Args:
        argv: the flags; None: those of this process.
        command: what the user has called; None: the script of this process.

    Raises:
        ValueError: a setting, model, data set or file that can't work.
        KeyboardInterrupt: after the metrics of what is done have been printed.
    """
    argv, command = sys.argv[1:] if argv is None else argv, called_as(command)
    args = parse_args(argv, command)
    choose_device(argv)
    from .evaluation import evaluate  # knows Transformers; the device is chosen

    quiet_transformers()
    with said_as({f"model_name={args.model_path!r}": f"model_path={args.model_path!r}"}):
        evaluate(args, [*shlex.split(command), *argv])
