"""Answers of a model to questions that a user asks: which questions, as which prompts, sampled."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..config.settings import require
from ..data.batches import Collator
from ..data.files import FORMATS, format_of, open_text
from ..data.prompts import decode_completions, encode_prompts, render_prompt
from ..data.readers import load_rows
from ..data.rows import PROMPT_IDS, QUESTION, TURNS, prompt_of
from ..data.shapes import normalize_row
from ..evals.answers import sample_batches
from ..model.forward import text_config
from ..model.loading import base_model_name, eos_token_ids, load_model, load_tokenizer, place
from ..model.origin import is_tiny
from ..rollout.rows import Rows
from ..rollout.sampler import Sampler
from ..rollout.tokens import SamplingParams
from ..run.folder import find_prompt_settings, find_system_message, settings_near
from .ask import PROMPT_TEMPLATES

BATCH_ROWS = 64  # completions at a time

Question = str | Sequence[Mapping[str, Any]]  # a text, or messages


def load_questions(args: argparse.Namespace) -> list[Question]:
    """The questions of the command line.

    Raises:
        ValueError: the file is missing, empty, can't be read, or has a row without a question.
    """
    column = args.question_column
    if args.question is not None:
        rows = [normalize_row({"question": args.question}, 1, "--question")]
    elif format_of(Path(args.questions_file)) is None:
        hint = f"{args.questions_file} is read as a text, a question a line; columns are in {', '.join(FORMATS)}"
        require(column is None, "question_column", column, hint)
        rows = read_lines(Path(args.questions_file))
    else:
        rows = load_rows(args.questions_file, setting="questions_file")
        rows = [
            normalize_row(row, number, args.questions_file, question_column=column)
            for number, row in enumerate(rows, start=1)
        ]
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


def asks_tiny(model_path: str) -> bool:
    """Whether the tiny model answers: by itself, or as a job of `train` has trained it on the questions of its own."""
    settings = settings_near(model_path)
    if not settings:
        return is_tiny(model_path)
    other_data = settings.get("data_path") or settings.get("dataset")
    return is_tiny(settings.get("model_name", "")) and not other_data


class Asked:
    """A model that answers questions as the flags say. Its prompts are those that it was trained with.

    Args:
        args: the flags of `ask`.
        model_path: a folder, a hub id, or "tiny".

    Raises:
        ValueError: the model can't be loaded, or the base is to be compared and the model has no adapter.
    """

    def __init__(self, args: argparse.Namespace, model_path: str) -> None:
        if args.compare_base and base_model_name(model_path) == model_path:
            raise ValueError(f"compare_base: {model_path} is no adapter, so there is no base model behind it")
        self.args, self.tokenizer = args, load_tokenizer(model_path)
        self.system_message = find_system_message(model_path) if args.system_message is None else args.system_message
        self.settings = find_prompt_settings(model_path)
        self.model = place(load_model(model_path)).eval()
        self.sampler = Sampler(self.model, eos_token_ids(self.model, self.tokenizer), self.tokenizer.pad_token_id)
        self.params = SamplingParams(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
        if not args.do_sample:
            self.params = SamplingParams(args.max_new_tokens, temperature=0.0)

    def prompt(self, question: Question) -> tuple[str, list[int]]:
        """The text that the model sees for a question, and its tokens."""
        template, tokenizer = self.args.prompt_template, self.tokenizer
        text = build_prompt(tokenizer, template, question, self.system_message, self.settings)
        if template == "default" and (self.settings.get("wrap_prompts", True) or not isinstance(question, str)):
            return text, encode_prompts(tokenizer, [text])[0]
        return text, tokenizer(text, add_special_tokens=True)["input_ids"]

    def answers(self, questions: Sequence[Question]) -> Iterator[list[dict[str, Any]]]:
        """Sample answers, a batch at a time.

        Yields:
            a dict a question: "question", "prompt", "completions" (texts), and with `compare_base` "base_completions",
            from the same random numbers.
        """
        prompts, encoded = zip(*map(self.prompt, questions), strict=True)
        rows = [{PROMPT_IDS: ids} for ids in encoded]
        how = self.params, Collator(self.tokenizer.pad_token_id, max(map(len, encoded))), BATCH_ROWS
        how += self.args.num_samples, self.args.seed
        adapted = sample_batches(self.sampler, self.tokenizer, rows, *how)
        of_base = sample_batches(self.sampler, self.tokenizer, rows, *how) if self.args.compare_base else None
        done = 0
        for texts, _ in adapted:
            batch = [{"completions": completions} for completions in texts]
            if of_base is not None:
                with self.model.disable_adapter():
                    texts, _ = next(of_base)
                batch = [row | {"base_completions": texts[i]} for i, row in enumerate(batch)]
            part = slice(done, done + len(batch))
            named = zip(questions[part], prompts[part], batch, strict=True)
            yield [{"question": question, "prompt": prompt, **row} for question, prompt, row in named]
            done += len(batch)

    def stream(self, ids: list[int], seed: int, show: Callable[[str], None]) -> str:
        """Sample one answer to a prompt.

        Args:
            ids: the tokens of the prompt.
            show: is given the text of the answer so far, after every token.

        Returns:
            the whole answer.
        """

        def watch(rows: Rows) -> None:
            tokens = rows.tensors[0][:1].cpu()[:, : rows.used + 1]  # the whole tensor comes first: its shape is fixed
            ends = torch.isin(tokens, torch.tensor(self.sampler.eos_token_ids)).long()
            mask = ends.cumsum(-1) - ends == 0  # up to the first token that ends the answer
            show(decode_completions(self.tokenizer, tokens, mask, self.sampler.eos_token_ids)[0])

        collator = Collator(self.tokenizer.pad_token_id, len(ids))
        self.sampler.watch, interval = watch, self.sampler.stop_check_interval
        self.sampler.stop_check_interval = 1  # else a call on a device may decode many tokens
        try:
            (([text],), _), *_ = sample_batches(
                self.sampler, self.tokenizer, [{PROMPT_IDS: ids}], self.params, collator, batch_size=1, seed=seed
            )
        finally:
            del self.sampler.watch
            self.sampler.stop_check_interval = interval
        return text

    @property
    def most_tokens(self) -> int | None:
        """How many tokens prompt and answer may have together; None: the model's config does not say."""
        return text_config(self.model).max_position_embeddings
