"""Entropy: the tokens of highest entropy, and the weight of the entropy bonus, which may adapt during a run."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..batch import TrainBatch
from ..config.grpo import GRPOConfig
from ..runtime import device, together

STATE_FILE = "entropy_control.json"  # in a checkpoint


def keep_high_entropy(batch: TrainBatch, entropy: Tensor, share: float) -> TrainBatch:
    """Leave only the tokens of highest entropy in the policy loss and the entropy bonus (arXiv 2506.01939).

    The threshold is the quantile 1 - share over all tokens of the rollout batch that the loss counts, of all processes,
    however the batch is cut into micro-batches. TRL takes it over each micro-batch, which is the same for one.

    Args:
        entropy: (B, C) float32.
        share: in [0, 1]; 0 leaves the tokens of the highest entropy only.

    Returns:
        the batch with a `policy_mask`, and with weights of the entropies that make their mean over these tokens.
    """
    mask = batch.token_weights > 0
    everyones, counted = entropy, mask
    if together.count() > 1:
        everyones, counted = (together.gather_rows(t.cpu().flatten()).to(t.device) for t in (entropy, mask))
    high = mask & (entropy >= masked_quantile(everyones, counted, 1 - share))
    weights = batch.entropy_weights
    if weights is not None:
        count = together.sum_numbers({"high": float(high.sum())})["high"] if together.count() > 1 else high.sum()
        weights = weights * high * (counted.sum() / torch.as_tensor(count, device=mask.device).clamp(min=1))
    return replace(batch, policy_mask=high, entropy_weights=weights)


def masked_quantile(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """The quantile `q` of the values where `mask` is set, interpolated as by `torch.quantile`: () of the values' dtype.

    Shapes do not depend on the mask. Without any value it is NaN or infinite, so that no value reaches it.
    """
    ordered = values.masked_fill(~mask, math.inf).flatten().sort().values
    place = q * (mask.sum() - 1).clamp(min=0).float()
    below, above = (ordered.gather(0, i.long().view(1)) for i in (place.floor(), place.ceil()))
    return torch.lerp(below, above, place.frac()).squeeze(0)


class EntropyControl:
    """The weight of the entropy bonus. With `use_adaptive_entropy` it changes after each optimizer step (Skywork-OR1,
    arXiv 2505.22312, as in TRL 1.16), and then it is a part of a checkpoint.

    After a step whose mean entropy is at most `entropy_target`, the weight grows by `entropy_coef_delta`, and the next
    step has the bonus. After any other step it falls by as much, and the next step has no bonus. Nor has the first.
    """

    def __init__(self, args: GRPOConfig) -> None:
        self.args = args
        self.coef = args.entropy_coef
        self.last_entropy = math.inf  # the mean of the last step, in nats a token
        self._sums: list[dict[str, float]] = []  # of the batches of the optimizer step

    def weighted(self, batch: TrainBatch) -> TrainBatch:
        """The batch with the weights of its entropies multiplied by the weight of the bonus in this step."""
        if batch.entropy_weights is None:
            return batch
        held_back = self.args.use_adaptive_entropy and self.last_entropy > self.args.entropy_target
        coef = device.scalar(0.0 if held_back else self.coef)
        return replace(batch, entropy_weights=batch.entropy_weights * coef)

    def learned(self, parts: Sequence[dict[str, Tensor]], step_ends: bool) -> None:
        """Take note of a pass over a batch, and adapt the weight when an optimizer step ends. Where it is adaptive,
        Python waits for the device.

        Args:
            parts: what `learn` returned.
        """
        if not self.args.use_adaptive_entropy:
            return
        names = ("kept_entropy", "kept_tokens")
        sums = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts]).sum(dim=0)
        self._sums.append(dict(zip(names, sums.tolist(), strict=True)))
        if step_ends:
            totals = together.sum_numbers({name: sum(of[name] for of in self._sums) for name in names})
            self._sums = []
            if totals["kept_tokens"]:
                self.adapt(totals["kept_entropy"] / totals["kept_tokens"])

    def adapt(self, entropy: float) -> None:
        """Adapt the weight after a step with this mean entropy of a token."""
        args = self.args
        if entropy <= args.entropy_target:
            self.coef = min(self.coef + args.entropy_coef_delta, args.entropy_coef_max)
        else:
            self.coef = max(self.coef - args.entropy_coef_delta, args.entropy_coef_min)
        self.last_entropy = entropy

    def kept(self) -> tuple[float, float]:
        """The state, for `take_back`."""
        return self.coef, self.last_entropy

    def take_back(self, kept: tuple[float, float]) -> None:
        """Have the state again that `kept` returned: a step was skipped."""
        self.coef, self.last_entropy = kept

    def metrics(self) -> dict[str, float]:
        """What is logged: `entropy_coef`, where there is a bonus."""
        return {"entropy_coef": self.coef} if self.args.has_entropy_bonus else {}

    def save(self, folder: str) -> None:
        """Write the state into a checkpoint's folder, where it is adaptive."""
        if self.args.use_adaptive_entropy:
            last = None if math.isinf(self.last_entropy) else self.last_entropy
            state = {"entropy_coef": self.coef, "last_entropy": last}
            (Path(folder) / STATE_FILE).write_text(json.dumps(state) + "\n")

    def load(self, folder: str) -> None:
        """Take over the state from a checkpoint's folder, where it is adaptive.

        Raises:
            ValueError: the run that left the checkpoint had no adaptive weight.
        """
        if not self.args.use_adaptive_entropy:
            return
        file = Path(folder) / STATE_FILE
        if not file.is_file():
            raise ValueError(f"use_adaptive_entropy=True: {folder} has no {STATE_FILE}, since its run did without")
        state = json.loads(file.read_text())
        self.coef = state["entropy_coef"]
        self.last_entropy = math.inf if state["last_entropy"] is None else state["last_entropy"]
