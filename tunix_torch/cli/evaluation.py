"""The evaluation that the flags of `evaluate` describe: its questions, its judging, and its results on disk."""

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .. import rewards
from ..config.data import DataConfig
from ..config.model import TINY_NAME
from ..config.settings import require
from ..data.batches import Collator
from ..data.prompts import prepare_rows
from ..data.rows import PROMPT_IDS, Row, answer_text, question_of
from ..data.sources import load_eval_rows
from ..evals.answers import is_right, rows_at_once, sample_batches
from ..evals.results import JudgedCompletion, ResultsFile, summarize
from ..evals.votes import takes_answer, votes_by_class
from ..model.loading import eos_token_ids, load_model, load_tokenizer, place
from ..rewarding.columns import check_columns
from ..rewarding.context import RewardContext
from ..rewarding.scoring import call_rewards
from ..rollout.sampler import Sampler
from ..rollout.tokens import SamplingParams
from ..run.folder import find_prompt_settings, find_system_message, newest_model
from ..runtime import device, mesh
from ..runtime.memory import noting_what_takes_less

NUM_GENERATED_ROWS = 256
NEAR = Fraction(1, 10)  # of the expected number: so far off is partially right


# ---- questions and model ----


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """How tokens are chosen. Among the one likeliest token there is no choice, whatever the temperature."""
    if args.top_k == 1 or args.temperature == 0:
        return SamplingParams(args.max_new_tokens, temperature=0.0)
    return SamplingParams(args.max_new_tokens, args.temperature, args.top_k, args.top_p)


def data_config(args: argparse.Namespace) -> DataConfig:
    """Which questions are asked.

    Raises:
        ValueError: a value that can't be, or a setting that says something of data that is not given.
    """
    generated = args.data_path is None and args.dataset is None
    for name in ("data_source", "dataset_config", "question_column", "answer_column") if generated else ():
        require(getattr(args, name) is None, name, getattr(args, name), "of what? Give data_path or dataset")
    return DataConfig(
        val_data_path=args.data_path,
        data_source=args.data_source,
        dataset=args.dataset,
        dataset_config=args.dataset_config,
        val_dataset_split=args.split,
        question_column=args.question_column,
        answer_column=args.answer_column,
        num_eval_rows=args.max_samples or (NUM_GENERATED_ROWS if generated else sys.maxsize),
        judge=args.judge,
    )


def render_questions(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    system_message: str,
    max_prompt_length: int | None,
    prompt_settings: Mapping[str, Any],
) -> tuple[list[Row], list[int]]:
    """The rows whose prompts are short enough, with their prompts, and their numbers in the data, from 1.

    Raises:
        ValueError: no prompt is.
    """
    rows = prepare_rows(rows, tokenizer, sys.maxsize, system_message=system_message, **prompt_settings)
    limit = max_prompt_length or sys.maxsize
    numbered = [(row, number) for number, row in enumerate(rows, start=1) if len(row[PROMPT_IDS]) <= limit]
    if len(numbered) < len(rows):
        lengths = [len(row[PROMPT_IDS]) for row in rows]
        shortest = f"every prompt is longer; the shortest has {min(lengths)} tokens"
        require(bool(numbered), "max_prompt_length", max_prompt_length, shortest)
        left_out = f"{len(rows) - len(numbered)} of {len(rows)} questions are left out"
        print(f"{left_out}: their prompts are longer than max_prompt_length={limit}; the longest has {max(lengths)}")
    return [row for row, _ in numbered], [number for _, number in numbered]


def digest_of_weights(model_path: str) -> str | None:
    """A digest of all the weights in a model or adapter folder; None for a hub id."""
    if not Path(model_path).is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([*Path(model_path).glob("*.safetensors"), *Path(model_path).glob("*.bin")]):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def describe_settings(
    args: argparse.Namespace, model_path: str, system_message: str, rows: list[Row], votes_by: str
) -> dict:
    """All that a result depends on, as it is kept beside the results."""
    questions = json.dumps([[question_of(row), answer_text(row)] for row in rows])
    settings = {name: value for name, value in vars(args).items() if name not in ("output_file", "device")}
    return settings | {
        "model_path": model_path,
        "system_message": system_message,
        **find_prompt_settings(model_path),
        "device": device.KIND,
        "votes_by": votes_by,
        "num_questions": len(rows),
        "questions_sha256": hashlib.sha256(questions.encode()).hexdigest()[:16],
        "weights_sha256": digest_of_weights(model_path),
    }


