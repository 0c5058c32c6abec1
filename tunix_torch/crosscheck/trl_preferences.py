"""TRL's side of preference losses and of distillation: its own functions, called on plain tensors."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer

CPU = SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t)


class _Given(nn.Module):
    """Stands in for a model: it returns log-probabilities that are given, (2N, C), as TRL's patched forward does."""

    is_gradient_checkpointing = False

    def __init__(self, logps: Tensor) -> None:
        super().__init__()
        self.logps = logps

    def forward(self, **_: Any) -> SimpleNamespace:
        none = torch.zeros_like(self.logps)
        return SimpleNamespace(log_probs=self.logps, entropy=none, mean_logits=none, is_top1=none.bool())


def dpo_trainer_loss(
    kind: str, logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of TRL's `DPOTrainer`, with gradient, and the metrics that it keeps.

    Args:
        kind: dpo or ipo.
        logps, ref_logps, mask: as for `preference_terms`: pair by pair. TRL wants all chosen rows first.
    """

    def sides(rows: Tensor) -> Tensor:
        return torch.cat((rows[::2], rows[1::2]))

    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer = SimpleNamespace(
        accelerator=CPU,
        model=_Given(sides(logps)),
        ref_model=_Given(sides(ref_logps)),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid" if kind == "dpo" else "ipo"],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    whole = nn.functional.pad(sides(mask).long(), (1, 0))  # one column of the prompt stands before the completions
    inputs = {"input_ids": torch.ones_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole}
    loss = DPOTrainer._compute_loss(trainer, trainer.model.train(), inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in metrics["train"].items()}


def simpo_losses(
    chosen: Tensor, rejected: Tensor, beta: float, gamma: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses and both rewards, (N,) each, of TRL's `CPOTrainer` with its loss type "simpo"."""
    trainer = SimpleNamespace(
        accelerator=CPU, alpha=0.0, loss_type="simpo", simpo_gamma=gamma, beta=beta, label_smoothing=label_smoothing
    )
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)


def odds_ratio_losses(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the second term of ORPO's loss, without the likelihood of the chosen, and both rewards, (N,) each."""
    terms, chosen_rewards, rejected_rewards, _, _ = ORPOTrainer.odds_ratio_loss(
        SimpleNamespace(accelerator=CPU, beta=beta), chosen, rejected
    )
    return -terms, chosen_rewards, rejected_rewards


def sum_of_reverse_kl(scores: Tensor, teacher_scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Return the reverse KL of logits (B, C, V), summed over the tokens of a mask, by TRL's `GKDTrainer`."""
    labels = torch.where(mask, 0, -100)
    return GKDTrainer.generalized_jsd_loss(
        scores, teacher_scores, labels, beta=1, temperature=temperature, num_items_in_batch=1
    )
