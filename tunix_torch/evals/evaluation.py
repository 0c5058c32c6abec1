"""Evaluates a model while it is trained: greedy and sampled answers, what they are rewarded, and with SFT the loss."""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerState

from ..config.grpo import GRPOConfig
from ..data.batches import Collator
from ..data.rows import Row
from ..learn.sft import completion_loss
from ..rewarding.context import means
from ..rewarding.scorer import Scorer
from ..rewarding.scoring import RewardFunc, require_columns
from ..rollout.sampler import Sampler
from ..rollout.tokens import SamplingParams
from ..runtime import phases, together
from ..runtime.memory import noting_what_takes_less
from ..runtime.once import warn_once
from .answers import Answers, answer
from .estimators import share_interval

logger = logging.getLogger(__name__)


@phases.during("evaluating")
@noting_what_takes_less("evaluating")
def evaluate_policy(
    model: nn.Module,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    collator: Collator,
    judge: RewardFunc | None,
    args: GRPOConfig,
    scorer: Scorer,
    further: Callable[[Sequence[Row], Answers | None], dict[str, float]],
    prefix: str = "eval",
    state: TrainerState | None = None,
) -> tuple[dict[str, float], Answers | None]:
    """Evaluate a policy on the evaluation questions.

    Args:
        rows: rows from `prepare_rows`; with SFT they have completions.
        collator: the collator of rows, as `Questions` has it.
        judge: the reward function that decides which answers are right; None: nobody knows, and with SFT no question is
            answered.
        scorer: has the reward functions whose values are reported. A function that takes a column which a row lacks is
            left out, with a warning.
        further: gives more metrics, of the rows and of k sampled answers to each, if there are some.
        prefix: what the names of metrics begin with.
        state: of the trainer, for functions that take `trainer_state`.

    Returns:
        the metrics, and the greedy answers or None. After `prefix` and "_" the metrics are, where there is a judge,
        `accuracy` (greedy pass@1), `mean_length` in tokens, and with `num_eval_completions` = k also `mean@k`, each of
        the shares with its 95% interval as `interval/NAME_low` and `interval/NAME_high`; with SFT `loss`; what
        `answer_metrics` gives of the greedy answers, and of k samples a question under names that begin with
        `sampled/`; what functions log, a number `n` of the greedy answers and `n@k` of the sampled ones; and `runtime`,
        in seconds.

    Raises:
        ValueError: see `call_rewards`.
    """
    metrics: dict[str, float] = {}
    greedy, samples, started = None, None, time.perf_counter()
    if judge is not None or (args.use_grpo and scorer.functions):
        reported = functions_to_report(scorer, rows)
        answer_rows = functools.partial(
            answer,
            sampler,
            tokenizer,
            rows,
            collator=Collator(collator.pad_token_id, args.max_prompt_length),
            batch_size=args.per_device_eval_batch_size,
            judge=judge,
            seed=args.seed,
            timeout=args.reward_timeout,
            reward_funcs=[scorer.functions[j] for j in reported],
            state=state,
        )
        names, weights = [scorer.names[j] for j in reported], scorer.weights[reported]
        greedy = answer_rows(SamplingParams(args.generation_max_length, temperature=0.0))
        greedy.names, greedy.weights = names, weights.tolist()
        metrics |= {} if judge is None else {"accuracy": greedy.accuracy, "mean_length": greedy.mean_length}
        metrics |= {} if judge is None else interval("accuracy", greedy)
        metrics |= answer_metrics(greedy, names, weights) | means([greedy.metrics])
        if args.num_eval_completions:
            params = SamplingParams(args.generation_max_length, temperature=args.eval_temperature)
            samples = answer_rows(params, num_completions=args.num_eval_completions)
            logged = means([samples.metrics]) | ({} if judge is None else {"mean": samples.accuracy})
            metrics |= {f"{name}@{args.num_eval_completions}": value for name, value in logged.items()}
            metrics |= {} if judge is None else interval(f"mean@{args.num_eval_completions}", samples)
            metrics |= {f"sampled/{name}": v for name, v in answer_metrics(samples, names, weights).items()}
    if not args.use_grpo and args.preference_loss is None:
        metrics["loss"] = completion_loss(model, rows, collator, args.per_device_eval_batch_size)
    metrics |= further(rows, samples)
    metrics["runtime"] = time.perf_counter() - started
    metrics = together.decided_by_first(lambda: metrics)  # early stopping depends on them, so all must have the same
    return {f"{prefix}_{name}": value for name, value in metrics.items()}, greedy


def functions_to_report(scorer: Scorer, rows: Sequence[Row]) -> list[int]:
    """The numbers of the reward functions that can be called for evaluation rows: these have all columns they take."""
    numbers = []
    for number, function in enumerate(scorer.functions):
        try:
            require_columns([function], rows)
        except ValueError as error:
            warn_once(logger, f"{error}. So evaluations report neither its rewards nor count them in eval_reward")
        else:
            numbers.append(number)
    return numbers


def answer_metrics(answers: Answers, names: Sequence[str], weights: torch.Tensor) -> dict[str, float]:
    """The rewards and the lengths of k answers to each of N questions.

    Args:
        names: those of the R reward functions whose values the answers have.
        weights: (R,) float64.

    Returns:
        `reward`, the mean weighted total, where functions that returned None count 0, and answers to which no function
        applied do not count; `reward_std`, the mean of the standard deviations within questions, as in training, or
        with k = 1 the standard deviation over questions; for each function `rewards/NAME/mean` and `/std`; and
        `completions/mean_length`, `min_length` and `max_length` in tokens. A number that nothing gives is missing.
    """
    metrics: dict[str, float] = {}
    if names:
        values = [[math.nan if v is None else v for v in of_one] for row in answers.rewards for of_one in row]
        rewards = torch.tensor(values, dtype=torch.float64)  # (N * k, R)
        judged = ~rewards.isnan().all(dim=1)
        totals = (rewards * weights).nansum(dim=1)
        if judged.any():
            grouped = totals.view(len(answers.rewards), -1)
            within = grouped.shape[1] > 1
            std = grouped.std(dim=1).mean() if within else totals[judged].std(correction=0)
            metrics |= {"reward": float(totals[judged].mean()), "reward_std": float(std)}
        for j, name in enumerate(names):
            known = rewards[:, j][~rewards[:, j].isnan()]
            if len(known):
                metrics |= {f"rewards/{name}/mean": float(known.mean())}
                metrics |= {f"rewards/{name}/std": float(known.std(correction=0))}
    lengths = [length for row in answers.lengths for length in row]
    metrics |= {"completions/mean_length": sum(lengths) / len(lengths)}
    return metrics | {"completions/min_length": float(min(lengths)), "completions/max_length": float(max(lengths))}


def interval(name: str, answers: Answers) -> dict[str, float]:
    """The 95% confidence interval of the share of right answers, as `interval/NAME_low` and `interval/NAME_high`."""
    shares = [sum(of_one) / len(of_one) for of_one in answers.right]
    low, high = share_interval(shares, len(answers.right[0]))
    return {f"interval/{name}_low": low, f"interval/{name}_high": high}


def evaluate_each(evaluate: Callable[..., dict[str, float]], sets: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Evaluate several data sets, one after the other, as `transformers.Trainer` does.

    Args:
        evaluate: `TunixTrainer.evaluate`.
        prefix: what the names of metrics begin with, `eval` as a rule; then comes the name of the data set.

    Returns:
        all metrics together.
    """
    metrics: dict[str, float] = {}
    for name, rows in sets.items():
        metrics |= evaluate(rows, metric_key_prefix=f"{prefix}_{name}")
    return metrics
