"""Ask a model questions; see its reasoning as numbered steps, then its answer."""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.model import TINY_NAME
from ..config.settings import require
from ..data.visible import visible
from ..rewards import extract_answer, extract_reasoning
from .script import Parser, called_as, check_output_file, choose_device, quiet_transformers

EXAMPLES = """
COMMAND --question "What is 47 + 38?"
COMMAND --model_path ./outputs --questions_file questions.jsonl --output_file answers.jsonl
"""
PROMPT_TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{content}\n\n### Response:\n"
    ),
    "chatml": "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "[INST] {content} [/INST]",
}


def parse_args(argv: Sequence[str], command: str) -> argparse.Namespace:
    """What is asked of which model, and how answers are sampled.

    Raises:
        ValueError: a value that can't be.
    """
    parser = Parser(command, f"{__doc__}\n{EXAMPLES}")
    parser.add_argument("--question", help="one question")
    parser.add_argument(
        "--questions_file", help="many: .txt with one a line, or a question column of .json, .jsonl, .csv ..."
    )
    parser.add_argument(
        "--model_path",
        help="model or adapter folder, or hub id (default: newest run under ./outputs, else the tiny model)",
    )
    parser.add_argument("--prompt_template", choices=["default", *PROMPT_TEMPLATES], default="default")
    parser.add_argument("--system_message", help="put before the question (default: that of the training run)")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--do_sample", action="store_true", default=True, help="the default")
    parser.add_argument("--no_do_sample", dest="do_sample", action="store_false", help="always the likeliest token")
    parser.add_argument("--num_samples", type=int, default=1, help="answers to each question")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--show_prompt", action="store_true", help="print the text that the model sees")
    parser.add_argument("--output_file", type=Path, help="also write the answers here, one JSON object a line")
    parser.add_argument("--device", default="auto", help="auto, tpu, xla, cuda or cpu")
    args = parser.parse_args(argv)
    if (args.question is None) == (args.questions_file is None):
        raise ValueError("give either --question or --questions_file")
    for name, good, hint in (
        ("max_new_tokens", args.max_new_tokens >= 1, "must be at least 1"),
        ("temperature", 0 < args.temperature < math.inf, "must be above 0; --no_do_sample takes the likeliest token"),
        ("top_p", 0 < args.top_p <= 1, "must be in (0, 1]"),
        ("top_k", args.top_k >= 0, "must not be negative"),
        ("num_samples", args.num_samples >= 1, "must be at least 1"),
    ):
        require(good, name, getattr(args, name), hint)
    check_output_file("output_file", args.output_file)
    exists = args.output_file is not None and args.output_file.exists()
    require(not exists, "output_file", str(args.output_file), "exists already; nothing is overwritten")
    return args


def reasoning_steps(completion: str) -> list[str]:
    """The reasoning as steps: its lines, or its sentences when it is one line. Numbers of its own are dropped."""
    reasoning = extract_reasoning(completion)
    if reasoning is None:
        reasoning = completion.partition("<answer>")[0].replace("<reasoning>", "")
    lines = [line.strip() for line in reasoning.splitlines() if line.strip()]
    if len(lines) == 1:
        lines = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", lines[0])
    return [re.sub(r"^(?:step\s*)?\d+[.:)]\s+", "", line, flags=re.IGNORECASE) for line in lines]


def show(result: dict[str, object], show_prompt: bool) -> None:
    """Print a question with its answers."""
    question = result["question"]
    print(visible(f"\nQuestion: {question if isinstance(question, str) else question[-1]['content']}"))
    if show_prompt:
        print(visible(f"Prompt:\n{result['prompt']}"))
    for number, completion in enumerate(result["completions"], start=1):
        if len(result["completions"]) > 1:
            print(f"--- sample {number}")
        for i, step in enumerate(reasoning_steps(completion), start=1):
            print(visible(f"  {i}. {step}"))
        final = extract_answer(completion)
        print(visible(f"Answer: {final}") if final is not None else "Answer: (none between <answer> tags)")


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
    from ..run.folder import newest_run
    from ..runtime import mesh
    from .answering import answer, load_questions

    quiet_transformers()
    questions = load_questions(args)
    model_path = args.model_path or newest_run() or TINY_NAME
    print(f"Model: {model_path}, on {mesh.describe()}")
    results = answer(args, questions, model_path)
    for result in results:
        show(result, args.show_prompt)
    if args.output_file:
        with open(args.output_file, "x", encoding="utf-8") as file:
            for result in results:
                answers = [extract_answer(completion) for completion in result["completions"]]
                file.write(json.dumps({**result, "answers": answers}) + "\n")
