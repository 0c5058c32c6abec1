"""Answers of a model to questions that a user asks: which questions, as which prompts, sampled."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.batches import Collator
from ..data.files import FORMATS, format_of, open_text
from ..data.prompts import encode_prompts, render_prompt
from ..data.readers import load_rows
from ..data.rows import PROMPT_IDS, QUESTION, TURNS, prompt_of
from ..data.shapes import normalize_row
from ..evals.answers import sample_texts
from ..model.loading import eos_token_ids, load_model, load_tokenizer, place
from ..rollout.sampler import Sampler
from ..rollout.tokens import SamplingParams
from ..run.folder import find_prompt_settings, find_system_message
from .ask import PROMPT_TEMPLATES

BATCH_ROWS = 64  # completions at a time

Question = str | Sequence[Mapping[str, Any]]  # a text, or messages


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


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    question: Question,
    system_message: str,
    prompt_settings: Mapping[str, Any],
) -> str:
    """The text that the model sees, without a BOS token for the templates that are plain text.

    Args:
        prompt_settings: of the training run, from `find_prompt_settings`; the default template takes them.
    """
    if template == "default":
        return render_prompt(tokenizer, question, system_message, **prompt_settings)
    if not isinstance(question, str):
        raise ValueError(f"prompt_template={template!r}: is for texts; messages are rendered by the default")
    content = f"{system_message}\n\n{question}" if system_message else question
    return PROMPT_TEMPLATES[template].format(content=content)


def answer(args: argparse.Namespace, questions: list[Question], model_path: str) -> list[dict[str, object]]:
    """Sample answers. Returns a dict a question: "question", "prompt", and "completions" (texts)."""
    tokenizer = load_tokenizer(model_path)
    system_message = find_system_message(model_path) if args.system_message is None else args.system_message
    settings, template = find_prompt_settings(model_path), args.prompt_template
    prompts = [build_prompt(tokenizer, template, question, system_message, settings) for question in questions]
    wraps = settings.get("wrap_prompts", True)
    encoded = [
        encode_prompts(tokenizer, [prompt])[0]
        if template == "default" and (wraps or not isinstance(question, str))
        else tokenizer(prompt, add_special_tokens=True)["input_ids"]
        for question, prompt in zip(questions, prompts, strict=True)
    ]
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
