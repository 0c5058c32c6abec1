"""Ask a model questions, or talk with it; see its reasoning as numbered steps, then its answer."""

import argparse
import contextlib
import math
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.model import TINY_NAME
from ..config.settings import require, said_as
from ..data.visible import visible
from ..rewards import extract_answer, extract_reasoning
from ..runtime.columns import columns_of
from .script import Parser, called_as, check_output_file, choose_device, quiet_transformers
from .serving import how_to_serve

EXAMPLES = """
COMMAND --question "What is 47 + 38?"
COMMAND --chat                                     # a conversation; also: echo "1 + 1?" | COMMAND --chat
COMMAND --compare_base --question "What is 47 + 38?"  # with the adapter and without it, side by side
COMMAND --questions_file questions.csv --question_column ask --output_file answers.parquet
COMMAND --serve                                    # prints how vLLM, Transformers and llama.cpp serve the model
"""
OUTPUT_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")  # .json means JSON lines too
FEW = 64  # so many answers need no bar that shows how far they are
PROMPT_TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{content}\n\n### Response:\n"
    ),
    "chatml": "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "[INST] {content} [/INST]",
}


class Once(argparse.Action):
    """Takes the value of a flag that may be given once: of two values one would be lost without a word."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, value: Any, flag: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{flag} was given twice; --questions_file takes many")
        setattr(namespace, self.dest, value)


def parse_args(argv: Sequence[str], command: str) -> argparse.Namespace:
    """What is asked of which model, and how answers are sampled.

    Raises:
        ValueError: a value that can't be.
    """
    parser = Parser(command, f"{__doc__}\n{EXAMPLES}")
    parser.add_argument("--question", action=Once, help="one question")
    parser.add_argument(
        "--questions_file", help="many: .txt with one a line, or a question column of .jsonl, .csv, .parquet ..."
    )
    parser.add_argument("--question_column", help="column of the questions_file (default: prompt or question)")
    parser.add_argument(
        "--chat", action="store_true", help="talk with the model: questions from the keyboard or a pipe"
    )
    parser.add_argument("--serve", action="store_true", help="only print the commands of other programs that serve it")
    parser.add_argument("--compare_base", action="store_true", help="answers without the adapter too, side by side")
    parser.add_argument(
        "--model_path",
        "--model_name",
        help="model or adapter folder, or hub id (default: newest run or checkpoint in ./outputs, else the tiny model)",
    )
    parser.add_argument("--prompt_template", choices=["default", *PROMPT_TEMPLATES], default="default")
    parser.add_argument("--system_message", help="put before the question (default: that of the training run)")
    parser.add_argument("--max_new_tokens", "--generation_max_length", type=int, default=512)
    parser.add_argument("--temperature", "--generation_temperature", type=float, default=0.7)
    parser.add_argument("--top_p", "--generation_top_p", type=float, default=0.9)
    parser.add_argument("--top_k", "--generation_top_k", type=int, default=50)
    parser.add_argument("--do_sample", action="store_true", default=True, help="the default")
    parser.add_argument("--no_do_sample", dest="do_sample", action="store_false", help="always the likeliest token")
    parser.add_argument("--num_samples", type=int, default=1, help="answers to each question")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--show_prompt", action="store_true", help="print the text that the model sees")
    parser.add_argument("--output_file", type=Path, help="also write the answers here: .jsonl, .csv or .parquet")
    parser.add_argument("--device", default="auto", help="auto, tpu, xla, cuda or cpu")
    args = parser.parse_args(argv)
    _check_together(args)
    for name, good, hint in (
        ("max_new_tokens", args.max_new_tokens >= 1, "must be at least 1"),
        ("temperature", 0 < args.temperature < math.inf, "must be above 0; --no_do_sample takes the likeliest token"),
        ("top_p", 0 < args.top_p <= 1, "must be in (0, 1]"),
        ("top_k", args.top_k >= 0, "must not be negative"),
        ("num_samples", args.num_samples >= 1, "must be at least 1"),
    ):
        require(good, name, getattr(args, name), hint)
    check_output_file("output_file", args.output_file)
    if args.output_file is not None:
        hint = f"must end in {', '.join(OUTPUT_ENDINGS)}"
        require(args.output_file.suffix.lower() in OUTPUT_ENDINGS, "output_file", str(args.output_file), hint)
    exists = args.output_file is not None and args.output_file.exists()
    require(not exists, "output_file", str(args.output_file), "exists already; nothing is overwritten")
    return args


def _check_together(args: argparse.Namespace) -> None:
    """Raises ValueError where flags ask for two things at once, or one of them would have no effect."""
    asked = {"question": args.question, "questions_file": args.questions_file, "chat": args.chat, "serve": args.serve}
    given = [f"--{name}" for name, value in asked.items() if value not in (None, False)]
    if len(given) != 1:
        raise ValueError(
            f"give one of --question, --questions_file, --chat or --serve, not {' and '.join(given) or 'none'}"
        )
    alone = {
        "question_column": (args.question_column, "--questions_file"),
        "compare_base": (args.compare_base, "--question or --questions_file"),
        "output_file": (args.output_file and str(args.output_file), "--question or --questions_file"),
        "show_prompt": (args.show_prompt, "--question or --questions_file"),
        "num_samples": (args.num_samples != 1 and args.num_samples, "--question or --questions_file"),
        "prompt_template": (
            args.prompt_template != "default" and args.prompt_template,
            "--question or --questions_file",
        ),
    }
    for name, (value, goes_with) in alone.items():
        if value and given[0] not in goes_with.split(" or "):
            raise ValueError(f"{name}={value!r}: goes with {goes_with}, not with {given[0]}")


def reasoning_steps(completion: str) -> list[str]:
    """The reasoning as steps: its lines, or its sentences when it is one line. Numbers of its own are dropped."""
    reasoning = extract_reasoning(completion)
    if reasoning is None:
        reasoning = completion.partition("<answer>")[0].replace("<reasoning>", "")
    lines = [line.strip() for line in reasoning.splitlines() if line.strip()]
    if len(lines) == 1:
        lines = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", lines[0])
    return [re.sub(r"^(?:step\s*)?\d+[.:)]\s+", "", line, flags=re.IGNORECASE) for line in lines]


def lines_of(completion: str) -> list[str]:
    """A completion as the numbered steps of its reasoning, and its answer."""
    final = extract_answer(completion)
    steps = [f"{i}. {step}" for i, step in enumerate(reasoning_steps(completion), start=1)]
    answer = "(none between <answer> tags)" if final is None else final
    return [*(f"  {step}" for step in steps), f"Answer: {answer}"]


def side_by_side(left: Sequence[str], right: Sequence[str], width: int) -> list[str]:
    """Two texts in columns of equal width."""
    column = max(width - 3, 20) // 2
    folded = [[part for line in lines for part in textwrap.wrap(line, column) or [""]] for lines in (left, right)]
    height = max(map(len, folded))
    folded = [lines + [""] * (height - len(lines)) for lines in folded]
    return [f"{one:<{column}} | {other}".rstrip() for one, other in zip(*folded, strict=True)]


def show(result: dict[str, object], show_prompt: bool) -> None:
    """Print a question with its answers, beside those of the base model where there are some."""
    question = result["question"]
    print(visible(f"\nQuestion: {question if isinstance(question, str) else question[-1]['content']}"))
    if show_prompt:
        print(visible(f"Prompt:\n{result['prompt']}"))
    for number, completion in enumerate(result["completions"], start=1):
        if len(result["completions"]) > 1:
            print(f"--- sample {number}")
        lines = [visible(line) for line in lines_of(completion)]
        if "base_completions" in result:
            of_base = [visible(line) for line in lines_of(result["base_completions"][number - 1])]
            width = columns_of(sys.stdout)
            lines = side_by_side(["with the adapter", *lines], ["base model", *of_base], width)
        print("\n".join(lines))


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Ask, print, and write the answers where a file is named.

    Args:
        argv: the flags; None: those of this process.
        command: what the user has called; None: the script of this process.

    Raises:
        ValueError: a value, file or model that can't work.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv, called_as(command))
    choose_device(argv)
    # The device is chosen: what knows Transformers may be imported.
    from ..run.folder import newest_model
    from ..runtime import mesh
    from .answering import Asked, asks_tiny, load_questions
    from .chat import chat

    quiet_transformers()
    model_path = args.model_path or newest_model() or TINY_NAME
    with said_as({f"model_name={model_path!r}": f"model_path={model_path!r}"}):
        if args.serve:
            print("\n".join(how_to_serve(model_path)))
            return
        questions = [] if args.chat else load_questions(args)
        knows = "; it has learned sums, differences and products like 47 + 38, one at a time" * asks_tiny(model_path)
        print(f"Model: {model_path}, on {mesh.describe()}{knows}", flush=True)
        if args.chat:
            chat(args, model_path)
            return
        _ask_all(Asked(args, model_path), questions, args)


def _ask_all(asked: Any, questions: Sequence[Any], args: argparse.Namespace) -> None:
    """Print the answers to all questions, and write them where a file is named. A bar shows how far many of them are.

    Args:
        asked: an `answering.Asked`.
        questions: from `answering.load_questions`.
    """
    from tqdm import tqdm

    from .answer_files import AnswersFile

    with contextlib.ExitStack() as stack:
        file = None  # it is made when there is something to write
        is_short = len(questions) * args.num_samples <= FEW
        bar = stack.enter_context(
            tqdm(total=len(questions), unit="question", dynamic_ncols=True, disable=is_short or None)
        )
        done = 0
        try:
            for results in asked.answers(questions):
                with tqdm.external_write_mode():
                    for result in results:
                        show(result, args.show_prompt)
                if args.output_file:
                    file = file or stack.enter_context(AnswersFile(args.output_file, args.compare_base))
                    file.append(results)
                bar.update(len(results))
                done += len(results)
        except KeyboardInterrupt:
            kept = f"; {args.output_file} holds their answers" if file is not None else ""
            print(f"\nstopped after {done} of {len(questions)} questions{kept}", file=sys.stderr)
            raise
