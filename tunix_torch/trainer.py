"""`TunixTrainer`: GRPO (or supervised fine-tuning) of a Hugging Face model with a LoRA, on `transformers.Trainer`.

One step is `collect(prompts) -> TrainBatch` and `update(batch) -> loss`. `transformers.Trainer` keeps its own job: the
loop, schedule, logging, callbacks, checkpoints, resume, hub. `checkpoints/adapter_trainer.py` saves and resumes.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from .batch import PromptBatch, Rollout, TrainBatch, completion_lengths
from .checkpoints.adapter_trainer import AdapterTrainer
from .config.grpo import GRPOConfig
from .config.scale import check_scale
from .config.services import check_reporting
from .data.prompts import decode_completions
from .evals.answers import Answers
from .evals.evaluation import evaluate_each, evaluate_policy
from .grpo import aggregation_weights, compute_group_advantages
from .learn.invariants import check_first_pass
from .learn.metrics import add_up, learning_metrics, rollout_metrics, sum_up, warn_of_equal_rewards
from .learn.passes import rehearse
from .learn.record import keep_step
from .learn.sft import learn_rows
from .learn.step import learn, logps_without_gradient
from .model.forward import base_model, reference_policy
from .model.loading import eos_token_ids, load_tokenizer
from .model.policy import check_trainable, make_policy
from .rewarding.questions import Questions
from .rewarding.scorer import Scorer, check_rewards
from .rewarding.scoring import RewardFunc
from .rollout.sampler import Sampler
from .rollout.tokens import SamplingParams, draw_uniforms
from .runtime import device, together
from .runtime.profiling import span


class TunixTrainer(AdapterTrainer):
    """Trains the LoRA of a causal language model.

    Args:
        model: a hub id, a folder, "tiny", or a loaded model. A folder holds a model, or an adapter that is then trained
            further. A loaded model may have a LoRA.
        reward_funcs: one function or several, `(prompts, completions, **columns) -> list[float | None]`. None means
            that the function does not apply to the row. Functions may be `async`. SFT needs none.
        args: all settings.
        train_dataset, eval_dataset: rows with a prompt or question, and with an answer where a reward function or the
            judge takes one: a list of dicts, a `datasets.Dataset`, or whatever else `data/sources.py` takes. With
            `args.max_steps`, `train_dataset` may be a stream. Of a `datasets.DatasetDict` the splits train, and test or
            validation, are taken; of any other dict each data set is evaluated.
        processing_class: the tokenizer. When `model` is a name, it defaults to that model's.
        peft_config: the LoRA for a model that has none; by default of rank 16 on all projections.
        judge: the reward function that decides at evaluation: an answer is right where its value is at least 1. The
            default is the first of `reward_funcs`.

    Raises:
        ValueError: something that the user gave can't work. The message says what would.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        judge: RewardFunc | None = None,
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
        self.scorer = Scorer(reward_funcs, args.reward_weights, args.reward_timeout)
        check_rewards(judge, "judge")
        self.judge = judge or next(iter(self.scorer.functions), None)
        facts = {"training, evaluation rows": self.questions.sizes}
        policy = make_policy(model, processing_class, peft_config, args, facts)
        self.sampling = SamplingParams(
            args.generation_max_length, args.generation_temperature, args.generation_top_k, args.generation_top_p
        )
        eos_ids, pad_id = eos_token_ids(policy.model, processing_class), processing_class.pad_token_id
        self.sampler = Sampler(policy.model, eos_ids, pad_id, args.stop_check_interval, compile_ahead=True)
        num_embeddings = base_model(policy.model).get_input_embeddings().weight.shape[0]
        self.questions.prepare(processing_class, num_embeddings, self.scorer.functions, self.judge)
        args.eval_on_start = args.eval_on_start and eval_dataset is not None
        super().__init__(policy, args, callbacks, processing_class=processing_class, **self.questions.for_trainer())
        self.first_answers: Answers | None = None  # the greedy answers at the first evaluation
        self.last_answers: Answers | None = None  # and at the newest one
        self._rewards = torch.empty(0, len(self.scorer.functions))  # (B, R) of the batch that is learned from
        self._rows_drawn = (-1, 0)  # (optimizer step, rows drawn in it so far)
        self._rehearsed = False
        # Accumulated batches that are sampled and not yet learned from, with their rewards (B, R).
        self._waiting: list[tuple[TrainBatch, Tensor]] = []
        # For each batch of the optimizer step, the numbers of its first pass and of its last one.
        self._learned: list[tuple[dict[str, float], dict[str, float]]] = []
        self.validate_grpo_setup()

    def validate_grpo_setup(self) -> None:
        """Check what must hold before training.

        Raises:
            ValueError: no reward function, weights that don't match them, or fewer rows than one step needs.
        """
        names = self.questions.evaluation_names
        self.args.check_best_metric(self.judge is not None, self.scorer.names, names)
        self.scorer.check(needed=self.args.use_grpo)
        check_scale(self.args, self.questions.sizes[0])
        check_trainable(self.model)

    @property
    def reward_funcs(self) -> list[RewardFunc]:
        """The reward functions, under the name that TRL's trainer has for them."""
        return self.scorer.functions

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `transformers.Trainer.train`. The workers that call reward functions live as long as it runs."""
        with self.scorer.in_workers(self.args.reward_processes if self.args.use_grpo else 0):
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
            self._waiting, self._learned = [], []
        if not self.args.use_grpo:
            loss, metrics = learn_rows(self.model, inputs, batches, self.args, self.backward, self.sum_gradients)
            self.add_metrics(metrics)
            return loss
        if len(batches) > 1 and inputs is batches[0]:
            self._waiting = self._collect_together(batches)
        return self.grpo_training_step(PromptBatch(**inputs).to(self.args.device))

    def _collect_together(self, inputs: list[dict[str, Any]]) -> list[tuple[TrainBatch, Tensor]]:
        """Collect all batches that one optimizer step accumulates, each with its rewards (B, R). The weights of their
        tokens are computed over all of them, as if they were one batch."""
        batches = [(self.collect(PromptBatch(**columns).to(self.args.device)), self._rewards) for columns in inputs]
        weights = self._token_weights([batch.completion_mask.cpu() for batch, _ in batches])
        return [(replace(b, token_weights=w), rewards) for (b, rewards), w in zip(batches, weights, strict=True)]

    def grpo_training_step(self, prompts: PromptBatch) -> Tensor:
        """Sample, score and learn. Returns the loss, detached. Accumulated batches were sampled already."""
        if self._waiting:
            batch, self._rewards = self._waiting.pop(0)
        else:
            batch = self.collect(prompts)
        if not self._rehearsed:  # so that every shape of a learning pass is compiled before the first one
            self._rehearsed = True
            rehearse(batch, self.args, self._forward_backward, self.model.zero_grad)
        with span("learning"):
            return self.update(batch)

    def _forward_backward(self, batch: TrainBatch) -> None:
        """Compute everything that learning from a batch computes, without an optimizer step."""
        self._add_logps(batch)
        self.learning_pass(batch)

    def collect(self, prompts: PromptBatch) -> TrainBatch:
        """Sample a group of completions for each of N prompts, score them, and compute what else the loss needs."""
        device.sync()  # so that work which the Trainer left pending does not become part of the rollout
        started = time.perf_counter()
        with span("rollout"):
            rollout = self.sample_completions_for_prompts(prompts)
            ids, mask = rollout.completion_ids.cpu(), rollout.completion_mask.cpu()  # here Python waits for the device
        seconds = time.perf_counter() - started
        batch = self._begin_train_batch(prompts, rollout)  # an accelerator works on this while rewards are computed
        with span("scoring"):
            texts = decode_completions(self.processing_class, ids, mask, self.sampler.eos_token_ids)
            rewards = together.decided_by_first(lambda: self.compute_rewards_for_completions(prompts, texts).tolist())
            self._rewards = torch.tensor(rewards, dtype=torch.float64)  # (B, R)
        totals = self.scorer.totals(self._rewards, texts)  # (B,)
        names, group_size = self.scorer.names, self.args.num_completions_per_prompt
        ids, mask, rewards, all_totals = map(together.gather_rows, (ids, mask, self._rewards, totals))
        metrics = rollout_metrics(ids, mask, rewards, all_totals, names, group_size, self.sampler.eos_token_ids)
        self.add_metrics(metrics | {"rollout_tokens_per_second": int(mask.sum()) / seconds})
        if together.is_first():
            warn_of_equal_rewards(metrics, self.state.global_step + 1, texts[0])
        return self._with_rewards(batch, totals)

    def make_train_batch(self, prompts: PromptBatch, rollout: Rollout, rewards: Tensor) -> TrainBatch:
        """Everything that the loss needs, from a rollout of N prompts and its total rewards, (B,) on the CPU."""
        return self._with_rewards(self._begin_train_batch(prompts, rollout), rewards)

    def _begin_train_batch(self, prompts: PromptBatch, rollout: Rollout) -> TrainBatch:
        """Everything that the loss needs, except that the advantages are 0 until there are rewards."""
        mask = rollout.completion_mask.cpu()
        # Columns in which all rows are padding are left out where a new shape compiles nothing.
        width = mask.shape[1] if device.static_shapes() else max(1, int(mask.any(dim=0).sum()))
        batch = TrainBatch(
            prompt_ids=prompts.prompt_ids,
            prompt_mask=prompts.prompt_mask,
            completion_ids=rollout.completion_ids[:, :width],
            completion_mask=rollout.completion_mask[:, :width],
            advantages=torch.zeros(len(mask), device=self.args.device),
            token_weights=self._token_weights([mask])[0][:, :width],
            lengths=completion_lengths(mask),
            sampler_logps=rollout.sampler_logps[:, :width],
        )
        self._add_logps(batch)
        return batch

    def _token_weights(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """The weight of each token in the loss, relative to all tokens that an optimizer step learns from. For the mask
        of each batch, (B, C) bool on the CPU, this returns weights (B, C) float32 on the device."""
        counts = {"num_tokens": sum(int(m.sum()) for m in masks), "num_rows": sum(int(m.any(1).sum()) for m in masks)}
        mode, longest, counts = self.args.aggregation, self.args.generation_max_length, together.sum_numbers(counts)
        return [aggregation_weights(mask, mode, longest, **counts).to(self.args.device) for mask in masks]

    def _add_logps(self, batch: TrainBatch) -> None:
        """Add the log-probabilities of the reference, and of the policy before it learns, where the loss needs them."""
        self.begin_run_if_needed()
        if self.args.beta > 0:
            with span("reference"), reference_policy(self.model, self.reference):
                batch.ref_per_token_logps = logps_without_gradient(self.model, batch, self.args)
        if self.args.num_iterations > 1:
            with span("old policy"):
                batch.old_per_token_logps = logps_without_gradient(self.model, batch, self.args)

    def _with_rewards(self, batch: TrainBatch, rewards: Tensor) -> TrainBatch:
        advantages = self.compute_group_advantages(rewards).to(self.args.device)
        return replace(batch, advantages=advantages, rewards=rewards)

    def update(self, batch: TrainBatch) -> Tensor:
        """Learn from a batch in `num_iterations` passes, each in micro-batches.

        The gradient of the last pass is left for `transformers.Trainer`, which clips it and steps the optimizer.
        Between passes the optimizer steps here.

        Returns:
            the loss of the last pass, detached, over the rows of everyone who takes part. Where batches are
            accumulated, it is this batch's share of their loss.
        """
        self.begin_run_if_needed()
        args, step, started = self.args, self.state.global_step + 1, time.perf_counter()
        for iteration in range(args.num_iterations):
            if iteration > 0:
                self.optimizer_step()
            parts = self.learning_pass(batch)
            if iteration == 0:
                first_pass = parts
                if step <= args.save_batches:
                    keep_step(self.model, batch, parts, step, self.optimizer.param_groups[0]["lr"], args)
        first, last = (together.sum_numbers(sum_up(p)) for p in (first_pass, parts))  # here Python waits again
        check_first_pass(
            first_pass,
            first,
            self.policy,
            step,
            describe_row=lambda row: self.scorer.describe(self._rewards, row, args.num_completions_per_prompt),
            at_reference=self.starts_at_reference and step == 1,
            dropout=self.has_dropout,
        )
        seconds = time.perf_counter() - started
        self.add_metrics({"learning_tokens_per_second": last["tokens"] * args.num_iterations / seconds})
        self._learned.append((first, last))
        if self.accelerator.sync_gradients:  # the last batch of the optimizer step
            firsts, lasts = zip(*self._learned, strict=True)
            self.add_metrics(learning_metrics(add_up(firsts), add_up(lasts), args.beta > 0))
            self._learned = []
        loss = device.scalar(last["loss"])
        device.sync()
        return loss

    def learning_pass(self, batch: TrainBatch) -> list[dict[str, Tensor]]:
        """Forward and backward of every micro-batch. The gradients add up in the parameters. See `learn`."""
        parts = learn(self.model, batch, self.args, self.backward)
        self.sum_gradients()
        return parts

    # ---- its parts ----

    def sample_completions_for_prompts(self, prompts: PromptBatch) -> Rollout:
        """Sample `num_completions_per_prompt` completions for each prompt: a `Rollout` of B = N * G rows.

        The random numbers of a row depend on the seed, the step and the row's number within the step only.
        """
        group_size = self.args.num_completions_per_prompt
        num_rows = prompts.prompt_ids.shape[0] * group_size
        first_own, total = together.own_share(num_rows)
        step, drawn = self._rows_drawn
        first = drawn if step == self.state.global_step else 0
        self._rows_drawn = (self.state.global_step, first + total)
        seed = (self.args.seed, 1 + self.state.global_step)  # 0 belongs to evaluation
        row_numbers = range(first + first_own, first + first_own + num_rows)
        uniforms = draw_uniforms(seed, row_numbers, self.sampling.max_new_tokens)
        rollout = self.sampler.sample(prompts.prompt_ids, prompts.prompt_mask, group_size, self.sampling, uniforms)
        assert rollout.completion_ids.shape == (num_rows, self.sampling.max_new_tokens), "wrong number of completions"
        return rollout

    def compute_rewards_for_completions(self, prompts: PromptBatch, completions: Sequence[str]) -> Tensor:
        """Every reward function's value for each of B completions: (B, R) float64, NaN for None."""
        return self.scorer.score(prompts.rows, completions)

    def compute_group_advantages(self, rewards: Tensor) -> Tensor:
        """(B,) total rewards -> (B,) float32 advantages, which are checked to be centred in each group."""
        args, group_size = self.args, self.args.num_completions_per_prompt
        advantages = compute_group_advantages(
            rewards, group_size, args.algorithm, args.normalize_advantages, args.advantage_epsilon
        )
        assert advantages.shape == rewards.shape, f"advantages {advantages.shape} for rewards {rewards.shape}"
        grouped = advantages.view(-1, group_size)
        off = grouped.mean(dim=1).abs() > 1e-5 * (1 + grouped.abs().amax(dim=1))
        row = int(off.int().argmax()) * group_size
        assert not off.any(), f"advantages are not centred: {self.scorer.describe(self._rewards, row, group_size)}"
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
        of_run = self.questions.collator, self.judge, self.args, self.scorer, metric_key_prefix
        metrics, self.last_answers = evaluate_policy(self.model, self.sampler, self.processing_class, rows, *of_run)
        self.first_answers = self.first_answers or self.last_answers
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
