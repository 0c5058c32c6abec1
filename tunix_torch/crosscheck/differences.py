"""The three places where this library differs from Tunix 0.1.7 on purpose, and the proof that this library is right.

The proof is a recomputation in float64 by the plain Hugging Face model, which gets each row alone: without padding,
without a cache, and without any mask of this library.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from ..batch import TrainBatch, completion_lengths
from ..learn.logprobs import token_logps
from ..learn.passes import shared_prompts
from ..model.forward import base_model
from ..model.loading import load_base_model
from ..rollout.sampler import Sampler
from ..rollout.tokens import SamplingParams, draw_uniforms
from . import tunix_side
from .cases import COMPLETION_WIDTH, GROUP, NUM_PROMPTS, VOCABULARY, WINDOW, Case, make_rollout
from .compare import LOGPS, Row, largest_difference
from .ours import ALPHA, RANK, lora_of, make_trainer, saved_model
from .tunix_lora import TunixPolicy
from .tunix_models import load_tunix_model
from .tunix_side import TunixBatch


def float64_logps(model: nn.Module, batch: TrainBatch, temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probabilities of a batch's completions (B, C) in float64, 0 where masked, by unpadded rows."""
    return plain_logps(copy.deepcopy(base_model(model)).double(), batch, temperature)


@torch.no_grad()
def plain_logps(model: nn.Module, batch: TrainBatch, temperature: float = 1.0) -> torch.Tensor:
    """Return (B, C) float64: `float64_logps`, but that the model computes in the dtype of its weights up to the logits.

    Args:
        model: a Hugging Face model without a LoRA.
    """
    group = batch.completion_ids.shape[0] // batch.prompt_ids.shape[0]
    result = torch.zeros(batch.completion_ids.shape, dtype=torch.float64)
    for i, (ids, mask) in enumerate(zip(batch.completion_ids, batch.completion_mask, strict=True)):
        prompt = batch.prompt_ids[i // group][batch.prompt_mask[i // group]]
        row = torch.cat((prompt, ids[mask]))[None]
        scores = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0]
        logps = torch.log_softmax(scores[len(prompt) - 1 : -1].double() / temperature, dim=-1)
        result[i, : len(logps)] = logps.gather(-1, ids[mask][:, None])[:, 0]
    return result


def _assert_tunix_is_off(difference: float) -> float:
    """Return Tunix's difference, and fail when it has become small, since the case would then prove nothing."""
    assert difference > 100 * LOGPS, f"Tunix agrees here ({difference}): this difference is gone, take it off the list"
    return difference


def old_logps_under_temperature() -> Iterator[Row]:
    """Compare old log-probabilities under a temperature that is not 1, in a batch that is used more than once.

    Tunix divides logits by the temperature for the policy's log-probabilities, but not for the old ones. Its first
    ratio is therefore not 1.
    """
    case = Case("on purpose: temperature", {"num_iterations": 2})
    with saved_model("gemma3-1") as folder:
        trainer = make_trainer(folder, case)
        batch = trainer.make_train_batch(*make_rollout(0, empty=False))
        shapes = {name: tuple(weights.shape) for name, weights in lora_of(trainer).items()}
        tunix = TunixPolicy(folder, base_model(trainer.model).config, shapes, RANK, ALPHA)
        policy = tunix.policy(tunix.state_of({name: weights.numpy() for name, weights in lora_of(trainer).items()}))
    theirs = TunixBatch.of(batch, COMPLETION_WIDTH, VOCABULARY)
    exact = float64_logps(trainer.model, batch, trainer.args.generation_temperature)
    off = _assert_tunix_is_off(largest_difference(tunix_side.old_logps(policy, theirs), exact))
    note = f"ours against float64; Tunix's old log-probabilities forget the temperature and are {off:.2g} off"
    yield Row(case.name, "old log-probabilities", largest_difference(batch.old_per_token_logps, exact), LOGPS, note)


def end_token_that_is_padding() -> Iterator[Row]:
    """Compare masks when the padding token is also the end token: Tunix's mask, ids != pad, drops every end token."""
    with saved_model("gemma3-1") as folder:
        model = load_base_model(str(folder))
    prompts, _, _ = make_rollout(0)
    params = SamplingParams(COMPLETION_WIDTH)
    uniforms = draw_uniforms((0, 1), range(NUM_PROMPTS * GROUP), COMPLETION_WIDTH)

    def sample(end: int) -> TrainBatch:
        mask = prompts.prompt_mask
        ids = prompts.prompt_ids.masked_fill(prompts.prompt_ids == end, 3).masked_fill(~mask, end)
        rollout = Sampler(model, [end], end).sample(ids, mask, GROUP, params, uniforms)
        completions = rollout.completion_mask
        no_advantages, weights = torch.zeros(len(completions)), completions.float()
        lengths = completion_lengths(completions)
        return TrainBatch(ids, mask, rollout.completion_ids, completions, no_advantages, weights, lengths)

    free = sample(VOCABULARY - 1)
    end = int(free.completion_ids[free.completion_mask].mode().values)  # a token that occurs in the completions
    batch = sample(end)
    group_prompts = batch.prompt_ids.repeat_interleave(GROUP, dim=0).numpy()
    kept = tunix_side.padding_mask(group_prompts, batch.completion_ids.numpy(), end)
    dropped = int(_assert_tunix_is_off(float((batch.completion_mask.numpy() > kept).sum())))
    by_tunix = tunix_side.completion_mask(batch.completion_ids.numpy(), end)
    name = "on purpose: pad = EOS"
    note = (
        f"ours against Tunix's own make_completion_mask; elsewhere it takes ids != pad and drops {dropped} end tokens"
    )
    yield Row(name, "completion mask", largest_difference(batch.completion_mask, by_tunix), 0.0, note)
    with torch.no_grad():
        ours, _ = token_logps(model, shared_prompts(batch))
    difference = largest_difference(ours, float64_logps(model, batch))
    yield Row(name, "policy log-probabilities", difference, LOGPS, "ours against float64, end tokens included")


def window_beside_left_padding() -> Iterator[Row]:
    """Compare log-probabilities of Gemma 2 when its sliding window is shorter than a row.

    Tunix computes the window from positions but applies it to slots of the row, which left padding shifts.
    """
    case = Case("on purpose: Gemma 2's window")
    with saved_model("gemma2", sliding_window=WINDOW) as folder:
        trainer = make_trainer(folder, case)
        base = load_base_model(str(folder))
        batch = trainer.make_train_batch(*make_rollout(0, empty=False))
        theirs = load_tunix_model(folder, base.config)
    temperature = trainer.args.generation_temperature
    exact = float64_logps(base, batch, temperature)
    theirs = tunix_side.token_logps(theirs, TunixBatch.of(batch, COMPLETION_WIDTH, VOCABULARY), temperature)
    off = _assert_tunix_is_off(largest_difference(theirs[:, : exact.shape[1]], exact))
    note = f"ours against float64; Tunix takes positions for slots beside left padding and is {off:.2g} off"
    difference = largest_difference(batch.ref_per_token_logps, exact)
    yield Row(case.name, "reference log-probabilities", difference, LOGPS, note)


DIFFERENCES = [old_logps_under_temperature, end_token_that_is_padding, window_beside_left_padding]
