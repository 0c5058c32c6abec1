"""Ask a model questions; see its reasoning as numbered steps, then its answer.

python inference.py --question "What is 47 + 38?"
python inference.py --model_path ./outputs --questions_file questions.jsonl --output_file answers.jsonl
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import utils

if __name__ == "__main__":
    utils.run_script(utils.choose_device)  # before anything imports Transformers

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rewards import extract_answer, extract_reasoning
from tunix_torch import Sampler, SamplingParams, device, load_model, load_tokenizer, tiny
from tunix_torch.data import Collator, encode_prompts, render_prompt
from tunix_torch.evaluation import sample_texts
from tunix_torch.model import eos_token_ids, place
from tunix_torch.readers import load_rows
from tunix_torch.run_folder import find_system_message, newest_run

PROMPT_TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{content}\n\n### Response:\n"
    ),
    "chatml": "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "[INST] {content} [/INST]",
}
BATCH_ROWS = 64  # completions at a time


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: utils.fail(message)
    parser.add_argument("--question", help="one question")
    parser.add_argument("--questions_file", help="many: .txt with one a line, or .json / .jsonl with a question column")
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


def load_questions(args: argparse.Namespace) -> list[str]:
    """The questions of the command line.

    Raises:
        ValueError: the file is missing, empty, or has a row without a question.
    """
    if args.question is not None:
        questions = [args.question]
    elif not Path(args.questions_file).is_file():
        raise ValueError(f"questions_file={args.questions_file!r}: no such file")
    elif Path(args.questions_file).suffix in (".json", ".jsonl"):
        rows = load_rows(args.questions_file)
        questions = [row.get("question") or row.get("prompt") for row in rows]
    else:
        questions = Path(args.questions_file).read_text(encoding="utf-8").splitlines()
        questions = [line for line in questions if line.strip()]
    for number, question in enumerate(questions, start=1):
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"question {number} is empty")
    if not questions:
        raise ValueError(f"questions_file={args.questions_file!r}: no questions")
    return questions


def build_prompt(tokenizer: PreTrainedTokenizerBase, template: str, question: str, system_message: str) -> str:
    """The text that the model sees, without a BOS token for the templates that are plain text."""
    if template == "default":
        return render_prompt(tokenizer, question, system_message)
    content = f"{system_message}\n\n{question}" if system_message else question
    return PROMPT_TEMPLATES[template].format(content=content)


def answer(args: argparse.Namespace, questions: list[str], model_path: str) -> list[dict[str, object]]:
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
    rows = [{"prompt_ids": ids} for ids in encoded]
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
    print(f"\nQuestion: {result['question']}")
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
    print(f"Model: {model_path}, on {device.describe()}")
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
