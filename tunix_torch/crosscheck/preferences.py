"""Compare the preference losses and the reverse KL of distillation with TRL's and Tunix's own functions.

Both sides get the same random log-probabilities or logits, in float32. Compared are losses, what is logged about pairs,
and gradients with respect to these inputs.
"""

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from ..learn.distillation import reverse_kl
from ..learn.preference import PairTerms, preference_terms
from .compare import Row, largest_difference

# Of losses of a few nats, and relative to the largest entry of a gradient.
LOSSES, GRADIENTS = 1e-6, 1e-5
NUM_PAIRS, WIDTH, VOCABULARY = 6, 9, 50
BETA, GAMMA = 0.3, 0.4
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def rows_of_preferences() -> Iterator[Row]:
    """Every comparison with Tunix, and with TRL where it is installed."""
    yield from _rows_of_tunix()
    if importlib.util.find_spec("trl") is not None:
        yield from _rows_of_trl()


def make_pairs(width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities by a policy, with gradient, and by a reference, and the mask of tokens: (2N, C) each."""
    random = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, width + 1, (2 * NUM_PAIRS, 1), generator=random)
    mask = torch.arange(width) < lengths
    logps, ref_logps = (-torch.rand(mask.shape, generator=random).mul(3).masked_fill(~mask, 0.0) for _ in range(2))
    return logps.requires_grad_(), ref_logps, mask


def make_scores() -> tuple[Tensor, Tensor, Tensor]:
    """Return logits by a policy, with gradient, and by a teacher, (B, C, V), and the mask of tokens (B, C)."""
    random = torch.Generator().manual_seed(12)
    scores, teacher_scores = (2 * torch.randn(NUM_PAIRS, WIDTH, VOCABULARY, generator=random) for _ in range(2))
    mask = torch.arange(WIDTH) < torch.randint(1, WIDTH + 1, (NUM_PAIRS, 1), generator=random)
    return scores.requires_grad_(), teacher_scores, mask


def _gradient_row(case: str, ours: Tensor, theirs: object) -> Row:
    size = float(torch.as_tensor(theirs).abs().max())
    difference = largest_difference(ours, theirs) / max(size, 1e-12)
    return Row(case, "gradient of the inputs", difference, GRADIENTS, "relative to its largest entry")


def _metrics(terms: PairTerms) -> dict[str, float]:
    """What is logged about pairs, under TRL's names."""
    margins = terms.chosen_rewards - terms.rejected_rewards
    columns = (terms.chosen_rewards, terms.rejected_rewards, margins, (margins > 0).float())
    columns += (terms.chosen_logps, terms.rejected_logps)
    return {name: float(column.mean()) for name, column in zip(METRICS, columns, strict=True)}


def _metrics_row(case: str, terms: PairTerms, theirs: dict[str, float]) -> Row:
    """The largest difference of any number that is logged, relative to the number where it is above 1."""
    gaps = {name: abs(value - theirs[name]) / max(1.0, abs(value)) for name, value in _metrics(terms).items()}
    worst = max(gaps, key=gaps.get)
    return Row(case, "rewards, log-probabilities", gaps[worst], LOSSES, f"worst: {worst}")


def _rewards_row(case: str, terms: PairTerms, chosen: Tensor, rejected: Tensor) -> Row:
    """The largest difference of any reward, given TRL's of the chosen and of the rejected, (N,) each."""
    ours, theirs = torch.stack((terms.chosen_rewards, terms.rejected_rewards)), torch.stack((chosen, rejected))
    return Row(case, "rewards, log-probabilities", largest_difference(ours, theirs), LOSSES)


def _own(kind: str, logps: Tensor, ref_logps: Tensor, mask: Tensor, smoothing: float = 0.0) -> tuple[PairTerms, Tensor]:
    """Our terms, and the gradient of the mean loss with respect to `logps`."""
    reference = ref_logps if kind in ("dpo", "ipo") else None
    terms = preference_terms(kind, logps, reference, mask, beta=BETA, gamma=GAMMA, label_smoothing=smoothing)
    return terms, torch.autograd.grad(terms.loss.mean(), logps)[0] * mask


def _rows_of_trl() -> Iterator[Row]:
    from . import trl_preferences as trl

    logps, ref_logps, mask = make_pairs()
    means = logps.sum(dim=1) / mask.sum(dim=1)  # (2N,)
    for kind in ("dpo", "ipo"):
        terms, gradient = _own(kind, logps, ref_logps, mask)
        loss, metrics = trl.dpo_trainer_loss(kind, logps, ref_logps, mask, BETA)
        yield Row(f"TRL, {kind}", "loss", abs(float(terms.loss.mean()) - float(loss)), LOSSES)
        yield _gradient_row(f"TRL, {kind}", gradient, torch.autograd.grad(loss, logps)[0] * mask)
        yield _metrics_row(f"TRL, {kind}", terms, metrics)
    for smoothing in (0.0, 0.1):
        case = "TRL, simpo" + (f", label smoothing {smoothing}" if smoothing else "")
        terms, gradient = _own("simpo", logps, ref_logps, mask, smoothing)
        losses, chosen, rejected = trl.simpo_losses(means[::2], means[1::2], BETA, GAMMA, smoothing)
        yield Row(case, "loss", largest_difference(terms.loss.detach(), losses.detach()), LOSSES)
        yield _gradient_row(case, gradient, torch.autograd.grad(losses.mean(), logps, retain_graph=True)[0] * mask)
        yield _rewards_row(case, terms, chosen, rejected)
    terms, gradient = _own("orpo", logps, ref_logps, mask)
    losses, chosen, rejected = trl.odds_ratio_losses(means[::2], means[1::2], BETA)
    losses = losses - means[::2]  # TRL averages the likelihood over all tokens, of prompts too; the paper over a row's
    yield Row("TRL, orpo", "loss", largest_difference(terms.loss.detach(), losses.detach()), LOSSES)
    yield _gradient_row("TRL, orpo", gradient, torch.autograd.grad(losses.mean(), logps)[0] * mask)
    yield _rewards_row("TRL, orpo", terms, chosen, rejected)

    scores, teacher_scores, mask = make_scores()
    for temperature in (1.0, 0.7):
        case = f"TRL, reverse KL, temperature {temperature}"
        given = (scores, teacher_scores, mask, temperature)
        ours, theirs = _reverse_kl(*given), trl.sum_of_reverse_kl(*given)
        yield Row(case, "loss", abs(float(ours) - float(theirs)) / float(mask.sum()), LOSSES, "a token")
        yield _gradient_row(case, torch.autograd.grad(ours, scores)[0], torch.autograd.grad(theirs, scores)[0])


def _reverse_kl(scores: Tensor, teacher_scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Our reverse KL, summed over the tokens of the mask."""
    kl = reverse_kl(*(torch.log_softmax(s / temperature, dim=-1) for s in (scores, teacher_scores)))
    return kl[mask].sum()


def _rows_of_tunix() -> Iterator[Row]:
    from . import tunix_preferences as tunix

    # Tunix takes the odds of sums of log-probabilities, the paper and TRL those of means. Of one token both are one.
    for kind, width in (("dpo", WIDTH), ("orpo", 1)):
        logps, ref_logps, mask = make_pairs(width)
        for smoothing in (0.0, 0.1):
            case = f"Tunix, {kind}" + (f", label smoothing {smoothing}" if smoothing else "")
            terms, gradient = _own(kind, logps, ref_logps, mask, smoothing)
            reference = ref_logps.numpy() if kind == "dpo" else None
            given = (logps.detach().numpy(), reference, mask.numpy())
            loss, their_gradient, metrics = tunix.dpo_loss(kind, *given, BETA, smoothing)
            yield Row(case, "loss", abs(float(terms.loss.mean()) - loss), LOSSES)
            yield _gradient_row(case, gradient, their_gradient)
            names = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy")
            names += ("log_probs/chosen", "log_probs/rejected")
            metrics = {ours: metrics[theirs] for ours, theirs in zip(METRICS, names, strict=True)}
            yield _metrics_row(case, terms, metrics)

    scores, teacher_scores, mask = make_scores()
    for temperature in (1.0, 0.7):
        case = f"Tunix, reverse KL, temperature {temperature}"
        ours = _reverse_kl(scores, teacher_scores, torch.ones_like(mask), temperature) / mask.numel()
        flat = (scores.detach().flatten(0, 1).numpy(), teacher_scores.flatten(0, 1).numpy())
        theirs, their_gradient = tunix.mean_of_reverse_kl(*flat, temperature)
        yield Row(case, "loss", abs(float(ours) - theirs), LOSSES)
        yield _gradient_row(case, torch.autograd.grad(ours, scores)[0].flatten(0, 1), their_gradient)
