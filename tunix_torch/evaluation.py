"""How good a model is on questions with known answers: greedy accuracy (pass@1) and mean@k over samples."""

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from . import device
from .data import Collator, Row
from .sampler import Sampler, SamplingParams, draw_uniforms
from .scoring import RewardFunc, columns_of


@dataclass
class Answers:
    """Sampled answers to N questions, k each; `right[n][i]` says whether completion i of question n is right."""

    completions: list[list[str]]
    right: list[list[bool]]
    lengths: list[list[int]]  # tokens

    @property
    def accuracy(self) -> float:
        """Share of right completions: pass@1 when greedy, mean@k when k were sampled."""
        flat = [value for row in self.right for value in row]
        return sum(flat) / len(flat)

    @property
    def mean_length(self) -> float:
        flat = [value for row in self.lengths for value in row]
        return sum(flat) / len(flat)


def sample_texts(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    params: SamplingParams,
    collator: Collator,
    batch_size: int,
    num_completions: int = 1,
    seed: int = 0,
) -> tuple[list[list[str]], list[list[int]]]:
    """Sample `num_completions` completions for each of N rows; shows a progress bar when it takes many batches.

    Args:
        rows: N dicts with `prompt_ids`.
        batch_size: completions at a time; all batches have the same shape (the last is filled up by repeating a row).

    Returns:
        for each row its completions as texts, without special tokens, and their lengths in tokens.
    """
    at_once = min(len(rows), max(1, batch_size // num_completions))
    texts, lengths = [], []
    starts = range(0, len(rows), at_once)
    for start in tqdm(starts, desc="Sampling", unit="batch", leave=False, disable=len(starts) < 20):
        part = list(rows[start : start + at_once])
        batch = collator(part + [part[-1]] * (at_once - len(part)))
        first = start * num_completions
        uniforms = draw_uniforms((seed, 0), range(first, first + at_once * num_completions), params.max_new_tokens)
        target = device.torch_device()
        prompt_ids, prompt_mask = batch["prompt_ids"].to(target), batch["prompt_mask"].to(target)
        rollout = sampler.sample(prompt_ids, prompt_mask, num_completions, params, uniforms)
        count = len(part) * num_completions
        decoded = tokenizer.batch_decode(rollout.completion_ids[:count].tolist(), skip_special_tokens=True)
        counted = rollout.completion_mask[:count].sum(-1).tolist()
        for i in range(0, count, num_completions):
            texts.append(decoded[i : i + num_completions])
            lengths.append(counted[i : i + num_completions])
    return texts, lengths


def judge_answers(
    rows: Sequence[Row], completions: list[list[str]], lengths: list[list[int]], judge: RewardFunc
) -> Answers:
    """Judge k completions of each row: one is right when the reward function's value is at least 1."""
    copies = len(completions[0])
    prompts = [row["prompt"] for row in rows for _ in range(copies)]
    flat = [text for texts in completions for text in texts]
    values = list(judge(prompts=prompts, completions=flat, **columns_of(rows, copies)))
    right = [value is not None and value >= 1 for value in values]
    return Answers(completions, [right[i : i + copies] for i in range(0, len(right), copies)], lengths)
