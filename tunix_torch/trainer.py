"""`TunixTrainer`: GRPO (or supervised fine-tuning) of a Hugging Face model, on `transformers.Trainer`.

One step is `collect(prompts) -> TrainBatch` and `update(batch) -> loss`. `transformers.Trainer` keeps its own job: the
loop, schedule, logging, callbacks, checkpoints, resume, hub. `checkpoints/adapter_trainer.py` saves and resumes.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from .batch import PromptBatch, Rollout, TrainBatch, completion_lengths
from .checkpoints.adapter_trainer import AdapterTrainer
from .config.best_metric import check_best_metric
from .config.grpo import GRPOConfig
from .config.scale import check_scale
from .config.services import check_reporting
from .data.prompts import decode_completions, token_lists
from .evals.answers import Answers
from .evals.evaluation import evaluate_each, evaluate_policy
from .learn.invariants import check_first_pass
from .learn.metrics import add_up, learning_metrics, look_at, sum_up
from .learn.passes import columns_in_use, rehearse
from .learn.record import keep_step
from .learn.step import learn, logps_without_gradient
from .learn.weights import learned_tokens, step_weights, without_dropped
from .model.forward import reference_policy
from .model.loading import eos_token_ids, load_tokenizer
from .model.policy import make_policy
from .model.teacher import load_teacher
from .rewarding.advantages import overlong_penalties, step_advantages
from .rewarding.dynamic import replace_equal_groups
from .rewarding.questions import Questions
from .rewarding.scored import ScoredRollout
from .rewarding.scorer import Rewards, Scorer, Tokenizers
from .rewarding.scoring import RewardFunc
from .rewarding.sharing import collect_together
from .rollout.sampler import Sampler
from .rollout.tokens import RowNumbers, SamplingParams, draw_uniforms
from .runtime import device, together
from .runtime.profiling import span


class TunixTrainer(AdapterTrainer):
    """Trains the LoRA of a causal language model, or all of its weights.

    Args:
        model: a hub id, a folder, "tiny", or a loaded model. A folder holds a model, or an adapter that is then trained
            further. A loaded model may have a LoRA.
        reward_funcs: one or several, `(prompts, completions, **columns) -> list[float | None]`, plain or `async`, where
            None means that it does not apply to the row; or reward models, see docs/rewards.md. SFT, pairs and a
            teacher need none.
        args: all settings.
        train_dataset, eval_dataset: rows with a prompt or question, and with an answer where a reward function or the
            judge takes one: a list of dicts, a `datasets.Dataset`, or whatever else `data/sources.py` takes. With
            `args.max_steps`, `train_dataset` may be a stream. Of a `datasets.DatasetDict` the splits train, and test or
            validation, are taken; of any other dict each data set is evaluated.
        processing_class, reward_processing_classes: tokenizers, of the model and of reward models; else their own.
        peft_config: the LoRA for a model that has none; by default of rank 16 on all projections.
        judge: the reward function that decides at evaluation: an answer is right where its value is at least 1. The
            default is the first of `reward_funcs` that is no reward model. False: rewards are reported only.
        full: train all weights of the model in float32, without a LoRA.

    Raises:
        ValueError: something that the user gave can't work. The message says what would.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        reward_funcs: Rewards | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        judge: RewardFunc | Literal[False] | None = None,
        reward_processing_classes: Tokenizers | None = None,
        full: bool = False,
    ) -> None:
        args = args or GRPOConfig()
        if not isinstance(args, GRPOConfig):
            raise ValueError(f"args: expected a GRPOConfig, which takes the same fields, got a {type(args).__name__}")
        check_reporting(args.report_to)
        self.questions = Questions(train_dataset, eval_dataset, args)
        if processing_class is None:
            if not isinstance(model, str | Path):
                raise ValueError("processing_class=None: give the tokenizer of a model that is already loaded")
            processing_class = load_tokenizer(str(model))
        self.scorer = Scorer.of(reward_funcs, reward_processing_classes, args)
        self.judge = self.scorer.judge(judge)
        facts = {"training, evaluation rows": self.questions.sizes}
        policy = make_policy(model, processing_class, peft_config, args, facts, full)
        self.teacher = load_teacher(args.teacher, policy.model, processing_class)
        self.sampling = SamplingParams.of_rollouts(args)
        eos_ids, pad_id = eos_token_ids(policy.model, processing_class), processing_class.pad_token_id
        self.sampler = Sampler(policy.model, eos_ids, pad_id, args.stop_check_interval, compile_ahead=True)
        self.questions.prepare(processing_class, policy.num_embeddings, self.scorer.functions, self.judge)
        args.eval_on_start = args.eval_on_start and eval_dataset is not None
        super().__init__(policy, args, callbacks, processing_class=processing_class, **self.questions.for_trainer())
        self.facts.reward_funcs = self.scorer.names
        self.first_answers: Answers | None = None  # the greedy answers at the first evaluation
        self.last_answers: Answers | None = None  # and at the newest one
        self._rewards = torch.empty(0, len(self.scorer.functions))  # (B, R) of the batch that is learned from
        self._row_numbers = RowNumbers()
        self._rehearsed = False
        # For each batch of the optimizer step, the numbers of its first pass and of its last one.
        self._learned: list[tuple[dict[str, float], dict[str, float]]] = []
        self.validate_grpo_setup()

    def validate_grpo_setup(self) -> None:
        """Check what must hold before training.

        Raises:
            ValueError: no reward function, weights that don't match them, or fewer rows than one step needs.
        """
        check_best_metric(self.args, self.judge is not None, self.scorer.names, self.questions.evaluation_names)
        self.scorer.check(needed=self.args.use_grpo and self.args.teacher is None)
        check_scale(self.args, self.questions.sizes[0])

    @property
    def reward_funcs(self) -> list[RewardFunc]:
        """The reward functions, under the name that TRL's trainer has for them."""
        return self.scorer.functions

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `transformers.Trainer.train`. The workers that call reward functions live as long as it runs."""
        workers, self._row_numbers = self.args.reward_processes if self.args.use_grpo else 0, RowNumbers()
        with self.scorer.in_workers(workers), self.saving_when_rewards_fail():
            return super().train(*args, **kwargs)

    # ---- one step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one rollout batch, or with SFT of one batch of rows. Returns the batch's share of the
        loss of the optimizer step, detached."""
        together.check_same(lambda: {"prompts of this step": together.digest([inputs["prompt_ids"]])})
        self.put_optimizer("train")
        batches = self.batches_with(inputs)
        if inputs is batches[0]:  # an optimizer step begins, and forgets what an interrupted one has left
            self._learned = []
        if not self.args.use_grpo:
            return self.learn_given_rows(inputs)
        if inputs is batches[0] and not self._waiting and len(batches) * self.args.steps_per_generation > 1:
            steps, how = self.rollout_with(batches), (self._advantages, self.args, self.sampler.pad_token_id)
            self._waiting = collect_together(steps, lambda prompts: (self.collect(prompts), self._rewards), *how)
        return self.counted(self.grpo_training_step(PromptBatch(**inputs).to(self.args.device)))

    def _advantages(self, rewards: Tensor, totals: Tensor) -> Tensor:
        """The advantages of rows that have these rewards, (B, R), and totals, (B,): (B,) on the device."""
        self._rewards = rewards
        return device.upload(self.compute_group_advantages(totals), self.args.device)

    def grpo_training_step(self, prompts: PromptBatch) -> Tensor:
        """Sample, score and learn. Returns the loss, detached. Accumulated batches were sampled already."""
        passes = [self._waiting.pop(0) for _ in range(self.args.num_iterations)] if self._waiting else []
        batch, self._rewards = passes[0] if passes else (self.collect(prompts), self._rewards)
        if not self._rehearsed:  # so that every shape of a learning pass is compiled before the first one
            self._rehearsed = True
            rehearse(batch, self.args, self._forward_backward, self.model.zero_grad)
        with span("learning"):
            return self.update(batch, *(later for later, _ in passes[1:]))

    def _forward_backward(self, batch: TrainBatch) -> None:
        """Compute everything that learning from a batch computes, without an optimizer step."""
        self._add_logps(batch)
        self.learning_pass(batch)

    def collect(self, prompts: PromptBatch) -> TrainBatch:
        """Sample a group of completions for each of N prompts, score them, and compute what else the loss needs."""
        scored, batch = self._sample_and_score(prompts)
        if batch is None:  # with dynamic sampling
            draw, tokens = partial(self.questions.draw, row_numbers=self._row_numbers), self.sampler
            how = self.args, tokens.pad_token_id, tokens.eos_token_ids
            scored = replace_equal_groups(scored, draw, self._sample_and_score, *how)
            batch = self._begin_train_batch(scored.prompts, scored.rollout, scored.ids, scored.mask)
        self._rewards, metrics = scored.rewards, scored.metrics(self.scorer.names, self.sampler.eos_token_ids)
        self.note_rollout(scored, metrics)
        return self._with_rewards(batch, scored.totals)

    def _sample_and_score(self, prompts: PromptBatch) -> tuple[ScoredRollout, TrainBatch | None]:
        """A rollout of N prompts with its rewards, and what can be computed for learning from it without them. That is
        None with dynamic sampling, which decides by the rewards what is learned from."""
        device.sync()  # so that work which the Trainer left pending does not become part of the rollout
        started = time.perf_counter()
        with span("rollout"):
            rollout = self.sample_completions_for_prompts(prompts)
            ids, mask = rollout.in_main_memory()  # here Python waits for the device
        seconds = time.perf_counter() - started
        # An accelerator works on this while rewards are computed.
        batch = None if self.args.dynamic_sampling else self._begin_train_batch(prompts, rollout, ids, mask)
        with span("scoring"):
            texts = decode_completions(self.processing_class, ids, mask, self.sampler.eos_token_ids)
            rewards = self.compute_rewards_for_completions(prompts, texts, token_lists(ids, mask))  # (B, R)
        totals = self.scorer.totals(rewards, texts) - overlong_penalties(mask.sum(1), self.args)  # (B,)
        return ScoredRollout(prompts, rollout, ids, mask, texts, rewards, totals, seconds, self.scorer.metrics), batch

    def make_train_batch(self, prompts: PromptBatch, rollout: Rollout, rewards: Tensor) -> TrainBatch:
        """Everything that the loss needs, from a rollout of N prompts and its total rewards, (B,) on the CPU."""
        return self._with_rewards(self._begin_train_batch(prompts, rollout, *rollout.in_main_memory()), rewards)

    def _begin_train_batch(self, prompts: PromptBatch, rollout: Rollout, ids: Tensor, mask: Tensor) -> TrainBatch:
        """Everything that the loss needs, but for advantages. `ids` and `mask` are the rollout's, in main memory."""
        learned = learned_tokens(ids, mask, self.sampler.eos_token_ids, self.args)
        width = columns_in_use(mask, self.args)
        batch = TrainBatch(
            prompt_ids=prompts.prompt_ids,
            prompt_mask=prompts.prompt_mask,
            completion_ids=rollout.completion_ids[:, :width],
            completion_mask=rollout.completion_mask[:, :width],
            advantages=torch.zeros(len(mask), device=self.args.device),
            **step_weights([mask[:, :width]], [learned[:, :width]], self.args)[0],
            lengths=completion_lengths(mask),
            sampler_logps=rollout.sampler_logps[:, :width],
        )
        self._add_logps(batch)
        return batch

    def _add_logps(self, batch: TrainBatch) -> None:
        """Add the log-probabilities of the reference, and of the policy before it learns, where the loss needs them."""
        self.begin_run_if_needed()
        if self.args.beta > 0:
            with span("reference"), reference_policy(self.model, self.reference):
                batch.ref_per_token_logps = logps_without_gradient(self.model, batch, self.args)
        if self.args.num_iterations * self.args.steps_per_generation > 1:
            with span("old policy"):
                batch.old_per_token_logps = logps_without_gradient(self.model, batch, self.args)

    def _with_rewards(self, batch: TrainBatch, rewards: Tensor) -> TrainBatch:
        advantages = device.upload(self.compute_group_advantages(rewards), self.args.device)
        return replace(without_dropped(batch, rewards, self.args), advantages=advantages, rewards=rewards)

    def update(self, batch: TrainBatch, *later: TrainBatch) -> Tensor:
        """Learn from a batch in `num_iterations` passes, each in micro-batches. Passes after the first are over the
        later batches, if there are any.

        The gradient of the last pass is left for `transformers.Trainer`, which clips it and steps the optimizer.
        Between passes the optimizer steps here.

        Returns:
            the loss of the last pass, detached, over the rows of everyone who takes part. Where batches are
            accumulated, it is this batch's share of their loss.
        """
        self.begin_run_if_needed()
        args, step, started = self.args, self.state.global_step + 1, time.perf_counter()
        for iteration, part in enumerate([batch, *(later or [batch] * (args.num_iterations - 1))]):
            if iteration > 0:
                self.optimizer_step()
            parts = self.learning_pass(part)
            self.guard.learned(part, sum(numbers["loss"] for numbers in parts))
            self.entropy.learned(parts, step_ends=self.accelerator.sync_gradients)
            if iteration == 0:
                first_pass = parts
                if step <= args.save_batches:
                    keep_step(self.model, batch, parts, step, self.optimizer.param_groups[0]["lr"], args)
        own, rows = look_at(first_pass)  # here Python waits again
        first, last = (together.sum_numbers(n) for n in (own, own if parts is first_pass else sum_up(parts)))
        check_first_pass(
            rows,
            first,
            self.policy,
            step,
            describe_row=lambda row: self.scorer.describe(self._rewards, row, args.num_completions_per_prompt),
            at_reference=self.starts_at_reference and step == 1,
            # A policy that has learned since it sampled differs from its earlier self, as it does with dropout.
            dropout=self.has_dropout or (args.steps_per_generation > 1 and self._row_numbers.step != step - 1),
        )
        seconds = time.perf_counter() - started
        self.add_metrics({"learning_tokens_per_second": last["tokens"] * args.num_iterations / seconds})
        self._learned.append((first, last))
        if self.accelerator.sync_gradients:  # the last batch of the optimizer step
            firsts, lasts = zip(*self._learned, strict=True)
            self.add_metrics(learning_metrics(add_up(firsts), add_up(lasts), args.beta))
            self._learned = []
        loss = device.scalar(last["loss"])
        device.sync()
        return loss

    def learning_pass(self, batch: TrainBatch) -> list[dict[str, Tensor]]:
        """Forward and backward of every micro-batch. The gradients add up in the parameters. See `learn`."""
        parts = learn(self.model, self.entropy.weighted(batch), self.args, self.backward, self.teacher)
        self.sum_gradients()
        return parts

    # ---- its parts ----

    def sample_completions_for_prompts(self, prompts: PromptBatch) -> Rollout:
        """Sample `num_completions_per_prompt` completions for each prompt: a `Rollout` of B = N * G rows.

        The random numbers of a row depend on the seed, the step and the row's number within the step only.
        """
        group_size = self.args.num_completions_per_prompt
        num_rows = prompts.prompt_ids.shape[0] * group_size
        seed = (self.args.seed, 1 + self.state.global_step)  # 0 belongs to evaluation
        row_numbers = self._row_numbers.take(self.state.global_step, num_rows, self.args.rows_per_step)
        uniforms = draw_uniforms(seed, row_numbers, self.sampling.max_new_tokens)
        rollout = self.sampler.sample(prompts.prompt_ids, prompts.prompt_mask, group_size, self.sampling, uniforms)
        assert rollout.completion_ids.shape == (num_rows, self.sampling.max_new_tokens), "wrong number of completions"
        return rollout

    def compute_rewards_for_completions(
        self, prompts: PromptBatch, completions: Sequence[str], ids: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Every reward function's value for each of B completions, whose tokens are `ids`: (B, R), NaN for None."""
        return self.scorer.score(prompts.rows, completions, ids, self.state)

    def compute_group_advantages(self, rewards: Tensor) -> Tensor:
        """(B,) total rewards -> (B,) float32 advantages, which are checked to be centred in each group."""
        args, group_size = self.args, self.args.num_completions_per_prompt
        advantages = step_advantages(self._rewards, rewards, self.scorer.weights, args)
        assert advantages.shape == rewards.shape, f"advantages {advantages.shape} for rewards {rewards.shape}"
        grouped = advantages.view(-1, group_size)
        off = grouped.mean(dim=1).abs() > 1e-5 * (1 + grouped.abs().amax(dim=1))
        row = int(off.int().argmax()) * group_size
        assert not off.any(), f"advantages are not centred: {self.scorer.describe(self._rewards, row, group_size)}"
        self.step_rows.weighed(advantages)
        return advantages

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the evaluation questions greedily, and with `num_eval_completions` = k also by k samples each.

        Returns and logs what `evaluate_policy` gives, under names that begin with `eval_`: `eval_accuracy` (greedy
        pass@1), `eval_reward`, with SFT `eval_loss`. Of several data sets each is evaluated, see `evaluate_each`.
        """
        device.sync()  # so that work which the Trainer left pending does not become part of it
        self.put_optimizer("eval")
        rows = self.questions.to_evaluate(self.eval_dataset if eval_dataset is None else eval_dataset)
        if isinstance(rows, dict):
            return evaluate_each(self.evaluate, rows, metric_key_prefix)
        of_run = self.questions.collator, self.judge, self.args, self.scorer, self.further_metrics
        metrics, self.last_answers = evaluate_policy(
            self.model, self.sampler, self.processing_class, rows, *of_run, metric_key_prefix, self.state
        )
        self.first_answers = self.first_answers or self.last_answers
        return self.evaluated(metrics, rows, self.last_answers)
