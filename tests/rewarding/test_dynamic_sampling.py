"""Dynamic sampling fills a batch with groups whose rewards differ, counts what it cost, and resumes exactly."""

import numpy as np
import pytest
import torch
from trainers import digits_reward, first_batch, lora_weights, make_trainer

from tunix_torch.batch import PromptBatch, Rollout
from tunix_torch.model import tiny
from tunix_torch.rewarding.dynamic import draw_rows, has_signal, replace_equal_groups
from tunix_torch.rewarding.scored import ScoredRollout
from tunix_torch.run.callbacks import MetricsFile
from tunix_torch.runtime import together

GROUPS, SIZE = 5, 3
EOS = [-9]


def make_round(number, useful, width=4):
    """A round whose tensors say where they come from: completion r of round n begins with the token 100 * n + r."""
    rows = GROUPS * SIZE
    ids = torch.zeros(rows, 6, dtype=torch.int64)
    ids[:, 0] = 100 * number + torch.arange(rows)
    mask = torch.arange(6) <= torch.arange(rows)[:, None] % 4
    totals = torch.full((rows,), 0.1 + 0.2, dtype=torch.float64)
    totals[::SIZE] = 0.3  # equal but for rounding
    for group in useful:
        totals[group * SIZE] = 1.0
    prompt_ids = 100 * number + torch.arange(GROUPS)[:, None].expand(GROUPS, width)
    prompts = PromptBatch(prompt_ids, prompt_ids >= 0, [{"row": (number, group)} for group in range(GROUPS)])
    rollout = Rollout(ids, mask, -ids.float() * mask)
    texts = [str(int(first)) for first in ids[:, 0]]
    return ScoredRollout(prompts, rollout, ids, mask, texts, totals[:, None] * 2, totals, 1.0)


class Args:
    device = torch.device("cpu")

    def __init__(self, max_sampling_rounds, objective="sum_then_normalize", masked=False):
        self.max_sampling_rounds = max_sampling_rounds
        self.multi_objective_aggregation, self.mask_truncated_completions = objective, masked


def test_what_is_learned_from_decides_which_groups_have_a_signal():
    scored = make_round(0, [2], width=4)
    assert has_signal(scored, Args(1), EOS) == [False, False, True, False, False]
    scored.rewards[:] = torch.tensor([[1.0]])
    scored.rewards[3 * SIZE, 0] = 0.0  # totals of other functions may make up for it
    assert has_signal(scored, Args(1, "normalize_then_sum"), EOS) == [False, False, False, True, False]
    assert has_signal(scored, Args(1, masked=True), [-9]) == [False] * GROUPS, "none has ended, so none is learned from"
    ended = scored.ids[2 * SIZE, 0].item()  # the one whose reward differs
    assert has_signal(scored, Args(1, masked=True), [ended]) == [False, False, True, False, False]


@pytest.mark.parametrize("most", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "useful", [[[0, 1, 2, 3, 4]], [[1], [0, 4], [], [2, 3, 4]], [[], [], [], [], [], [], [], [], []]]
)
def test_groups_with_equal_rewards_give_way_in_order(most, useful):
    rounds = [make_round(n, groups, width=4 + n) for n, groups in enumerate(useful)]
    left = iter(rounds[1:])
    drawn = []

    def sample(prompts):
        drawn.append(prompts)
        return next(left), None

    found = replace_equal_groups(rounds[0], lambda count: rounds[0].prompts, sample, Args(most), -1, EOS)

    places = {group: (0, group) for group in range(GROUPS)}  # recomputed: the group of which round has which place
    empty = [group for group in range(GROUPS) if group not in useful[0]]
    num_rounds = 1
    while empty and num_rounds < most:
        for group in useful[num_rounds]:
            if empty:
                places[empty.pop(0)] = (num_rounds, group)
        num_rounds += 1
    assert [row["row"] for row in found.prompts.rows] == list(places.values())
    firsts = [100 * n + group * SIZE + i for n, group in places.values() for i in range(SIZE)]
    assert found.ids[:, 0].tolist() == found.rollout.completion_ids[:, 0].tolist() == firsts
    assert found.texts == [str(first) for first in firsts]
    assert found.prompts.prompt_ids[:, -1].tolist() == [100 * n + group for n, group in places.values()]
    for ids, mask, (n, _) in zip(found.prompts.prompt_ids, found.prompts.prompt_mask, places.values(), strict=True):
        assert mask.sum() == 4 + n and (ids[~mask] == -1).all(), "a prompt keeps its own tokens"
    lengths = [first % 100 % 4 + 1 for first in firsts]
    assert found.mask.sum(1).tolist() == found.rollout.completion_mask.sum(1).tolist() == lengths
    torch.testing.assert_close(found.rollout.sampler_logps, -found.ids.float() * found.mask)
    assert torch.equal(found.rewards[:, 0], 2 * found.totals)
    tokens = sum(int(scored.mask.sum()) for scored in rounds[:num_rounds])
    assert found.costs == {
        "dynamic_sampling/rounds": num_rounds,
        "dynamic_sampling/groups_sampled": num_rounds * GROUPS,
        "dynamic_sampling/share_kept": (GROUPS - len(empty)) / (num_rounds * GROUPS),
        "dynamic_sampling/sampled_tokens": tokens,
    }
    assert found.seconds == num_rounds == len(drawn) + 1


