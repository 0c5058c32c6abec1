"""Four short examples, each under a minute: python example_usage.py 1|2|3|4

1  supervised fine-tuning
2  a custom configuration, saved to a file and read again
3  GRPO
4  GRPO with a reward function of one's own
"""

import sys
import tempfile
from pathlib import Path

import utils
from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.cli.script import quiet_transformers, run_script
from tunix_torch.config import recipes
from tunix_torch.model import tiny
from tunix_torch.rewards import correctness_reward, format_reward
from tunix_torch.run.terminal import show_progress

SHORT = {**recipes.TINY, "max_steps": 5, "per_device_train_batch_size": 8, "save_strategy": "no", "eval_steps": 5}
SHORT = {k: v for k, v in SHORT.items() if k not in ("num_eval_completions", "save_steps")}


def run(args: GRPOConfig, *reward_funcs) -> TunixTrainer:
    """Train the tiny model for a few steps on generated arithmetic."""
    trainer = TunixTrainer(
        "tiny",
        reward_funcs=list(reward_funcs) or [correctness_reward],
        args=args,
        train_dataset=tiny.arithmetic_rows("train", 256),
        eval_dataset=tiny.arithmetic_rows("test", 64),
    )
    show_progress(trainer)
    trainer.train()
    return trainer


def supervised() -> None:
    run(GRPOConfig(**SHORT, use_grpo=False, output_dir=tempfile.mkdtemp()))


def custom_configuration() -> None:
    path = Path(tempfile.mkdtemp()) / "config.json"
    utils.save_config({**SHORT, "algorithm": "dr_grpo", "num_generations": 8, "kl_penalty_coef": 0.02}, path)
    args = GRPOConfig(**utils.load_config(path), output_dir=str(path.parent))
    print(f"{args.algorithm}: {args.num_completions_per_prompt} completions, {args.aggregation}, KL {args.beta}")
    run(args, correctness_reward)


def grpo() -> None:
    args = GRPOConfig(**SHORT, num_completions_per_prompt=4, output_dir=tempfile.mkdtemp())
    run(args, correctness_reward, format_reward)


def own_reward() -> None:
    def brevity_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        """1 for an empty completion, 0 for 100 characters and more."""
        return [max(0.0, 1 - len(completion) / 100) for completion in completions]

    args = GRPOConfig(**SHORT, reward_weights=[1.0, 0.2], output_dir=tempfile.mkdtemp())
    run(args, correctness_reward, brevity_reward)


EXAMPLES = {"1": supervised, "2": custom_configuration, "3": grpo, "4": own_reward}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in EXAMPLES:
        raise ValueError(f"usage: python example_usage.py {'|'.join(EXAMPLES)}")
    quiet_transformers()
    EXAMPLES[sys.argv[1]]()


if __name__ == "__main__":
    run_script(main)
