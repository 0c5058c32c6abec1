"""`TunixTrainer`: GRPO (or supervised fine-tuning) of a Hugging Face model with a LoRA, on `transformers.Trainer`.

One step is `collect(prompts) -> TrainBatch` and `update(batch) -> loss`. `transformers.Trainer` keeps its own job: the
loop, schedule, logging, callbacks, checkpoints, resume, hub.
"""

import functools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import TrainOutput

from .batch import PromptBatch, Rollout, TrainBatch, completion_lengths
from .checkpoints.files import STATE_FILE, check_same_scale, fingerprint, is_finished
from .checkpoints.resuming import EarlyStoppingCallback, OwnIntervals
from .config.grpo import GRPOConfig
from .config.model import ModelConfig
from .config.saved import settings_of
from .config.services import blamed_on, check_reporting
from .config.settings import require
from .data.prompts import Collator, PromptStream, decode_completions, prepare_rows
from .data.sources import evaluation_rows, training_rows
from .evals.answers import Answers, answer
from .grpo import aggregation_weights, compute_group_advantages
from .learn.finite import check_finite, check_gradient_norm
from .learn.metrics import add_up, broken_invariant, learning_metrics, rollout_metrics, sum_up
from .learn.passes import rehearsals
from .learn.record import FOLDER, record_step
from .learn.sft import completion_loss, learn_completions, sft_batch
from .learn.step import learn, logps_without_gradient
from .model.adapter import (
    REFERENCE_FILE,
    adapter_weights,
    changes_nothing,
    choose_adapter,
    embedding_weights,
    has_new_embeddings,
    load_reference,
    make_trainable,
    save_adapter,
    save_reference,
)
from .model.checks import check_head, check_peft_config, check_reference, check_tokenizer, has_dropout
from .model.forward import base_model, checkpoint_layers, reference_policy
from .model.loading import add_lora, eos_token_ids, load_model, load_tokenizer, lora_config, place
from .rewarding.checks import check_rewards
from .rewarding.columns import check_columns
from .rewarding.scoring import RewardFunc, is_async, names_of, score_completions
from .rewarding.workers import RewardWorkers
from .rollout.sampler import Sampler, SamplingParams, draw_uniforms
from .runtime import device, mesh, processes
from .runtime.profiling import ProfileStep, span

logger = logging.getLogger(__name__)


