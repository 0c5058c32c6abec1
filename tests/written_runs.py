"""Folders of runs written by a test, with the numbers that it wants: metrics, settings, completions, answers."""

import json
import math
import random

import pyarrow
import pyarrow.parquet


def healthy_rows(steps=60, evaluated_every=20, questions=256, seed=0):
    """The metrics of a run that learns: accuracy from 50% to 80%, with the noise of small batches."""
    draw, rows = random.Random(seed), []

    def evaluation(step):
        share = 0.5 + 0.3 * step / steps
        half = 1.96 * math.sqrt(share * (1 - share) / questions)
        rows.append(
            {
                "step": step,
                "eval_accuracy": share,
                "eval_interval/accuracy_low": share - half,
                "eval_interval/accuracy_high": share + half,
                "eval_mean@8": share - 0.1,
                "eval_interval/mean@8_low": share - 0.13,
                "eval_interval/mean@8_high": share - 0.07,
                "eval_reward": 0.9 + share,
                "eval_mean_length": 22.0,
                "eval_runtime": 1.0,
            }
        )

    evaluation(0)
    for step in range(1, steps + 1):
        done = step / steps
        right = min(1.0, max(0.0, 0.4 + 0.35 * done + draw.gauss(0, 0.05)))
        layout = min(1.0, 0.9 + 0.1 * done + draw.gauss(0, 0.01))
        length = 22 + draw.gauss(0, 1)
        rows.append(
            {
                "step": step,
                "loss": draw.gauss(0, 0.01),
                "grad_norm": abs(draw.gauss(0.5, 0.1)),
                "learning_rate": 2e-3 * (1 - done),
                "reward": right + layout,
                "reward_std": 0.4,
                "frac_reward_zero_std": min(1.0, max(0.0, 0.3 + 0.2 * done + draw.gauss(0, 0.05))),
                "rewards/correctness_reward/mean": right,
                "rewards/format_reward/mean": layout,
                "completions/mean_length": length,
                "completions/min_length": length - 10,
                "completions/max_length": length + 14,
                "completions/clipped_ratio": abs(draw.gauss(0.01, 0.005)),
                "kl": 0.06 * done + abs(draw.gauss(0.005, 0.002)),
                "entropy": 0.4 - 0.3 * done,
                "clip_ratio/region_mean": 0.02 + abs(draw.gauss(0, 0.004)),
                "clip_ratio/low_mean": 0.01,
                "clip_ratio/high_mean": 0.01,
                "rollout_tokens_per_second": draw.gauss(9000, 300),
                "learning_tokens_per_second": draw.gauss(21000, 500),
                "rollout_seconds": draw.gauss(0.5, 0.03),
                "scoring_seconds": 0.01,
                "reference_seconds": 0.05,
                "learning_seconds": draw.gauss(0.3, 0.02),
                "step_seconds": 1.0,
            }
        )
        if step % evaluated_every == 0:
            evaluation(step)
    rows.append({"step": steps, "train_runtime": 61.0, "train_loss": 0.0})
    return rows


def with_values(rows, **functions):
    """Rows in which the numbers under some keys (`__` for `/`) are those of a function of the share of steps done."""
    last = max(row["step"] for row in rows)
    changed = []
    for row in rows:
        new = {key.replace("__", "/"): f(row["step"] / last) for key, f in functions.items()}
        changed.append(row | {key: value for key, value in new.items() if key in row})
    return changed


def write_run(folder, rows, settings=None, completions=(), answers=(), starts=()):
    """Write a run's folder. Completions and answers are rows of the Parquet files, in one file a step each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if settings is not None:
        (folder / "config.json").write_text(json.dumps({"learning_rate": 2e-3} | settings))
    if starts:
        (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    for kind, rows_of_kind in (("completions", completions), ("evaluation", answers)):
        for step in sorted({row["step"] for row in rows_of_kind}):
            (folder / "completions").mkdir(exist_ok=True)
            of_step = [row for row in rows_of_kind if row["step"] == step]
            path = folder / "completions" / f"{kind}_{step:05d}.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(of_step), path)
    return folder


def completion(step, number=0, text="<answer>4</answer>", right=1.0, prompt="What is 2 + 2?", answer="4"):
    """A row of a file of completions of a training step."""
    return {
        "step": step,
        "prompt_index": number,
        "prompt": prompt,
        "answer": answer,
        "completion": text,
        "rewards/correctness_reward": right,
        "rewards/format_reward": 1.0,
        "reward": right + 1.0,
        "advantage": right - 0.5,
        "length": len(text) // 4 + 1,
        "clipped": False,
    }


def answered(step, number=0, text="<answer>4</answer>", right=True, question="What is 2 + 2?", answer="4"):
    """A row of a file of answers at an evaluation."""
    return {
        "step": step,
        "question_index": number,
        "question": question,
        "answer": answer,
        "completion": text,
        "right": right,
        "rewards/correctness_reward": float(right),
        "rewards/format_reward": 1.0,
        "reward": float(right) + 1.0,
        "length": len(text) // 4 + 1,
    }
