"""A run keeps the completions it learned from and the answers of its evaluations; a resumed one has the same files."""

import math
import shutil

import pyarrow.parquet
import pytest
import torch
from runs import run
from trainers import digits_reward, ends_early, make_trainer
from transformers import TrainerCallback

from tunix_torch.rewards import find_reward


def tables(folder):
    """The content of every file of completions, by its name."""
    paths = sorted((folder / "completions").iterdir())
    return {path.name: pyarrow.parquet.read_table(path).to_pydict() for path in paths}


class SeesBatches(TrainerCallback):
    """Keeps the advantages and the rewards that each step has learned from."""

    def __init__(self):
        self.seen = {}

    def watch(self, trainer):
        update = trainer.update

        def watched(batch, *later):
            of_step = self.seen.setdefault(trainer.state.global_step + 1, [])
            width = trainer._rewards.shape[1]
            of_step += [
                (a, t, *r)
                for a, t, r in zip(
                    *map(torch.Tensor.tolist, (batch.advantages, batch.rewards)), trainer._rewards.tolist(), strict=True
                )
            ]
            assert width == len(trainer.scorer.names)
            return update(batch, *later)

        trainer.update = watched


def sometimes(prompts, completions, **columns):
    """Give a reward to every second completion only."""
    return [None if i % 2 else float(len(text)) for i, text in enumerate(completions)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"steps_per_generation": 2, "max_steps": 4},
        {"num_iterations": 2, "dynamic_sampling": True},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 4},
    ],
    ids=["plain", "accumulated", "shared", "dynamic", "shared_accumulated"],
)
def test_what_is_kept_is_what_was_learned_from(model_folder, tmp_path, settings):
    trainer = make_trainer(model_folder, tmp_path, [digits_reward, sometimes], rows=32, **settings)
    sees = SeesBatches()
    sees.watch(trainer)
    trainer.train()
    kept = tables(tmp_path)
    every = settings.get("logging_steps", 1)
    logged = [step for step in sees.seen if step % every == 0]
    assert list(kept) == [f"completions_{step:05d}.parquet" for step in logged]
    for step, table in zip(logged, kept.values(), strict=True):
        learned = sees.seen[step]
        count = 16 * settings.get("gradient_accumulation_steps", 1)
        assert len(table["step"]) == count and set(table["step"]) == {step}
        assert table["prompt_index"] == [row // 4 for row in range(count)]
        columns = table["advantage"], table["reward"], table["rewards/digits_reward"], table["rewards/sometimes"]
        for row, values in enumerate(zip(*columns, strict=True)):
            expected = learned[row]
            assert values == tuple(None if math.isnan(value) else value for value in expected)
        assert table["rewards/digits_reward"] == digits_reward(None, table["completion"]), "texts are of their rows"
        for group in range(0, count, 4):
            assert len(set(table["prompt"][group : group + 4])) == len(set(table["answer"][group : group + 4])) == 1
        assert all(0 < length <= 12 for length in table["length"])
        assert all(length == 12 for length, cut in zip(table["length"], table["clipped"], strict=True) if cut)


def test_answers_of_evaluations_are_kept(model_folder, tmp_path):
    judge = find_reward("correctness")
    trainer = make_trainer(model_folder, tmp_path, [digits_reward, ends_early], judge=judge, reward_weights=[1.0, 2.0])
    metrics = trainer.evaluate()
    (table,) = tables(tmp_path).values()
    assert table["question_index"] == list(range(8)) and set(table["step"]) == {0}
    answers = trainer.last_answers
    assert table["completion"] == [texts[0] for texts in answers.completions]
    assert table["right"] == [right[0] for right in answers.right]
    assert sum(table["reward"]) / 8 == pytest.approx(metrics["eval_reward"])
    assert sum(table["rewards/ends_early"]) / 8 == pytest.approx(metrics["eval_rewards/ends_early/mean"])
    other = [{"question": "What?", "answer": "1"}]
    trainer.evaluate({"first": other, "second": other})
    assert tables(tmp_path) == {"evaluation_00000.parquet": table}, "other questions are not mixed with the first"


def test_a_resumed_run_has_the_files_of_one_that_was_not_stopped(model_folder, tmp_path):
    """Also where a shared rollout was learned from in part, and where steps were thinned out."""
    settings = {"steps_per_generation": 2, "max_steps": 6, "save_steps": 3, "eval_on_start": True}
    run(model_folder, tmp_path / "whole", **settings)
    run(model_folder, tmp_path / "killed", **settings)
    expected = tables(tmp_path / "whole")
    assert list(expected)[-4:] == [f"evaluation_{step:05d}.parquet" for step in (0, 2, 4, 6)] and len(expected) == 10
    assert tables(tmp_path / "killed") == expected
    shutil.rmtree(tmp_path / "killed" / "checkpoint-6")
    (tmp_path / "killed" / "adapter_model.safetensors").unlink()  # it was killed after step 5
    (tmp_path / "killed" / "completions" / "completions_00006.parquet").unlink()
    run(model_folder, tmp_path / "killed", resume_from_checkpoint="latest", **settings)
    assert tables(tmp_path / "killed") == expected


def test_a_new_run_finds_no_files_of_the_earlier_one(model_folder, finished_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished_run, out)
    run(model_folder, out, max_steps=1, completions_max_mb=0)
    (earlier,) = (out / "previous").iterdir()
    assert not (out / "completions").exists() and len(tables(earlier)) == 6
