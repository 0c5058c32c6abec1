"""Accuracy at equal numbers of sampled tokens, with dynamic sampling and without, on the library's default job.

python -m benchmarks.dynamic_sampling                                   # three seeds
python -m benchmarks.dynamic_sampling --seeds 42 --tokens 20000 --json FILE

A run samples until it has used up its tokens, whatever steps that makes. Rounds whose groups are dropped count in full.
The learning rate is constant, so that a run does not depend on how many steps it will have taken; it and the number of
prompts are lower than the default job's.
"""

import tunix_torch  # noqa: F401  # first: it decides for or against XLA

# isort: split

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers

import utils
from tunix_torch.config.flags import parse_job
from tunix_torch.run.setup import build_trainer

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the tokens, at which accuracies are compared


@dataclass
class Run(transformers.TrainerCallback):
    """One run: the held-out accuracy after so many sampled tokens, and what the steps learned from."""

    seed: int
    dynamic: bool
    budget: int
    rows: int  # completions of a rollout batch
    tokens: float = 0.0
    steps: int = 0
    points: list[tuple[float, float]] = field(default_factory=list)  # (sampled tokens, accuracy)
    equal: list[float] = field(default_factory=list)  # of each step, the share of groups with equal rewards
    rounds: list[float] = field(default_factory=list)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "reward" in logs:
            learned = logs["completions/mean_length"] * self.rows
            self.tokens += logs.get("dynamic_sampling/sampled_tokens", learned)
            self.equal.append(logs["frac_reward_zero_std"])
            self.rounds.append(logs.get("dynamic_sampling/rounds", 1.0))
            self.steps = state.global_step
            control.should_training_stop = self.tokens >= self.budget
        if "eval_accuracy" in logs:
            self.points.append((self.tokens, logs["eval_accuracy"]))

    def accuracy_at(self, tokens: float) -> float:
        """The accuracy after so many sampled tokens, on a straight line between the evaluations before and after."""
        return float(np.interp(tokens, *zip(*self.points, strict=True)))


def run(seed: int, dynamic: bool, args: argparse.Namespace) -> Run:
    """Train with the settings of the default job, but with a constant learning rate, until the tokens are used up."""
    flags = (
        f"--use_grpo --seed {seed} --max_steps 10000 --lr_scheduler_type constant --learning_rate {args.learning_rate}"
    )
    flags += f" --per_device_train_batch_size {args.prompts} --num_generations {args.completions} --report_to none"
    flags += f" --eval_on_start true --eval_steps {args.eval_every} --num_eval_rows {args.questions}"
    flags += f" --num_eval_completions 0 --save_strategy no --disable_tqdm true --dynamic_sampling {dynamic}"
    flags += f" --max_sampling_rounds {args.rounds}"
    with tempfile.TemporaryDirectory() as folder:
        configs = parse_job([*flags.split(), "--output_dir", folder])
        result = Run(seed, dynamic, args.tokens, args.prompts * args.completions)
        trainer = build_trainer(*configs, [result])
        trainer.train()
        if result.points[-1][0] < result.tokens:  # the last step was not evaluated
            trainer.evaluate()
    return result


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(runs: list[Run], budget: int) -> str:
    """Accuracies at each share of the tokens, and what the steps were like, as a table of Markdown."""
    shares = " | ".join(f"{share * budget:,.0f} tokens" for share in SHARES)
    lines = [f"| seed | dynamic sampling | {shares} | steps | rounds a step | equal groups learned from |"]
    lines += ["|" + "---|" * (len(SHARES) + 5)]
    for dynamic in (False, True):
        chosen = [r for r in runs if r.dynamic == dynamic]
        word = "yes" if dynamic else "no"
        rows = [(str(r.seed), [r]) for r in chosen] + [("mean", chosen)]
        for name, group in rows:
            accuracies = [mean([r.accuracy_at(share * budget) for r in group]) for share in SHARES]
            cells = [name, word, *(f"{a:.1%}" for a in accuracies), f"{mean([r.steps for r in group]):.1f}"]
            cells += [f"{mean([mean(r.rounds) for r in group]):.2f}", f"{mean([mean(r.equal) for r in group]):.0%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dynamic_sampling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: utils.fail(message)
    parser.add_argument("--seeds", default="42,1,2", help="a run of each kind for each")
    parser.add_argument("--tokens", type=int, default=50_000, help="sampled tokens of a run")
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step")
    parser.add_argument("--completions", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--rounds", type=int, default=4, help="max_sampling_rounds")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="constant")
    parser.add_argument("--questions", type=int, default=256, help="held-out questions")
    parser.add_argument("--eval_every", type=int, default=2, help="steps from one evaluation to the next")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    runs = []
    for seed in map(int, args.seeds.split(",")):
        for dynamic in (False, True):
            runs.append(run(seed, dynamic, args))
            print(asdict(runs[-1]), flush=True)
    print(f"\n{table(runs, args.tokens)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in runs], indent=1) + "\n")


if __name__ == "__main__":
    main()
