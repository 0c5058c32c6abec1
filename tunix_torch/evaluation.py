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


def answer_questions(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    judge: RewardFunc,
    params: SamplingParams,
    collator: Collator,
    batch_size: int,
    num_completions: int = 1,
    seed: int = 0,
) -> Answers:
    """Sample answers to every row's prompt and judge them.

    Args:
        rows: from `prepare_rows`.
        judge: a reward function; a completion is right when its value is at least 1.
        batch_size: completions at a time; all batches have the same shape (the last is filled up by repeating a row).
    """
    at_once = max(1, batch_size // num_completions)
    answers = Answers([], [], [])
    starts = range(0, len(rows), at_once)
    for start in tqdm(starts, desc="Evaluation", unit="batch", leave=False, disable=len(starts) < 20):
        part = list(rows[start : start + at_once])
        filled = part + [part[-1]] * (at_once - len(part))
        batch = collator(filled)
        first = start * num_completions
        uniforms = draw_uniforms((seed, 0), range(first, first + at_once * num_completions), params.max_new_tokens)
        target = device.torch_device()
        prompt_ids, prompt_mask = batch["prompt_ids"].to(target), batch["prompt_mask"].to(target)
        rollout = sampler.sample(prompt_ids, prompt_mask, num_completions, params, uniforms)
        count = len(part) * num_completions
        texts = tokenizer.batch_decode(rollout.completion_ids[:count].tolist(), skip_special_tokens=True)
        lengths = rollout.completion_mask[:count].sum(-1).tolist()
        prompts = [row["prompt"] for row in part for _ in range(num_completions)]
        values = judge(prompts, texts, **columns_of(part, num_completions))
        right = [value is not None and value >= 1 for value in values]
        for i in range(0, count, num_completions):
            answers.completions.append(texts[i : i + num_completions])
            answers.right.append(right[i : i + num_completions])
            answers.lengths.append(lengths[i : i + num_completions])
    return answers
