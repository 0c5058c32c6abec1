"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups with equal rewards give way to freshly sampled ones.

Where all rewards of a group are equal, its advantages are 0 and it teaches nothing. Such a group is replaced by one of
another prompt, if that one has different rewards. Each round samples and scores a whole batch, so that all rounds have
one shape. When the last round still leaves places, the groups with equal rewards stay there. What a round has beyond
the places is dropped: nothing is carried over to the next step, which a resumed run would have to know.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import PromptBatch, Rollout
from ..config.grpo import GRPOConfig
from ..data.batches import join_prompts
from ..learn.equal_rewards import all_equal
from ..runtime import together
from .context import means
from .scored import ScoredRollout

_STREAM = 1  # tells these random numbers from those of `draw_uniforms`, whose seeds have one number less


def draw_rows(num_rows: int, count: int, key: Sequence[int]) -> list[int]:
    """The numbers of `count` rows for each process, drawn from all `num_rows`: this process's share of them.

    No row comes twice before every row has come once. The numbers depend on nothing but the arguments.
    """
    first, _ = together.own_share(count)
    order = np.random.Generator(np.random.Philox([*key, _STREAM])).permutation(num_rows)
    return [int(order[i % num_rows]) for i in range(first, first + count)]


def replace_equal_groups(
    scored: ScoredRollout,
    draw: Callable[[int], PromptBatch],
    sample: Callable[[PromptBatch], tuple[ScoredRollout, Any]],
    args: GRPOConfig,
    pad_token_id: int,
    eos_ids: Sequence[int],
) -> ScoredRollout:
    """Replace the groups that have equal rewards, until there are none or `max_sampling_rounds` rounds were sampled.

    All processes go on until each has filled its own batch, so all of them sample equally often.

    Args:
        scored: the first round, of the step's own prompts. A group that stays has the place that it has here.
        draw: draws so many other prompts.
        sample: samples and scores completions of prompts, and may return something else with them.

    Returns:
        the batch, on the device, with `seconds` summed over the rounds. Its `costs`, over all processes, are `rounds`,
        `groups_sampled`, `share_kept` (the groups of the batch whose rewards differ, as a share of those that were
        sampled) and `sampled_tokens`. Their names begin with `dynamic_sampling/`.
    """
    scored, num_groups = scored.in_memory(), len(scored.prompts.rows)
    signal, rounds, tokens, seconds = has_signal(scored, args, eos_ids), 1, int(scored.mask.sum()), scored.seconds
    logged = [{name: [value] for name, value in scored.logged.items()}]  # by the reward functions, in each round
    while rounds < args.max_sampling_rounds and together.anyone(not all(signal)):
        others = sample(draw(num_groups).to(args.device))[0].in_memory()
        logged.append({name: [value] for name, value in others.logged.items()})
        rounds, tokens, seconds = rounds + 1, tokens + int(others.mask.sum()), seconds + others.seconds
        useful = [num_groups + i for i, has in enumerate(has_signal(others, args, eos_ids)) if has]
        groups = [i if has or not useful else useful.pop(0) for i, has in enumerate(signal)]
        scored = choose_groups(scored, others, groups, pad_token_id)
        signal = [has or group >= num_groups for has, group in zip(signal, groups, strict=True)]
    costs = {"groups_sampled": rounds * num_groups, "share_kept": sum(signal), "sampled_tokens": tokens}
    costs = together.sum_numbers(costs)
    costs |= {"rounds": rounds, "share_kept": costs["share_kept"] / costs["groups_sampled"]}
    costs = {f"dynamic_sampling/{name}": float(value) for name, value in costs.items()}
    return replace(scored, seconds=seconds, costs=costs, logged=means(logged)).on(args.device)


def has_signal(scored: ScoredRollout, args: GRPOConfig, eos_ids: Sequence[int]) -> list[bool]:
    """For each group whether something is learned from it: its rewards differ, and not by rounding only.

    That means the totals, or with "normalize_then_sum" the rewards of a function. With `mask_truncated_completions` a
    completion without an end token carries no loss, so one that has ended must differ from the others.
    """
    num_groups = len(scored.prompts.rows)
    values = scored.rewards if args.multi_objective_aggregation == "normalize_then_sum" else scored.totals[:, None]
    grouped = values.view(num_groups, -1, values.shape[1])  # (N, G, R)
    differs = ~all_equal(grouped)  # (N, 1, R)
    if not args.mask_truncated_completions:
        return differs.flatten(1).any(dim=1).tolist()
    ended = (torch.isin(scored.ids, torch.tensor(eos_ids)) & scored.mask).any(dim=1).view(num_groups, -1, 1)
    off = (grouped - grouped.nanmean(dim=1, keepdim=True)).nan_to_num(0.0) != 0
    return (differs & off & ended).flatten(1).any(dim=1).tolist()


def choose_groups(
    first: ScoredRollout, second: ScoredRollout, groups: Sequence[int], pad_token_id: int
) -> ScoredRollout:
    """The groups that have these numbers among those of the first rollout and then those of the second.

    All tensors lie in main memory. Prompts are padded to the width of the wider rollout.
    """
    num_groups, num_rows = len(first.prompts.rows), len(first.ids)
    size = num_rows // num_groups
    rows = (torch.tensor(groups)[:, None] * size + torch.arange(size)).flatten()  # (B,)
    joined = join_prompts([first.prompts, second.prompts], pad_token_id)
    prompts = PromptBatch(
        joined.prompt_ids[torch.tensor(groups)],
        joined.prompt_mask[torch.tensor(groups)],
        [joined.rows[group] for group in groups],
    )

    def of_rows(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))[rows]

    both = (first, second)
    ids, mask, rewards, totals = (
        of_rows([getattr(scored, name) for scored in both]) for name in ("ids", "mask", "rewards", "totals")
    )
    logps = of_rows([scored.rollout.sampler_logps for scored in both])
    texts = [(first.texts + second.texts)[row] for row in rows.tolist()]
    return ScoredRollout(prompts, Rollout(ids, mask, logps), ids, mask, texts, rewards, totals, first.seconds)
