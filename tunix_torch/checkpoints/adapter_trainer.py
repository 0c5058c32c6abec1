"""The part of the trainer that saves and resumes: what checkpoints hold, and what must not change during a run."""

import logging
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from ..config.grpo import GRPOConfig
from ..config.services import blamed_on
from ..learn.finite import check_finite, check_gradient_norm
from ..model.adapter import (
    REFERENCE_FILE,
    adapter_weights,
    changes_nothing,
    embedding_weights,
    load_reference,
    save_adapter,
    save_reference,
)
from ..model.checks import check_reference, has_dropout
from ..model.forward import recompute_layers
from ..model.policy import Policy
from ..runtime import device, together
from ..runtime.profiling import ProfileStep
from .files import STATE_FILE, check_same_scale, digest_of_files, is_finished
from .resuming import EarlyStoppingCallback, EndGraphWithOptimizer, OwnIntervals
from .whole import WholeCheckpoints

logger = logging.getLogger(__name__)


class AdapterTrainer(WholeCheckpoints):
    """A `transformers.Trainer` that trains the LoRA of a policy and nothing else, and writes it in PEFT's layout.

    When a run begins, the trainer keeps two things that must not change until it ends. One is a number for each frozen
    weight, by which a change would be noticed. The other is the reference policy: the model without its adapter where
    that is the policy with which the run begins, otherwise a copy of the adapter's matrices. Checkpoints hold the copy.

    Args:
        policy: what `make_policy` returns.
        callbacks: those of the user. The callbacks that every run needs are added.
        others: further arguments of `transformers.Trainer`.

    Raises:
        ValueError: the base model shall be the reference, but the initialisation of the LoRA has changed its weights.
    """

    def __init__(
        self, policy: Policy, args: GRPOConfig, callbacks: list[TrainerCallback] | None = None, **others: Any
    ) -> None:
        self.policy = policy
        if args.beta > 0:
            check_reference(args.reference, policy.model.peft_config[policy.adapter])
        early_stopping = (
            [] if args.early_stopping_patience is None else [EarlyStoppingCallback(args.early_stopping_patience)]
        )
        profiling = [] if args.profile_step is None else [ProfileStep(args.profile_step)]
        own = [OwnIntervals(), *(callbacks or []), *early_stopping, *profiling, EndGraphWithOptimizer()]
        super().__init__(model=policy.model, args=args, callbacks=own, **others)
        self._given_reference = self._adapter_now() if args.reference == "start" and args.beta > 0 else None
        self._frozen: dict[str, float] | None = None  # a number for each frozen weight, once the run has begun
        self._step_inputs: list[dict[str, Any]] = []  # the batches that the optimizer step learns from
        self._metrics: dict[str, list[float]] = defaultdict(list)  # since the last log

    def _adapter_now(self) -> dict[str, Tensor] | None:
        """A copy of the adapter's matrices; None where the model computes the same without them."""
        weights = adapter_weights(self.model, self.policy.adapter)
        return None if changes_nothing(weights) else {name: w.detach().clone() for name, w in weights.items()}

    # ---- the beginning of a run ----

    def begin_run(self, checkpoint: str | None = None) -> None:
        """Keep what must not change during the run. A resumed run finds its reference policy in the checkpoint."""
        self._frozen = self._sums_of_frozen()
        now = self._adapter_now()
        self.reference: dict[str, Tensor] | None = None  # None: the model without its adapter
        if checkpoint is not None:
            self.reference = self._reference_of(checkpoint)
        elif self.args.reference == "start" and self.args.beta > 0:
            self.reference = now
        self.starts_at_reference = now is None or self.reference is not None
        self.has_dropout = has_dropout(self.model)

    def begin_run_if_needed(self) -> None:
        """Begin a run when a step is taken without `train`."""
        if self._frozen is None:
            self.begin_run()

    def _sums_of_frozen(self) -> dict[str, float]:
        """The sum of absolute values of each frozen weight. It changes when the weight does."""
        names = self._frozen or [name for name, p in self.model.named_parameters() if not p.requires_grad]
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            numbers = torch.stack([weights[name].float().abs().sum() for name in names]).tolist()
        return dict(zip(names, numbers, strict=True))

    def _reference_of(self, checkpoint: str) -> dict[str, Tensor] | None:
        """The reference policy of the run that left a checkpoint; None: the model without its adapter."""
        reference = load_reference(checkpoint, self.args.device)
        weights = adapter_weights(self.model, self.policy.adapter)
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

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        checkpoint = kwargs.get("resume_from_checkpoint")
        if checkpoint is not None and self.is_finished(checkpoint):
            return self.stay_finished(checkpoint)
        if self.args.gradient_checkpointing:  # `transformers.Trainer` has just done it again, its own way
            recompute_layers(self.model, self.args.gradient_checkpointing_kwargs)
        self.begin_run(checkpoint)
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
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.is_in_train = False
        if together.is_first():
            done = f"The run is finished: {folder} holds its last step, {self.state.global_step}"
            logger.warning("%s. Nothing is trained; more steps or epochs would go on from there.", done)
        return TrainOutput(self.state.global_step, math.nan, {})

    # ---- errors of other libraries, as errors of a setting ----

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

    # ---- one optimizer step ----

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """See `transformers.Trainer.get_batch_samples`. The batches of one optimizer step are remembered, since each
        token's weight depends on how many all of them have."""
        batches, num_items = super().get_batch_samples(*args)
        self._step_inputs = list(batches)
        return batches, num_items

    def batches_with(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """All batches of the optimizer step that this one belongs to; itself where it came another way."""
        return self._step_inputs if any(batch is inputs for batch in self._step_inputs) else [inputs]

    def backward(self, loss: Tensor) -> None:
        """Compute the gradient of a loss and add it to the gradients of the parameters."""
        self.accelerator.backward(loss)

    def sum_gradients(self) -> None:
        """Sum gradients over processes, once for each optimizer step.

        DDP's own hooks do nothing here, since no forward pass goes through its wrapper.
        """
        if self.accelerator.sync_gradients:
            together.sum_gradients(self.model.parameters())

    def optimizer_step(self) -> None:
        """Clip the gradient, step, and drop the gradient, as `transformers.Trainer` does after a batch."""
        norm = self._clip_grad_norm(self.model) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(self.model, norm)
        self.optimizer.step()
        device.sync()
        self.model.zero_grad()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """The norm of the gradient before clipping. It is checked before the optimizer steps.

        Raises:
            FloatingPointError: the norm is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if device.planner() is None:
            check_gradient_norm(float(norm), self.model, self.state.global_step + 1)
        return norm

    def put_optimizer(self, mode: str) -> None:
        """Schedule-free optimizers hold other weights while they learn ("train") than they give in the end ("eval")."""
        if callable(getattr(self.optimizer, mode, None)):
            getattr(self.optimizer, mode)()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the estimate that Transformers makes leaves rollouts out

    # ---- metrics ----

    def add_metrics(self, numbers: dict[str, float]) -> None:
        """Keep numbers of a step for the next log."""
        for name, value in numbers.items():
            self._metrics[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of each number that `add_metrics` was given since the last log."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._metrics.items()}
            self._metrics.clear()
        super().log(logs | device.counters(), start_time)

    # ---- files ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter in PEFT's layout, and the tokenizer. The weights stay on the device.

        All hosts of a mesh take part in copying the weights to the CPU, though only the first host writes files.
        """
        frozen = self._frozen
        assert frozen is None or self._sums_of_frozen() == frozen, "frozen weights changed: only the LoRA may learn"
        self.put_optimizer("eval")
        weights = adapter_weights(self.model, self.policy.adapter)
        if self.policy.has_new_embeddings:
            weights |= embedding_weights(self.model)
        weights = {name: weight.detach().cpu() for name, weight in weights.items()}
        check_finite(weights, f"step {self.state.global_step}")
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            save_adapter(self.model, self.policy.adapter, weights, output_dir, self.policy.has_new_embeddings)
            self.processing_class.save_pretrained(output_dir)
        if _internal_call and frozen is not None and self.reference is not None:  # a checkpoint
            reference = {name: weight.cpu() for name, weight in self.reference.items()}
            if self.args.should_save:
                save_reference(reference, output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = enumerate(self.optimizer.state_dict()["state"].values())
        moments = {f"{name} of optimizer state {i}": v for i, state in states for name, v in state.items()}
        moments = {
            name: v.cpu() for name, v in moments.items() if isinstance(v, Tensor)
        }  # on the CPU nothing is compiled
        check_finite(moments, f"step {self.state.global_step}")
        with together.folder_to_write(output_dir) as folder:
            super()._save_optimizer_and_scheduler(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        with together.folder_to_write(output_dir) as folder:
            super()._save_rng_state(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        together.check_same(lambda: {f"files in {resume_from_checkpoint}": digest_of_files(resume_from_checkpoint)})
        check_same_scale(self.model.peft_config[self.policy.adapter], resume_from_checkpoint)
        learning = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():  # PEFT lets all matrices learn that it loads
            parameter.requires_grad_(learning[name])