# ---- judging ----


def is_near(given: str | None, expected: str | None) -> bool:
    """Whether both are numbers, and the given one is at most 10% off the expected one."""
    given_number, expected_number = rewards.parse_number(given or ""), rewards.parse_number(expected or "")
    if given_number is None or expected_number is None:
        return False
    return abs(given_number - expected_number) <= abs(expected_number) * NEAR


def vote_of(extracted: str | None) -> str | None:
    """The vote of an answer when the judge can't compare answers: its number, or else its words. None: no answer."""
    number = rewards.parse_number(extracted or "")
    return " ".join((extracted or "").casefold().split()) or None if number is None else str(number)


def judge_batch(
    rows: Sequence[Row],
    row_numbers: Sequence[int],
    texts: list[list[str]],
    tokens: list[list[list[int]]],
    judge: str,
    reward_names: Sequence[str],
    timeout: float | None = None,
) -> list[JudgedCompletion]:
    """Judge K completions of each of N rows.

    Args:
        row_numbers: N, of the rows in the data.
        tokens: of each completion, with the one that ended it.
        judge: the reward function that decides what is right, and which answers are equal.
        reward_names: the reward functions whose values are kept.
        timeout: seconds that all of them may take, with what the judge is asked for maj@K.

    Raises:
        ValueError: see `call_rewards`.
    """
    started, flat = time.monotonic(), [text for row_texts in texts for text in row_texts]
    functions = {name: rewards.find_reward(name) for name in (judge, "format", *reward_names)}
    context = RewardContext([ids for row_tokens in tokens for ids in row_tokens])
    scored = call_rewards(list(functions.values()), rows, flat, timeout, started=started, context=context)
    values = dict(zip(functions, scored, strict=True))
    copies = len(texts[0])
    right = list(map(is_right, values[judge]))
    answers = [[rewards.extract_answer(text) for text in row_texts] for row_texts in texts]
    if takes_answer(functions[judge]):
        verdicts = [right[start : start + copies] for start in range(0, len(right), copies)]
        votes = votes_by_class(rows, texts, answers, verdicts, functions[judge], timeout, started)
    else:
        votes = [[vote_of(answer) for answer in row_answers] for row_answers in answers]
    judged = []
    for i, text in enumerate(flat):
        row, copy = divmod(i, copies)
        answer, extracted = answer_text(rows[row]), answers[row][copy]
        judged.append(
            JudgedCompletion(
                row_number=row_numbers[row],
                pass_number=copy + 1,
                question=question_of(rows[row]),
                answer=answer,
                completion=text,
                extracted_answer=extracted,
                vote=votes[row][copy],
                right=right[i],
                partially_right=right[i] or is_near(extracted, answer),
                well_formed=values["format"][i] == 1.0,
                rewards={name: values[name][i] for name in reward_names},
                length=len(tokens[row][copy]),
            )
        )
    return judged


# ---- the job ----


def format_metrics(metrics: dict[str, float]) -> str:
    """The metrics as a table, the shares with their confidence intervals. With one completion of each question pass@1,
    mean@1 and maj@1 are the accuracy by other names, and left out."""
    lines = [f"{'':<20}{'':>8}   95% interval"]
    shares = {
        name: (value, metrics[f"{name}_low"], metrics[f"{name}_high"])
        for name, value in metrics.items()
        if f"{name}_low" in metrics
    }
    for name, (value, low, high) in shares.items():
        if "mean@1" not in shares or not name.endswith("@1"):
            lines.append(f"{name.replace('_', ' '):<20}{value:>8.1%}   {low:>6.1%} to {high:>6.1%}")
    lines.append(f"{'correct':<20}{metrics['correct']:>8} of {metrics['total']}")
    lines.append(f"{'mean length':<20}{metrics['mean_length']:>8.1f} tokens")
    return "\n".join(lines)