class _EndGraphWithOptimizer(TrainerCallback):
    """Cuts XLA's graph after the optimizer step, so that it is the same one whatever follows."""

    def on_optimizer_step(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        device.sync()


class TunixTrainer(Trainer):
    """Trains the LoRA of a causal language model.

    Args:
        model: a hub id, a folder (of a model or of an adapter, which is then trained further), "tiny", or a loaded
            model, with or without a LoRA.
        reward_funcs: one function or several, `(prompts, completions, **columns) -> list[float | None]`; None: does
            not apply to this row. They may be `async`. Needed unless `args.use_grpo` is False.
        args: settings.
        train_dataset, eval_dataset: rows with a prompt or question, and an answer where a reward function or the judge
            takes one: a list of dicts, a `datasets.Dataset`, or what else `training_rows` takes; for training also a
            `datasets.IterableDataset`, with `args.max_steps`. Of a `datasets.DatasetDict` the split train, and test or
            validation.
        processing_class: the tokenizer; by default the model's own, when `model` is a name.
        peft_config: of the LoRA put on a model that has none; default: rank 16 on all projections.
        judge: the reward function that decides at evaluation: an answer is right where its value is at least 1. By
            default the first of `reward_funcs`.

    Raises:
        ValueError: something the user gave can't work; the message says what would.
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
        train_dataset = None if train_dataset is None else training_rows(train_dataset)
        eval_dataset = None if eval_dataset is None else evaluation_rows(eval_dataset)
        if processing_class is None:
            if not isinstance(model, str | Path):
                raise ValueError("processing_class=None: give the tokenizer of a model that is already loaded")
            processing_class = load_tokenizer(str(model))
        check_rewards(reward_funcs)
        check_rewards(judge, "judge")
        if isinstance(model, str | Path):
            model = load_model(str(model))
        check_tokenizer(processing_class, model)
        set_seed(args.seed)  # before the LoRA draws its first weights
        if not isinstance(model, PeftModel):
            check_peft_config(peft_config)  # before it changes the model
            model = add_lora(model, peft_config or lora_config(ModelConfig()))
        elif peft_config is not None:
            raise ValueError("peft_config: the model has a LoRA already; leave peft_config out, or give the base model")
        self._adapter = choose_adapter(model)
        check_peft_config(model.peft_config[self._adapter])
        make_trainable(adapter_weights(model, self._adapter))
        if base_model(model).is_gradient_checkpointing:  # switched on by the user, or by an earlier trainer
            args.gradient_checkpointing = True
        self._new_embeddings = processes.of_first(lambda: has_new_embeddings(model))  # while it is not on the device
        processes.check_same(lambda: _facts(model, args, train_dataset, eval_dataset))
        place(model)
        if args.gradient_checkpointing:
            checkpoint_layers(model, args.gradient_checkpointing_kwargs)
        processes.keep_frozen_out_of_ddp(model)

        check_head(model)
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs or [])
        self.reward_names = names_of(self.reward_funcs)
        self.judge = judge or next(iter(self.reward_funcs), None)
        self.reward_weights = torch.tensor(args.reward_weights or [1.0] * len(self.reward_funcs), dtype=torch.float64)
        self.sampling = SamplingParams(
            args.generation_max_length, args.generation_temperature, args.generation_top_k, args.generation_top_p
        )
        self.sampler = Sampler(
            model,
            eos_token_ids(model, processing_class),
            processing_class.pad_token_id,
            args.stop_check_interval,
            compile_ahead=True,
        )
        completion_width = None if args.use_grpo else args.generation_max_length
        if eval_dataset is None:
            args.eval_on_start = False

        self._prepare = functools.partial(
            prepare_rows,
            tokenizer=processing_class,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=completion_width,
            system_message=args.system_message,
            overlong=args.overlong_prompts,
            num_embeddings=base_model(model).get_input_embeddings().weight.shape[0],
        )
        if isinstance(train_dataset, IterableDataset):
            require(args.max_steps > 0, "max_steps", args.max_steps, "streamed rows have no end: set it above 0")
            workers = args.dataloader_num_workers
            require(workers == 0, "dataloader_num_workers", workers, "each would read the whole stream: set it to 0")
        train_rows = None if train_dataset is None else self._prepare(train_dataset)
        eval_rows = None if eval_dataset is None else list(self._prepare(eval_dataset))
        if args.use_grpo and train_rows is not None:
            check_columns(self.reward_funcs, train_rows)
        if self.judge is not None and eval_rows is not None:
            check_columns([self.judge], eval_rows, "judge")
        patience = args.early_stopping_patience
        early_stopping = [] if patience is None else [EarlyStoppingCallback(patience)]
        profiling = [] if args.profile_step is None else [ProfileStep(args.profile_step)]
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(processing_class.pad_token_id, args.max_prompt_length, completion_width),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            callbacks=[OwnIntervals(), *(callbacks or []), *early_stopping, *profiling, _EndGraphWithOptimizer()],
        )
        self.first_answers: Answers | None = None  # greedy answers of this process's first evaluation
        self.last_answers: Answers | None = None  # and of its newest
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._rewards = torch.empty(0, len(self.reward_funcs))  # (B, R) of the newest rollout
        self._reward_workers: RewardWorkers | None = None  # while it trains
        self._rows_drawn = (-1, 0)  # (optimizer step, rows drawn in it so far)
        self._rehearsed = False
        self._step_inputs: list[dict[str, Any]] = []  # the batches of rows that an optimizer step learns from
        # of these, what has been sampled and not learned from yet, with the rewards (B, R)
        self._waiting: list[tuple[TrainBatch, Tensor]] = []
        self._learned: list[tuple[dict[str, float], dict[str, float]]] = []  # and the numbers of the others
        self.validate_grpo_setup()
        self._begin_run()
        self._given_reference = self._reference

    # ---- what is checked before the first step ----

    def validate_grpo_setup(self) -> None:
        """Check what must hold before training.

        Raises:
            ValueError: no reward function, weights that don't match them, or fewer rows than one step needs.
        """
        args = self.args
        args.check_best_metric(judged=self.judge is not None)
        if args.use_grpo and not self.reward_funcs:
            raise ValueError("reward_funcs: GRPO needs at least one reward function")
        if len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights={args.reward_weights}: {len(self.reward_funcs)} reward functions need as many weights"
            )
        rows = None if isinstance(self.train_dataset, PromptStream) else self.train_dataset
        if rows is not None and len(rows) < args.per_device_train_batch_size * processes.count():
            raise ValueError(
                f"per_device_train_batch_size={args.per_device_train_batch_size}: "
                f"there are only {len(rows)} training rows for {processes.count()} process(es)"
            )
        if args.save_batches and processes.count() > 1:
            raise ValueError(
                f"save_batches={args.save_batches}: a record is of one process; leave it at 0 with several"
            )
        if args.load_best_model_at_end and processes.num_hosts() > 1:
            raise ValueError("load_best_model_at_end=True: with several hosts the last model stays; leave it out")
        prompts, fsdp = args.per_device_train_batch_size, mesh.axis_size("fsdp")
        if prompts % fsdp:
            raise ValueError(
                f"per_device_train_batch_size={prompts}: prompts are spread over fsdp={fsdp}; give a multiple of that"
            )
        if args.beta > 0:
            check_reference(args.reference, self.model.peft_config[self._adapter])
        trainable = [name for name, p in self.model.named_parameters() if p.requires_grad]
        other = [name for name in trainable if "lora_" not in name]
        if other or not trainable:
            raise ValueError(
                f"peft_config: only LoRA matrices can be trained, but {other[:1] or 'nothing'} is trainable"
            )

    def _fingerprint_frozen(self) -> list[float]:
        """A number for each frozen weight, which changes with it: nothing but the LoRA may learn."""
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            return torch.stack([weights[name].float().abs().sum() for name in self._frozen]).tolist()

    def _begin_run(self, checkpoint: str | None = None) -> None:
        """Keep what stays as it is while a run lasts: frozen weights, the reference policy, whether there is dropout.

        The reference is the model without its adapter where that is the policy as the run starts; else the adapter's
        matrices as they are now. A run that goes on from a checkpoint has its reference there.
        """
        self._frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        self._fingerprint = self._fingerprint_frozen()
        weights = adapter_weights(self.model, self._adapter)
        silent = changes_nothing(weights)
        self._reference: dict[str, Tensor] | None = None
        if checkpoint is not None:
            self._reference = self._reference_of(checkpoint, weights)
        elif self.args.reference == "start" and self.args.beta > 0 and not silent:
            self._reference = {name: weight.detach().clone() for name, weight in weights.items()}
        self._starts_at_reference = silent or self._reference is not None
        self._has_dropout = has_dropout(self.model)

    def _reference_of(self, checkpoint: str, weights: dict[str, nn.Parameter]) -> dict[str, Tensor] | None:
        """The reference policy of the run that left a checkpoint; None: the model without its adapter."""
        reference = load_reference(checkpoint, self.args.device)
        if reference is not None and reference.keys() != weights.keys():
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r}: its reference policy has other matrices than this LoRA, such "
                f"as {min(reference.keys() ^ weights.keys())}; give the model that the run began with"
            )
        if reference is None and self._given_reference is not None:
            logger.warning(
                "%s has no %s, so the reference policy is the adapter that the model was given with",
                checkpoint,
                REFERENCE_FILE,
            )
        return self._given_reference if reference is None else reference

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `transformers.Trainer.train`. The processes that call reward functions live as long as it runs."""
        if self.args.reward_processes > 0 and self.args.use_grpo:
            processes.of_first(self._start_reward_workers)
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._reward_workers is not None:
                self._reward_workers.close()
                self._reward_workers = None

    def is_finished(self, folder: str | Path) -> bool:
        """Whether a run that left this checkpoint, or these final files, has no step left to do: see `checkpoint`."""
        num_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        return is_finished(folder, num_steps, self.args.early_stopping_patience)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        checkpoint = kwargs.get("resume_from_checkpoint")
        if checkpoint is not None and self.is_finished(checkpoint):
            return self.stay_finished(checkpoint)
        if self.args.gradient_checkpointing:  # `transformers.Trainer` has just done it again, its own way
            checkpoint_layers(self.model, self.args.gradient_checkpointing_kwargs)
        self._begin_run(checkpoint)
        return super()._inner_training_loop(*args, **kwargs)

    def stay_finished(self, folder: str | Path) -> TrainOutput:
        """What resuming a finished run comes to, when its weights are loaded: its state, and no step more."""
        self.state = TrainerState.load_from_json(str(Path(folder) / STATE_FILE))
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.is_in_train = False
        if processes.is_first():
            done = f"The run is finished: {folder} holds its last step, {self.state.global_step}"
            logger.warning("%s. Nothing is trained; more steps or epochs would go on from there.", done)
        return TrainOutput(self.state.global_step, math.nan, {})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        with blamed_on("optim", self.args.optim.value):
            return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        name, kwargs = self.args.lr_scheduler_type.value, self.args.lr_scheduler_kwargs
        with blamed_on("lr_scheduler_type", name, f" (lr_scheduler_kwargs={kwargs!r})"):
            return super().create_scheduler(num_training_steps, optimizer)

    def init_hf_repo(self, token: str | None = None) -> None:
        hint = "; log in (hf auth login), or leave it out and upload the folder later"
        with blamed_on("push_to_hub", self.args.push_to_hub, hint):
            super().init_hf_repo(token)

    def _start_reward_workers(self) -> None:
        plain = [function for function in self.reward_funcs if not is_async(function)]
        if plain:  # the others stay here
            self._reward_workers = RewardWorkers(self.args.reward_processes, plain)

    # ---- one step ----

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """See `transformers.Trainer.get_batch_samples`. The batches of one optimizer step are remembered, since each
        token's weight depends on how many all of them have."""
        batches, num_items = super().get_batch_samples(*args)
        self._step_inputs, self._waiting, self._learned = list(batches), [], []
        return batches, num_items

    def _batches_with(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """All batches of the optimizer step that this one belongs to; itself where it came another way."""
        return self._step_inputs if any(batch is inputs for batch in self._step_inputs) else [inputs]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One rollout batch, or with SFT one batch of rows: forward and backward. Returns its share of the loss of
        the optimizer step, detached."""
        processes.check_same(lambda: {"prompts of this step": processes.digest([inputs["prompt_ids"]])})
        self._put_optimizer("train")
        if not self.args.use_grpo:
            with span("learning"):
                return self._sft_step(inputs)
        batches = self._batches_with(inputs)
        if len(batches) > 1 and inputs is batches[0]:
            self._waiting = self._collect_together(batches)
        return self.grpo_training_step(PromptBatch(**inputs).to(self.args.device))

    def _collect_together(self, inputs: list[dict[str, Any]]) -> list[tuple[TrainBatch, Tensor]]:
        """The batches that one optimizer step accumulates, whose tokens are weighed together, as those of one batch,
        each with its rewards (B, R)."""
        batches = [(self.collect(PromptBatch(**columns).to(self.args.device)), self._rewards) for columns in inputs]
        weights = self._token_weights([batch.completion_mask.cpu() for batch, _ in batches])
        return [(replace(b, token_weights=w), rewards) for (b, rewards), w in zip(batches, weights, strict=True)]

    def grpo_training_step(self, prompts: PromptBatch) -> Tensor:
        """Sample, score, learn. Returns the loss, detached. Of accumulated batches, the first has had all sampled."""
        if self._waiting:
            batch, self._rewards = self._waiting.pop(0)
        else:
            batch = self.collect(prompts)
        if not self._rehearsed:
            self._rehearse(batch)
        with span("learning"):
            return self.update(batch)

    def collect(self, prompts: PromptBatch) -> TrainBatch:
        """Sample a group of completions for each of N prompts, score them, and compute all that the loss needs."""
        device.sync()  # what the Trainer left pending must not become part of the rollout's graph
        args, started = self.args, time.perf_counter()
        with span("rollout"):
            rollout = self.sample_completions_for_prompts(prompts)
            ids, mask = rollout.completion_ids.cpu(), rollout.completion_mask.cpu()  # first time the host waits
        seconds = time.perf_counter() - started
        batch = self._begin_train_batch(prompts, rollout)  # an accelerator works on this while rewards are computed
        with span("scoring"):
            texts = decode_completions(self.processing_class, ids, mask, self.sampler.eos_token_ids)
            rewards = processes.of_first(lambda: self.compute_rewards_for_completions(prompts, texts).tolist())
            self._rewards = torch.tensor(rewards, dtype=torch.float64)  # (B, R)
        totals = (self._rewards * self.reward_weights).nansum(dim=1)  # (B,)
        if not totals.isfinite().all():
            raise ValueError(f"reward_weights={args.reward_weights}: the weighted total of {texts[0]!r:.80} overflows")
        names, group = self.reward_names, args.num_completions_per_prompt
        ids, mask, rewards, everyones = map(processes.gather_rows, (ids, mask, self._rewards, totals))
        metrics = rollout_metrics(ids, mask, rewards, everyones, names, group, self.sampler.eos_token_ids)
        self._record(metrics | {"rollout_tokens_per_second": int(mask.sum()) / seconds})
        if metrics["frac_reward_zero_std"] == 1.0 and processes.is_first():
            logger.warning(
                "Step %d: within every group all rewards are equal, so there is nothing to learn from this batch. "
                "The questions are too easy or too hard, the temperature is too low, or the reward functions do not "
                "find what they look for in completions such as %.200r",
                self.state.global_step + 1,
                texts[0],
            )
        return self._with_rewards(batch, totals)

    def make_train_batch(self, prompts: PromptBatch, rollout: Rollout, rewards: Tensor) -> TrainBatch:
        """All that the loss needs, from a rollout of N prompts and the (B,) weighted total rewards, on the host."""
        return self._with_rewards(self._begin_train_batch(prompts, rollout), rewards)

    def _begin_train_batch(self, prompts: PromptBatch, rollout: Rollout) -> TrainBatch:
        """All that the loss needs but the advantages, which are 0 as yet."""
        args, mask = self.args, rollout.completion_mask.cpu()
        # Where nothing is compiled, the columns in which all rows are padding are left out.
        width = mask.shape[1] if device.KIND == "xla" else max(1, int(mask.any(dim=0).sum()))
        batch = TrainBatch(
            prompt_ids=prompts.prompt_ids,
            prompt_mask=prompts.prompt_mask,
            completion_ids=rollout.completion_ids[:, :width],
            completion_mask=rollout.completion_mask[:, :width],
            advantages=torch.zeros(len(mask), device=args.device),
            token_weights=self._token_weights([mask])[0][:, :width],
            sampler_logps=rollout.sampler_logps[:, :width],
            lengths=completion_lengths(mask),
        )
        self._add_logps(batch)
        return batch

    def _token_weights(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """The weight in the loss of every token of an optimizer step, among all of them, in other processes too.

        Args:
            masks: of each batch, (B, C) bool, on the host.

        Returns:
            for each batch (B, C) float32, on the device.
        """
        counts = {"num_tokens": sum(int(m.sum()) for m in masks), "num_rows": sum(int(m.any(1).sum()) for m in masks)}
        mode, longest, counts = self.args.aggregation, self.args.generation_max_length, processes.sum_numbers(counts)
        return [aggregation_weights(mask, mode, longest, **counts).to(self.args.device) for mask in masks]

    def _add_logps(self, batch: TrainBatch) -> None:
        """Those of the reference and of the policy before it learns, where the loss needs them."""
        args = self.args
        if args.beta > 0:
            with span("reference"), reference_policy(self.model, self._reference):
                batch.ref_per_token_logps = logps_without_gradient(self.model, batch, args)
        if args.num_iterations > 1:
            with span("old policy"):
                batch.old_per_token_logps = logps_without_gradient(self.model, batch, args)

    def _rehearse(self, batch: TrainBatch) -> None:
        """Before it learns first: on XLA, have every shape of a learning pass compiled, so that none is new later."""
        self._rehearsed = True
        with device.random_numbers_kept():
            for parts in rehearsals(batch, self.args):
                for part in parts:  # the first makes gradients, the second adds to them
                    self._add_logps(part)
                    self.learning_pass(part)
                self.model.zero_grad()

    def _with_rewards(self, batch: TrainBatch, rewards: Tensor) -> TrainBatch:
        advantages = self.compute_group_advantages(rewards).to(self.args.device)
        return replace(batch, advantages=advantages, rewards=rewards)

    def update(self, batch: TrainBatch) -> Tensor:
        """Learn from a batch: `num_iterations` passes, each in micro-batches. Returns the last pass's loss, detached,
        over the rows of all processes; with accumulated batches, its share of their loss.

        The gradient of the last pass is left for `transformers.Trainer`, which clips it and steps the optimizer;
        between passes that is done here.
        """
        args, started = self.args, time.perf_counter()
        for iteration in range(args.num_iterations):
            if iteration > 0:
                self.optimizer_step()
            parts = self.learning_pass(batch)
            if iteration == 0:
                first_pass = parts
                self._save_record(batch, parts)
        first, last = (processes.sum_numbers(sum_up(p)) for p in (first_pass, parts))  # second time the host waits
        self._check_first_pass(first_pass, first)
        seconds = time.perf_counter() - started
        self._record({"learning_tokens_per_second": last["tokens"] * args.num_iterations / seconds})
        self._learned.append((first, last))
        if self.accelerator.sync_gradients:  # the last batch of the optimizer step
            firsts, lasts = zip(*self._learned, strict=True)
            self._record(learning_metrics(add_up(firsts), add_up(lasts), args.beta > 0))
            self._learned = []
        # by way of one dimension: XLA takes a 0 without any for a constant, which would be another graph
        loss = torch.tensor([last["loss"]], device=args.device)[0]
        device.sync()
        return loss

    def learning_pass(self, batch: TrainBatch) -> list[dict[str, Tensor]]:
        """Forward and backward of every micro-batch; the gradients add up in the parameters. See `learn`."""
        parts = learn(self.model, batch, self.args, self._backward)
        self._sum_gradients()
        return parts

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def _sum_gradients(self) -> None:
        """Over processes, once an optimizer step. DDP's own hooks sleep: no forward pass goes through its wrapper."""
        if self.accelerator.sync_gradients:
            processes.sum_gradients(self.model.parameters())

    def optimizer_step(self) -> None:
        """Clip the gradient, step, and forget the gradient: as `transformers.Trainer` does after a batch."""
        norm = self._clip_grad_norm(self.model) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(self.model, norm)
        self.optimizer.step()
        device.sync()
        self.model.zero_grad()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """The gradient's norm, before clipping; looked at before the optimizer may step.

        Raises:
            FloatingPointError: it is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if device.planner() is None:
            check_gradient_norm(float(norm), self.model, self.state.global_step + 1)
        return norm

    def _put_optimizer(self, mode: str) -> None:
        """Schedule-free optimizers hold other weights while they learn ("train") than they give in the end ("eval")."""
        if callable(getattr(self.optimizer, mode, None)):
            getattr(self.optimizer, mode)()

    def _save_record(self, batch: TrainBatch, parts: list[dict[str, Tensor]]) -> None:
        """Keep the first `save_batches` steps for the cross-check."""
        number = self.state.global_step + 1
        if number <= self.args.save_batches:
            record = record_step(self.model, batch, parts, self.optimizer.param_groups[0]["lr"])
            if self.args.should_save:
                record.save(Path(self.args.output_dir) / FOLDER / f"step-{number:04}.safetensors")

    # ---- its parts ----

    def sample_completions_for_prompts(self, prompts: PromptBatch) -> Rollout:
        """`num_completions_per_prompt` completions for each prompt: a `Rollout` of B = N * G rows.

        The random numbers of a row depend on the seed, the step and the row's place in it, and on nothing else.
        """
        group = self.args.num_completions_per_prompt
        num_rows = prompts.prompt_ids.shape[0] * group
        step, drawn = self._rows_drawn
        first = drawn if step == self.state.global_step else 0
        self._rows_drawn = (self.state.global_step, first + num_rows * processes.count())
        first += num_rows * processes.index()
        seed = (self.args.seed, 1 + self.state.global_step)  # 0 belongs to evaluation
        uniforms = draw_uniforms(seed, range(first, first + num_rows), self.sampling.max_new_tokens)
        rollout = self.sampler.sample(prompts.prompt_ids, prompts.prompt_mask, group, self.sampling, uniforms)
        assert rollout.completion_ids.shape == (num_rows, self.sampling.max_new_tokens), "wrong number of completions"
        return rollout

    def compute_rewards_for_completions(self, prompts: PromptBatch, completions: Sequence[str]) -> Tensor:
        """Every reward function's value for each of B completions: (B, R) float64, NaN for None.

        Raises:
            ValueError: see `score_completions`.
        """
        timeout = self.args.reward_timeout
        return score_completions(self.reward_funcs, prompts.rows, completions, timeout, self._reward_workers)

    def compute_group_advantages(self, rewards: Tensor) -> Tensor:
        """(B,) total rewards -> (B,) float32 advantages; checks that they are centred in each group."""
        args = self.args
        group = args.num_completions_per_prompt
        advantages = compute_group_advantages(
            rewards, group, args.algorithm, args.normalize_advantages, args.advantage_epsilon
        )
        assert advantages.shape == rewards.shape, f"advantages {advantages.shape} for rewards {rewards.shape}"
        grouped = advantages.view(-1, group)
        off = grouped.mean(dim=1).abs() > 1e-5 * (1 + grouped.abs().amax(dim=1))
        assert not off.any(), f"advantages are not centred: {self._describe_group(int(off.int().argmax()))}"
        return advantages

    # ---- supervised fine-tuning ----

    def _sft_step(self, inputs: dict[str, Any]) -> Tensor:
        self.model.train()
        started = time.perf_counter()
        counts = {"step": sum(int(batch["completion_mask"].sum()) for batch in self._batches_with(inputs))}
        tokens = processes.sum_numbers(counts | {"batch": int(inputs["completion_mask"].sum())})
        loss = learn_completions(self.model, sft_batch(inputs, tokens["step"]), self.args, self._backward)
        self._sum_gradients()
        self._record({"learning_tokens_per_second": tokens["batch"] / (time.perf_counter() - started)})
        return loss * processes.count()  # Trainer logs the mean over processes

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Greedy answers to the evaluation questions, and with `num_eval_completions` = k sampled ones.

        Returns and logs `eval_accuracy` (greedy pass@1), `eval_mean@k`, `eval_mean_length`, `eval_runtime` (seconds),
        and with SFT `eval_loss`.
        """
        device.sync()  # as in `collect`
        self._put_optimizer("eval")
        args, started = self.args, time.perf_counter()
        rows = (self.eval_dataset or []) if eval_dataset is None else evaluation_rows(eval_dataset)
        if not rows:
            raise ValueError("eval_dataset: there are no rows to evaluate on")
        rows = list(self._prepare(rows))
        if self.judge is not None and eval_dataset is not None:  # the trainer's own were looked at when it was made
            check_columns([self.judge], rows, "judge")
        metrics = {}
        if self.judge is not None:
            answer_rows = functools.partial(
                answer,
                self.sampler,
                self.processing_class,
                rows,
                collator=Collator(self.data_collator.pad_token_id, args.max_prompt_length),
                batch_size=args.per_device_eval_batch_size,
                judge=self.judge,
                seed=args.seed,
                timeout=args.reward_timeout,
            )
            greedy = SamplingParams(args.generation_max_length, temperature=0.0)
            self.last_answers = answer_rows(greedy)
            self.first_answers = self.first_answers or self.last_answers
            metrics["accuracy"] = self.last_answers.accuracy
            metrics["mean_length"] = self.last_answers.mean_length
            if args.num_eval_completions:
                sampled = SamplingParams(args.generation_max_length, temperature=args.eval_temperature)
                samples = answer_rows(sampled, num_completions=args.num_eval_completions)
                metrics[f"mean@{args.num_eval_completions}"] = samples.accuracy
        if not args.use_grpo:
            metrics["loss"] = completion_loss(self.model, rows, self.data_collator, args.per_device_eval_batch_size)
        metrics["runtime"] = time.perf_counter() - started
        metrics = processes.of_first(lambda: metrics)  # a run is stopped by them
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    # ---- assertions and metrics ----

    def _check_first_pass(self, parts: list[dict[str, Tensor]], first: dict[str, float]) -> None:
        """What holds before the first optimizer step on a batch, whatever the model and the data."""
        exact = base_model(self.model).dtype == torch.float32
        at_reference = self._starts_at_reference and self.state.global_step == 0
        broken = broken_invariant(parts, first, exact, at_reference, self._has_dropout)
        if broken is not None:
            step = f"step {self.state.global_step + 1}"
            check_finite(adapter_weights(self.model, self._adapter), step)
            check_finite({"a log-probability": torch.cat([part["logps"] for part in parts])}, step)
            message, row = broken
            raise AssertionError(f"{message}; {self._describe_group(row // self.args.num_completions_per_prompt)}")

    def _describe_group(self, group: int) -> str:
        size = self.args.num_completions_per_prompt
        rewards = self._rewards[group * size : (group + 1) * size].tolist()
        return f"group {group} has rewards {self.reward_names}: {rewards}"

    def _record(self, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._metrics[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of what the steps since the last log recorded."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._metrics.items()}
            self._metrics.clear()
        if device.KIND == "xla":
            logs["compilations"] = device.num_compilations()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the estimate of Transformers knows nothing of rollouts

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter in PEFT's layout, and the tokenizer. The weights stay on the device.

        All hosts of a mesh gather what the first writes, here and below.
        """
        assert self._fingerprint_frozen() == self._fingerprint, "frozen weights changed: only the LoRA may learn"
        self._put_optimizer("eval")
        weights = adapter_weights(self.model, self._adapter)
        if self._new_embeddings:
            weights |= embedding_weights(self.model)
        weights = {name: weight.detach().cpu() for name, weight in weights.items()}
        check_finite(weights, f"step {self.state.global_step}")
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            save_adapter(self.model, self._adapter, weights, output_dir, self._new_embeddings)
            self.processing_class.save_pretrained(output_dir)
        if _internal_call and self._reference is not None:  # a checkpoint
            reference = {name: weight.cpu() for name, weight in self._reference.items()}
            if self.args.should_save:
                save_reference(reference, output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = enumerate(self.optimizer.state_dict()["state"].values())
        moments = {f"{name} of optimizer state {i}": v for i, state in states for name, v in state.items()}
        moments = {name: v.cpu() for name, v in moments.items() if isinstance(v, Tensor)}  # on XLA to compile nothing
        check_finite(moments, f"step {self.state.global_step}")
        with processes.folder_to_write(output_dir) as folder:
            super()._save_optimizer_and_scheduler(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        with processes.folder_to_write(output_dir) as folder:
            super()._save_rng_state(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        processes.check_same(lambda: {f"files in {resume_from_checkpoint}": fingerprint(resume_from_checkpoint)})
        check_same_scale(self.model.peft_config[self._adapter], resume_from_checkpoint)
        learning = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():  # PEFT lets all matrices learn that it loads
            parameter.requires_grad_(learning[name])


def _facts(model: nn.Module, args: GRPOConfig, *datasets: object) -> dict[str, Any]:
    """What all hosts of a mesh must have alike before the first step, besides the data themselves."""
    lengths = [len(rows) if isinstance(rows, Sized) else None for rows in datasets]
    facts = {
        "weights of the model": processes.digest(model.parameters()),
        "the model's config": _but_for_paths(base_model(model).config.to_dict()),
        "the LoRA's config": {name: _but_for_paths(config.to_dict()) for name, config in model.peft_config.items()},
        "mesh (fsdp, tp)": (mesh.axis_size("fsdp"), mesh.axis_size("tp")),
        "training, evaluation rows": lengths,
    }
    return settings_of(args) | processes.surroundings() | facts


def _but_for_paths(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.endswith("name_or_path")}
