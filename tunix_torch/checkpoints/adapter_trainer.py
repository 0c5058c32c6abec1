"""The part of the trainer that saves and resumes: what checkpoints hold, and what must not change during a run."""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput

from ..config.grpo import GRPOConfig
from ..config.loss import warn_of_loss
from ..config.scale import rows_per_generation
from ..config.settings import require
from ..data.rows import Row
from ..evals.answers import Answers
from ..learn.entropy import EntropyControl
from ..learn.finite import check_finite
from ..learn.pairs import learn_pair_rows, pair_metrics
from ..learn.sft import learn_rows
from ..model.adapter import REFERENCE_FILE, load_reference, save_reference
from ..model.checks import has_dropout, remove_dropout
from ..model.forward import recompute_layers, reference_policy
from ..model.policies import Policy, like, mix
from ..runtime import device, fsdp, phases, together
from ..runtime.profiling import ProfileStep
from .contents import load_plain
from .files import STATE_FILE, digest_of_files, is_finished, why_damaged
from .logs import LogsSteps
from .resuming import EarlyStoppingCallback, EndGraphWithOptimizer, OwnIntervals, SyncReference, WarnOfEarlierRun
from .same_run import RunFacts
from .split_weights import in_main_memory, is_split, load_optimizer, save_optimizer
from .waiting import WaitingBatch, load_waiting, save_waiting, waiting_rows

logger = logging.getLogger(__name__)