def evaluate(args: argparse.Namespace, called: Sequence[str]) -> dict[str, float]:
    """Sample, judge, write, print. Returns the metrics.

    Args:
        called: the words of the command, to say how to continue.

    Raises:
        ValueError: a setting, model, data set or file that can't work.
        KeyboardInterrupt: after the metrics of what is done have been printed.
    """
    model_path = args.model_path or newest_model() or TINY_NAME
    config = data_config(args)
    args.judge, args.rewards = config.judge_in_force, args.rewards or [config.right_answers, "format"]
    functions = [rewards.find_reward(name) for name in (*args.rewards, args.judge)]  # complains before all is loaded
    tokenizer = load_tokenizer(model_path)
    system_message = find_system_message(model_path) if args.system_message is None else args.system_message
    questions = load_eval_rows(config, "data_path")
    rows, row_numbers = render_questions(
        questions, tokenizer, system_message, args.max_prompt_length, find_prompt_settings(model_path)
    )
    check_columns(functions, rows)
    votes_by = args.judge if takes_answer(functions[-1]) else "text"
    announce(args, model_path, len(rows), votes_by)

    results, judged = None, []
    if args.output_file:
        results = ResultsFile(args.output_file, describe_settings(args, model_path, system_message, rows, votes_by))
        judged = results.read(row_numbers, rows_at_once(len(rows), args.batch_size, args.num_passes))
    num_done = len(judged) // args.num_passes
    if num_done == len(rows):
        print("All of it is done already; nothing is sampled again")
        return finish(judged, num_done, results)
    if results is not None and num_done == 0:
        results.write_summary(0, None)  # before the first line: whoever continues compares the settings
    if num_done:
        print(f"Continuing after {num_done} of {len(rows)} questions", flush=True)
    try:
        sample_and_judge(args, model_path, tokenizer, rows, row_numbers, results, judged)
    except KeyboardInterrupt:
        num_done = len(judged) // args.num_passes
        print(f"\nstopped after {num_done} of {len(rows)} questions", file=sys.stderr)
        if judged:
            finish(judged, num_done, results)
        if results is not None:
            chosen = [] if args.model_path else ["--model_path", model_path]  # a newer run may come
            print(f"This continues: {shlex.join([*called, *chosen])}", file=sys.stderr)
        raise
    return finish(judged, len(rows), results)


def announce(args: argparse.Namespace, model_path: str, num_questions: int, votes_by: str) -> None:
    """Print what is evaluated, and how."""
    params, passes = sampling_params(args), args.num_passes
    print(f"Model: {model_path}, on {mesh.describe()}")
    print(f"Judge: {args.judge}{', which takes no answer: for maj@K texts are compared' if votes_by == 'text' else ''}")
    how = f"temperature {params.temperature:g}, top_k {params.top_k}, top_p {params.top_p:g}"
    print(
        f"{num_questions} questions, {passes} x each, {how if params.temperature else 'the likeliest token'}",
        flush=True,
    )
    if params.temperature == 0 and passes > 1:
        print(f"num_passes={passes}: all {passes} are the same; a preset with variety is standard", file=sys.stderr)


@noting_what_takes_less("answering")
def sample_and_judge(
    args: argparse.Namespace,
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    row_numbers: Sequence[int],
    results: ResultsFile | None,
    judged: list[JudgedCompletion],
) -> None:
    """Sample and judge the rows that are not in `judged` yet; what is judged is appended to it, and to the results."""
    num_done = len(judged) // args.num_passes
    model = place(load_model(model_path)).eval()
    sampler = Sampler(model, eos_token_ids(model, tokenizer), tokenizer.pad_token_id)
    collator = Collator(tokenizer.pad_token_id, max(len(row[PROMPT_IDS]) for row in rows))
    batches = sample_batches(
        sampler,
        tokenizer,
        rows,
        sampling_params(args),
        collator,
        args.batch_size,
        args.num_passes,
        args.seed,
        start=num_done,
    )
    with tqdm(total=len(rows), initial=num_done, unit="question", dynamic_ncols=True, disable=None) as bar:
        for texts, tokens in batches:
            part = slice(num_done, num_done + len(texts))
            batch = judge_batch(
                rows[part], row_numbers[part], texts, tokens, args.judge, args.rewards, args.reward_timeout
            )
            if results is not None:
                results.append(batch)
            judged += batch
            num_done += len(texts)
            bar.set_postfix_str(f"accuracy {sum(c.right for c in judged) / len(judged):.1%}", refresh=False)
            bar.update(len(texts))


def finish(judged: Sequence[JudgedCompletion], num_done: int, results: ResultsFile | None) -> dict[str, float]:
    """Sum up, print, and keep in the summary."""
    metrics = summarize(judged)
    print(format_metrics(metrics))
    if results is not None:
        results.write_summary(num_done, metrics)
        print(f"Completions: {results.path}, summary: {results.summary}")
    return metrics
