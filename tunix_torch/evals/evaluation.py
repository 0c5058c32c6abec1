"""Evaluates a model while it is trained: greedy and sampled answers to held-out questions, and with SFT the loss."""

import functools
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerState

from ..config.grpo import GRPOConfig
from ..data.batches import Collator
from ..data.rows import Row
from ..learn.sft import completion_loss
from ..rewarding.context import means
from ..rewarding.scoring import RewardFunc
from ..rollout.sampler import Sampler
from ..rollout.tokens import SamplingParams
from .answers import Answers, answer


def evaluate_policy(
    model: nn.Module,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    collator: Collator,
    judge: RewardFunc | None,
    args: GRPOConfig,
    state: TrainerState | None = None,
) -> tuple[dict[str, float], Answers | None]:
    """Evaluate a policy on the evaluation questions.

    Args:
        rows: rows from `prepare_rows`; with SFT they have completions.
        collator: the collator of the training batches.
        judge: the reward function that decides which answers are right; None: no question is answered.
        state: of the trainer, for a judge that takes `trainer_state`.

    Returns:
        the metrics, and the greedy answers or None. The metrics are `accuracy` (greedy pass@1), `mean_length` in
        tokens, with `num_eval_completions` = k also `mean@k`, with SFT `loss`, and what the judge logs: a number `n` of
        the greedy answers, and `n@k` of the sampled ones.

    Raises:
        ValueError: see `call_rewards`.
    """
    metrics: dict[str, float] = {}
    greedy = None
    if judge is not None:
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
            state=state,
        )
        greedy = answer_rows(SamplingParams(args.generation_max_length, temperature=0.0))
        metrics |= {"accuracy": greedy.accuracy, "mean_length": greedy.mean_length} | means([greedy.metrics])
        if args.num_eval_completions:
            params = SamplingParams(args.generation_max_length, temperature=args.eval_temperature)
            samples = answer_rows(params, num_completions=args.num_eval_completions)
            logged = means([samples.metrics]) | {"mean": samples.accuracy}
            metrics |= {f"{name}@{args.num_eval_completions}": value for name, value in logged.items()}
    if not args.use_grpo:
        metrics["loss"] = completion_loss(model, rows, collator, args.per_device_eval_batch_size)
    return metrics, greedy