class AdapterTrainer(LogsSteps):
    """A `transformers.Trainer` that trains what a policy says and nothing else, and writes it in the policy's layout.

    When a run begins, the trainer keeps two things. One is a number for each frozen weight, by which a change would be
    noticed. The other is the reference policy: the model without its adapter where that is the policy with which the
    run begins, otherwise a copy of the weights that learn. With `sync_ref_model` it is always a copy, which moves
    towards the policy now and then. Checkpoints hold the copy.

    Args:
        policy: what `make_policy` returns.
        callbacks: those of the user. The callbacks that every run needs are added.
        others: further arguments of `transformers.Trainer`.
    """

    def __init__(
        self, policy: Policy, args: GRPOConfig, callbacks: list[TrainerCallback] | None = None, **others: Any
    ) -> None:
        self.policy = policy
        if args.disable_dropout:
            remove_dropout(policy.model)
        early_stopping = (
            [] if args.early_stopping_patience is None else [EarlyStoppingCallback(args.early_stopping_patience)]
        )
        profiling = [] if args.profile_step is None else [ProfileStep(args.profile_step)]
        syncing = (
            [SyncReference(self.sync_reference, args.ref_model_sync_steps, args.num_iterations)]
            if args.sync_ref_model
            else []
        )
        own = [
            WarnOfEarlierRun(),
            OwnIntervals(),
            *self.watching(args, others["processing_class"]),
            *syncing,
            *(callbacks or []),
            *early_stopping,
            *profiling,
            EndGraphWithOptimizer(),
        ]
        super().__init__(model=policy.model, args=args, callbacks=own, **others)
        self.facts = RunFacts(args, self.train_dataset, policy.base_weights)
        # For checkpoints that have lost their reference.
        self._given_reference = self._start() if policy.has_base and not args.sync_ref_model else None
        self._frozen: dict[str, float] | None = None  # a number for each frozen weight, once the run has begun
        self._step_inputs: list[dict[str, Any]] = []  # the batches that the optimizer step learns from
        # The inputs of all steps that share the newest rollout, and of those of them that have not begun.
        self._rollout_inputs: list[list[dict[str, Any]]] = []
        self._ahead: list[tuple[list[dict[str, Any]], Tensor | int | None]] = []
        # Batches that are sampled and not yet learned from, one for each pass, with their rewards (B, R).
        self._waiting: list[WaitingBatch] = []
        if args.use_grpo and together.is_first():
            warn_of_loss(args)

    @property
    def needs_reference(self) -> bool:
        """Whether a reference is kept. Supervised fine-tuning needs none, and does not copy a whole model for it."""
        args = self.args
        return args.needs_reference and (args.use_grpo or args.preference_loss is not None or self.policy.has_base)

    def _start(self) -> dict[str, Tensor] | None:
        """A copy of the policy as it is, for the reference; None where the reference is the model without its adapter,
        or there is none."""
        if not self.needs_reference or self.args.reference == "base":
            return None
        return None if self.policy.is_base() and not self.args.sync_ref_model else self.policy.copy()

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """The model is on its device, and weights that are tied are one tensor: `make_policy` saw to both.

        `transformers.Trainer` would tie them again on XLA, which fails where PEFT has wrapped the embeddings.
        """

    # ---- the beginning of a run ----

    def begin_run(self, checkpoint: str | None = None) -> None:
        """Keep what must not change during the run. A resumed run finds its reference policy in the checkpoint."""
        self._frozen = self._sums_of_frozen()
        self._ahead, self._waiting = [], [] if checkpoint is None else load_waiting(checkpoint, self.args.device)
        if self._waiting:
            self.step_rows.load(waiting_rows(checkpoint))
        # None: the model without its adapter, or there is no reference.
        self.reference: dict[str, Tensor] | None = (
            self._start() if checkpoint is None else self._reference_of(checkpoint)
        )
        self.starts_at_reference = self.reference is not None or self.policy.is_base()
        self.entropy = EntropyControl(self.args)
        if checkpoint is not None:
            self.entropy.load(checkpoint)
        if self.args.sync_ref_model:
            self._mixed()  # so that it is compiled before the first step
        self.has_dropout = has_dropout(self.model)

    def begin_run_if_needed(self) -> None:
        """Begin a run when a step is taken without `train`."""
        if self._frozen is None:
            self.begin_run()

    def as_reference(self) -> AbstractContextManager[None]:
        """Within this context the model is the reference policy of this run, without gradient."""
        self.begin_run_if_needed()
        return reference_policy(self.model, self.reference)

    def _sums_of_frozen(self) -> dict[str, float]:
        """The sum of absolute values of each frozen weight, or of this process's part. It changes when that does. The
        sums are a graph of their own, the same each time."""
        weights = dict(self.model.named_parameters())
        names = list(self.policy.frozen() if self._frozen is None else self._frozen)
        if not names:
            return {}
        device.sync()
        with torch.no_grad():
            numbers = torch.stack([fsdp.own_part(weights[name]).float().abs().sum() for name in names]).tolist()
        return dict(zip(names, numbers, strict=True))

    def _reference_of(self, checkpoint: str) -> dict[str, Tensor] | None:
        """The reference policy of the run that left a checkpoint; None: the model without its adapter, or none."""
        if not self.needs_reference:
            return None
        weights = self.policy.weights()
        is_split = any(map(fsdp.is_part, weights.values()))
        reference = load_reference(checkpoint, torch.device("cpu") if is_split else self.args.device)
        given = f"resume_from_checkpoint={checkpoint!r}"
        if reference is None:
            if not self.policy.has_base or self.args.sync_ref_model:
                raise ValueError(f"{given}: it has no {REFERENCE_FILE}, and nothing else says what the reference was")
            if self._given_reference is not None:
                logger.warning(
                    "%s has no %s, so the reference policy is the adapter that the model was given with",
                    checkpoint,
                    REFERENCE_FILE,
                )
            return self._given_reference
        if reference.keys() != weights.keys():
            raise ValueError(
                f"{given}: its reference policy has other matrices than this model, such as "
                f"{min(reference.keys() ^ weights.keys())}; give the model that the run began with"
            )
        return {name: like(weight, weights[name]) for name, weight in reference.items()}

    def sync_reference(self) -> None:
        """Move the reference policy towards the policy, as `sync_ref_model` says."""
        self.begin_run_if_needed()
        self.reference = self._mixed()

    def _mixed(self) -> dict[str, Tensor]:
        """The reference after a step towards the policy. It is a graph of its own, the same each time."""
        device.sync()
        mixed = mix(self.reference, self.policy, self.args.ref_model_mixup_alpha)
        device.sync()
        return mixed

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        checkpoint = kwargs.get("resume_from_checkpoint")
        if checkpoint is not None and self.is_finished(checkpoint):
            return self.stay_finished(checkpoint)
        if self.args.gradient_checkpointing:  # `transformers.Trainer` has just done it again, its own way
            recompute_layers(self.model, self.args.gradient_checkpointing_kwargs)
        self.begin_run(checkpoint)
        self.go_on_from(checkpoint)
        self.facts.know_rows(are_compared=self.args.save_strategy != "no")
        with phases.closing():
            return super()._inner_training_loop(*args, **kwargs)

    # ---- a run that is finished ----

    def is_finished(self, folder: str | Path) -> bool:
        """Whether the run that left this checkpoint, or these final files, has no step left to do."""
        num_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        return is_finished(folder, num_steps, self.args.early_stopping_patience)

    def stay_finished(self, folder: str | Path) -> TrainOutput:
        """Take over the state of a finished run, whose weights are loaded already. No step is taken."""
        self.state = TrainerState.load_from_json(str(Path(folder) / STATE_FILE))
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.load_means(folder)
        self.check_steps_were_taken(self.state.global_step)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.is_in_train = False
        if together.is_first():
            done = f"The run is finished: {folder} holds its last step, {self.state.global_step}"
            logger.warning("%s. Nothing is trained; more steps or epochs would go on from there.", done)
        return TrainOutput(self.state.global_step, math.nan, {})

    def log_summary(self, folder: str | Path) -> None:
        self.entropy = EntropyControl(self.args)
        self.entropy.load(folder)
        super().log_summary(folder)

    # ---- one optimizer step ----

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """See `transformers.Trainer.get_batch_samples`. The batches of one optimizer step are remembered, since each
        token's weight depends on how many all of them have. Batches of steps that share a rollout are read together."""
        if not self._ahead:
            # After a checkpoint in the middle of such steps, the rest of them have been sampled already.
            passes = self.args.num_iterations * self.args.gradient_accumulation_steps
            steps = len(self._waiting) // passes or self.args.steps_per_generation
            read = super().get_batch_samples
            self._ahead = [read(*args), *filter(lambda samples: samples[0], (read(*args) for _ in range(steps - 1)))]
            self._rollout_inputs = [list(batches) for batches, _ in self._ahead]
        batches, num_items = self._ahead.pop(0)
        self._step_inputs = list(batches)
        self.step_begins()
        return batches, num_items

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """See `transformers.Trainer`. Where steps share a rollout, an epoch has as many rows as whole rollouts take."""
        sampler, multiple = super()._get_train_sampler(train_dataset), rows_per_generation(self.args)
        if sampler is None or self.args.steps_per_generation == 1:
            return sampler
        count = len(sampler) - len(sampler) % multiple
        if isinstance(sampler, RandomSampler):
            return RandomSampler(sampler.data_source, num_samples=count)
        strategy = self.args.train_sampling_strategy
        hint = "with steps_per_generation, rows come in random or sequential order"
        require(isinstance(sampler, SequentialSampler), "train_sampling_strategy", strategy, hint)
        return SequentialSampler(range(count))

    def batches_with(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """All batches of the optimizer step that this one belongs to; itself where it came another way."""
        return self._step_inputs if any(batch is inputs for batch in self._step_inputs) else [inputs]

    def rollout_with(self, batches: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The batches of all optimizer steps that share a rollout with the step of these batches, which is the first;
        the step alone where the batches came another way."""
        first = self._rollout_inputs[0] if self._rollout_inputs else []
        return self._rollout_inputs if first and first[0] is batches[0] else [batches]

    def learn_given_rows(self, inputs: dict[str, Any]) -> Tensor:
        """Forward and backward of a batch of rows that hold their completions: pairs with a `preference_loss`,
        supervised fine-tuning without. Returns the batch's share of the loss of the optimizer step, detached."""
        step = self.model, inputs, self.batches_with(inputs), self.args, self.backward, self.sum_gradients
        of_pairs = self.args.preference_loss is not None
        loss, metrics = learn_pair_rows(*step, self.as_reference) if of_pairs else learn_rows(*step)
        self.add_metrics(metrics)
        self.guard.learned(inputs, loss)
        return self.counted(loss)

    def further_metrics(self, rows: Sequence[Row], samples: Answers | None) -> dict[str, float]:
        """What an evaluation says besides: of preference pairs, where the run learns from pairs.

        Args:
            samples: k sampled answers to each row; None: there are none.
        """
        if self.args.preference_loss is None:
            return {}
        return pair_metrics(self.model, rows, self.data_collator, self.args, self.as_reference)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the estimate that Transformers makes leaves rollouts out

    # ---- files ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False, push: bool = True) -> None:
        """Write what the policy saves, and the tokenizer. The weights stay on the device.

        All hosts and processes take part in copying the weights to the CPU, though only the first writes files.

        Args:
            push: where `args.push_to_hub` is set, then upload the run's folder with its card.
        """
        frozen = self._frozen
        same = frozen is None or self._sums_of_frozen() == frozen
        assert same, f"frozen weights changed: only {self.policy.learns} may learn"
        self.put_optimizer("eval")
        tensors = self.policy.to_save()
        # Tied weights are one tensor under several names. It is copied once, and stays one.
        distinct = {id(weight): weight for weight in tensors.values()}
        copies = {key: in_main_memory(weight, self.args.should_save) for key, weight in distinct.items()}
        weights = {name: copies[id(weight)] for name, weight in tensors.items()}
        looked_at = {name: weight if fsdp.is_part(weight) else weights[name] for name, weight in tensors.items()}
        check_finite(looked_at, f"step {self.state.global_step}")
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            self.policy.save(weights, output_dir)
            self.processing_class.save_pretrained(output_dir)
            self.facts.save(output_dir, is_checkpoint=_internal_call and frozen is not None)
            self.write_card(output_dir)
        if _internal_call and frozen is not None and self.reference is not None:  # a checkpoint
            check_finite(self.reference, f"step {self.state.global_step}, the reference policy")
            reference = {n: in_main_memory(weight, self.args.should_save) for n, weight in self.reference.items()}
            if self.args.should_save:
                save_reference(reference, output_dir)
        if _internal_call and frozen is not None and self.args.should_save:
            self.entropy.save(output_dir)
        if push and self.args.push_to_hub and not _internal_call:
            self.upload(commit_message="Model save")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = enumerate(self.optimizer.state_dict()["state"].values())
        moments = {f"{name} of optimizer state {i}": v for i, state in states for name, v in state.items()}
        moments = {name: v for name, v in moments.items() if isinstance(v, Tensor)}
        check_finite(moments, f"step {self.state.global_step}")
        with together.folder_to_write(output_dir) as folder:
            if is_split(self.optimizer):
                save_optimizer(self.optimizer, folder, self.args.should_save)
                if self.args.should_save:
                    torch.save(self.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)
            else:
                super()._save_optimizer_and_scheduler(folder)
        self._save_means(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with together.folder_to_write(output_dir) as folder:
            super()._save_rng_state(folder)
            if self._waiting:
                save_waiting(self._waiting, folder, self.step_rows.state(self.facts.reward_funcs))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        together.check_same(lambda: {f"files in {resume_from_checkpoint}": digest_of_files(resume_from_checkpoint)})
        if not Path(resume_from_checkpoint).is_dir():
            raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint!r}: no such folder")
        reason = why_damaged(resume_from_checkpoint)
        if reason is not None:
            raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint!r}: {reason}")
        self.facts.check(resume_from_checkpoint)
        self.policy.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info("Loading the best model, %s", self.state.best_model_checkpoint)
        self.policy.load(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what `_save_optimizer_and_scheduler` wrote. On a mesh moments are split as their weights are."""
        with self.facts.in_force(self.optimizer, self.lr_scheduler):
            if checkpoint is not None and is_split(self.optimizer) and (Path(checkpoint) / OPTIMIZER_NAME).is_file():
                load_optimizer(self.optimizer, checkpoint)
                self.lr_scheduler.load_state_dict(load_plain(Path(checkpoint) / SCHEDULER_NAME))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for weight, state in self.optimizer.state.items():
                for moment in state.values():
                    if isinstance(moment, Tensor) and moment.shape == weight.shape:
                        like(moment, weight)