def test_a_process_goes_on_while_another_one_has_places_left(monkeypatch):
    rounds = [make_round(n, range(GROUPS)) for n in range(3)]
    left, more = iter(rounds[1:]), iter([True, True, False])
    monkeypatch.setattr(together, "anyone", lambda told: next(more))
    found = replace_equal_groups(
        rounds[0], lambda count: rounds[0].prompts, lambda p: (next(left), None), Args(9), -1, EOS
    )
    assert found.costs["dynamic_sampling/rounds"] == 3
    assert torch.equal(found.ids, rounds[0].ids), "a full batch stays as it is"


def test_rows_are_drawn_by_their_key_and_shared_among_processes(monkeypatch):
    alone = draw_rows(10, 8, (0, 1, 16))
    assert alone == draw_rows(10, 8, (0, 1, 16)) != draw_rows(10, 8, (0, 1, 32))
    assert len(set(alone)) == 8 and set(alone) <= set(range(10))
    assert sorted(draw_rows(3, 6, (0, 1, 16))) == [0, 0, 1, 1, 2, 2], "all rows once before one comes again"
    monkeypatch.setattr(together, "count", lambda: 2)
    shares = []
    for process in (0, 1):
        monkeypatch.setattr(together, "index", lambda process=process: process)
        shares += draw_rows(10, 4, (0, 1, 16))
    assert shares == alone


def only_even(prompts, completions, answer, **columns):
    """Rewards of a group differ where its answer is even."""
    values = digits_reward(prompts, completions)
    return [
        value + 1e-3 * i if int(a) % 2 == 0 else 0.0 for i, (value, a) in enumerate(zip(values, answer, strict=True))
    ]


def test_a_batch_is_filled_with_groups_that_teach(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, only_even, dynamic_sampling=True, max_sampling_rounds=9)
    batch = first_batch(trainer)
    assert batch.advantages.view(4, 4).ne(0).any(dim=1).all()
    trainer.train()  # in which the trainer checks that sampler and learner agree on every row
    for row in trainer.state.log_history[:-1]:
        assert row["frac_reward_zero_std"] == 0
        assert row["dynamic_sampling/groups_sampled"] == 4 * row["dynamic_sampling/rounds"]
        assert row["dynamic_sampling/share_kept"] == pytest.approx(1 / row["dynamic_sampling/rounds"])
    assert max(row["dynamic_sampling/rounds"] for row in trainer.state.log_history[:-1]) > 1


def test_at_the_bound_equal_groups_stay_and_give_no_gradient(model_folder, tmp_path):
    calls = []

    def all_equal(prompts, completions, **columns):
        calls.append(len(completions))
        return [0.5] * len(completions)

    trainer = make_trainer(model_folder, tmp_path, all_equal, dynamic_sampling=True, max_sampling_rounds=3, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert calls == [16] * 3, "every round has the whole batch's shape"
    assert (log["dynamic_sampling/rounds"], log["dynamic_sampling/share_kept"], log["pg_loss"]) == (3, 0, 0)


def test_where_all_rewards_differ_nothing_changes(model_folder, tmp_path):
    def differ(prompts, completions, **columns):
        return list(np.arange(len(completions)) / 7)

    weights = []
    for dynamic in (False, True):
        trainer = make_trainer(model_folder, tmp_path / str(dynamic), differ, dynamic_sampling=dynamic)
        trainer.train()
        weights.append(lora_weights(trainer))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 3}, {"gradient_accumulation_steps": 2}])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(model_folder, tmp_path, settings):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "dynamic_sampling": True} | settings
    whole = make_trainer(model_folder, tmp_path / "whole", only_even, callbacks=[MetricsFile()], **settings)
    whole.train()
    resumed = make_trainer(model_folder, tmp_path / "resumed", only_even, callbacks=[MetricsFile()], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = lora_weights(whole)
    for name, weights in lora_weights(resumed).items():
        assert torch.equal(weights, expected[name]), name
    name = "dynamic_sampling/sampled_tokens"
    rows = [[r[name] for r in t.state.log_history if r["step"] > 2 and name in r] for t in (whole, resumed)]
    assert rows[0] == rows[1] and rows[0]


def test_what_can_not_be_replaced_is_refused(model_folder, tmp_path):
    import datasets

    from tunix_torch import GRPOConfig, TunixTrainer

    for settings, message in [
        ({"max_sampling_rounds": 0}, "max_sampling_rounds=0: must be at least 1"),
        ({"dynamic_sampling": True, "use_grpo": False}, "dynamic_sampling=True: is about rollouts"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(model_folder, tmp_path, **settings)
    stream = datasets.Dataset.from_list(tiny.arithmetic_rows("train", 8)).to_iterable_dataset()
    args = GRPOConfig(output_dir=str(tmp_path), dynamic_sampling=True, max_steps=2, report_to="none")
    with pytest.raises(ValueError, match="dynamic_sampling=True: draws further rows by their numbers"):
        TunixTrainer(model_folder, digits_reward, args, stream)
