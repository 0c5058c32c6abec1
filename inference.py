"""Ask a model questions; see its reasoning as numbered steps, then its answer.

python inference.py --question "What is 47 + 38?"
python inference.py --model_path ./outputs --questions_file questions.jsonl --output_file answers.jsonl
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import utils

if __name__ == "__main__":
    utils.run_script(utils.choose_device)  # before anything imports Transformers

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tunix_torch import Sampler, SamplingParams, load_model, load_tokenizer
from tunix_torch.data.prompts import Collator, encode_prompts, render_prompt
from tunix_torch.data.readers import FORMATS, format_of, load_rows, open_text
from tunix_torch.data.rows import PROMPT_IDS, QUESTION, TURNS, prompt_of
from tunix_torch.data.shapes import normalize_row
from tunix_torch.evals.answers import sample_texts
from tunix_torch.model import tiny
from tunix_torch.model.loading import eos_token_ids, place
from tunix_torch.rewards import extract_answer, extract_reasoning
from tunix_torch.run.folder import find_system_message, newest_run
from tunix_torch.runtime import mesh

PROMPT_TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{content}\n\n### Response:\n"
    ),
    "chatml": "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "[INST] {content} [/INST]",
}
BATCH_ROWS = 64  # completions at a time

Question = str | Sequence[Mapping[str, Any]]  # a text, or messages


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: utils.fail(message)
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
    parser.add_argument("--output_file", help="also write the answers here, one JSON object a line")
    parser.add_argument("--device", default="auto", help="auto, xla, cuda or cpu")
    args = parser.parse_args(argv)
    if (args.question is None) == (args.questions_file is None):
        raise ValueError("give either --question or --questions_file")
    for name, good, right in (
        ("max_new_tokens", args.max_new_tokens >= 1, "must be at least 1"),
        (
            "temperature",
            0 < args.temperature < float("inf"),
            "must be above 0; --no_do_sample takes the likeliest token",
        ),
        ("top_p", 0 < args.top_p <= 1, "must be in (0, 1]"),
        ("top_k", args.top_k >= 0, "must not be negative"),
        ("num_samples", args.num_samples >= 1, "must be at least 1"),
    ):
        if not good:
            raise ValueError(f"{name}={getattr(args, name)}: {right}")
    if args.output_file and Path(args.output_file).exists():
        raise ValueError(f"output_file={args.output_file!r}: exists already; nothing is overwritten")
    if args.output_file and not Path(args.output_file).absolute().parent.is_dir():
        raise ValueError(f"output_file={args.output_file!r}: its folder does not exist")
    return args


def load_questions(args: argparse.Namespace) -> list[Question]:
    """The questions of the command line.

    Raises:
        ValueError: the file is missing, empty, can't be read, or has a row without a question.
    """
    if args.question is not None:
        rows = [normalize_row({"question": args.question}, 1, "--question")]
    elif format_of(Path(args.questions_file)) is None:
        rows = read_lines(Path(args.questions_file))
    else:
        rows = load_rows(args.questions_file, setting="questions_file")
        rows = [normalize_row(row, number, args.questions_file) for number, row in enumerate(rows, start=1)]
    if not rows:
        raise ValueError(f"questions_file={args.questions_file!r}: no questions")
    return [prompt_of(row) if row[TURNS] else row[QUESTION] for row in rows]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A row for each line of a text that isn't blank."""
    if not path.is_file():
        raise ValueError(f"questions_file={str(path)!r}: no such file")
    try:
        with open_text(path) as file:
            lines = [line.removesuffix("\n").removesuffix("\r") for line in file]
    except UnicodeDecodeError as error:
        known = f"a text with a question a line, or {', '.join(FORMATS)} with a column"
        raise ValueError(f"questions_file={str(path)!r}: not UTF-8: {error}; expected {known}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [normalize_row({"question": line}, number, f"{path}") for number, line in numbered]


def build_prompt(tokenizer: PreTrainedTokenizerBase, template: str, question: Question, system_message: str) -> str:
    """The text that the model sees, without a BOS token for the templates that are plain text."""
    if template == "default":
        return render_prompt(tokenizer, question, system_message)
    if not isinstance(question, str):
        raise ValueError(f"prompt_template={template!r}: is for texts; messages are rendered by the default")
    content = f"{system_message}\n\n{question}" if system_message else question
    return PROMPT_TEMPLATES[template].format(content=content)


def answer(args: argparse.Namespace, questions: list[Question], model_path: str) -> list[dict[str, object]]:
    """Sample answers. Returns a dict a question: "question", "prompt", and "completions" (texts)."""
    tokenizer = load_tokenizer(model_path)
    system_message = find_system_message(model_path) if args.system_message is None else args.system_message
    prompts = [build_prompt(tokenizer, args.prompt_template, question, system_message) for question in questions]
    if args.prompt_template == "default":
        encoded = encode_prompts(tokenizer, prompts)
    else:
        encoded = tokenizer(prompts, add_special_tokens=True)["input_ids"]
    model = place(load_model(model_path)).eval()
    sampler = Sampler(model, eos_token_ids(model, tokenizer), tokenizer.pad_token_id)
    params = SamplingParams(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    if not args.do_sample:
        params = SamplingParams(args.max_new_tokens, temperature=0.0)
    rows = [{PROMPT_IDS: ids} for ids in encoded]
    collator = Collator(tokenizer.pad_token_id, max(map(len, encoded)))
    texts, _ = sample_texts(sampler, tokenizer, rows, params, collator, BATCH_ROWS, args.num_samples, args.seed)
    return [
        {"question": question, "prompt": prompt, "completions": completions}
        for question, prompt, completions in zip(questions, prompts, texts, strict=True)
    ]


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
    print(f"\nQuestion: {question if isinstance(question, str) else question[-1]['content']}")
    if show_prompt:
        print(f"Prompt:\n{result['prompt']}")
    for number, completion in enumerate(result["completions"], start=1):
        if len(result["completions"]) > 1:
            print(f"--- sample {number}")
        for i, step in enumerate(reasoning_steps(completion), start=1):
            print(f"  {i}. {step}")
        final = extract_answer(completion)
        print(f"Answer: {final}" if final is not None else "Answer: (none between <answer> tags)")


def main() -> None:
    args = parse_args(sys.argv[1:])
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    questions = load_questions(args)
    model_path = args.model_path or newest_run() or tiny.NAME
    print(f"Model: {model_path}, on {mesh.describe()}")
    results = answer(args, questions, model_path)
    for result in results:
        show(result, args.show_prompt)
    if args.output_file:
        with open(args.output_file, "x", encoding="utf-8") as file:
            for result in results:
                answers = [extract_answer(completion) for completion in result["completions"]]
                file.write(json.dumps({**result, "answers": answers}) + "\n")


if __name__ == "__main__":
    utils.run_script(main)
