"""Settings that a job takes where it is not told otherwise, as differences from the defaults of the dataclasses.

The defaults themselves stand once, in `GRPOConfig`, `ModelConfig` and `DataConfig`. `conf/` and `config_example.json`
are written from both by `python -m tunix_torch.compat.generate`.
"""

from collections.abc import Mapping
from typing import Any

from .model import TINY_NAME

# Settings of every job that a command starts, whatever its model. `transformers.TrainingArguments` has False here.
JOB: dict[str, Any] = {"eval_on_start": True}

# The job that the tiny model is made for.
TINY: dict[str, Any] = {
    "system_message": "",
    "max_prompt_length": 40,
    "generation_max_length": 48,
    "generation_temperature": 1.0,
    "generation_top_p": 1.0,
    "generation_top_k": 0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 256,
    "num_eval_completions": 8,
    "micro_batch_size": 0,
    "learning_rate": 2e-3,
    "warmup_steps": 0.05,
    "kl_penalty_coef": 0.0,
    "max_steps": 280,
    "stop_check_interval": 4,
    "eval_steps": 70,
    "save_steps": 70,
}

# agent-tunix's settings for any other model, which `GRPOTrainingConfig` and so run_training.py take.
AGENT_TUNIX: dict[str, Any] = {
    "learning_rate": 3e-6,
    "warmup_steps": 0.1,
    "max_grad_norm": 0.1,
    "lr_scheduler_type": "cosine",
    "kl_penalty_coef": 0.08,
    "generation_max_length": 512,
    "generation_temperature": 0.9,
    "generation_top_p": 1.0,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
}

# For these settings agent-tunix's value is the default of `GRPOConfig`, so they need no difference.
AGENT_TUNIX_AGREES = (
    "num_completions_per_prompt",
    "num_iterations",
    "epsilon",
    "max_prompt_length",
    "generation_top_k",
)

# agent-tunix's LoRA on the Gemma 3 models that it names by their size.
AGENT_TUNIX_MODEL: dict[str, Any] = {"lora_rank": 32, "lora_alpha": 32.0}


def defaults_in_force(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a job takes in place of the defaults of the dataclasses: `train.py --help` shows these for its model.

    Args:
        settings: those of a run, as its config file has them. Without a `model_name` a script has made the trainer,
            and the defaults of the dataclasses were in force.
    """
    if "model_name" not in settings:
        return {}
    return JOB | (TINY if settings["model_name"] == TINY_NAME else {})


def whose_defaults(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Whose defaults `defaults_in_force` completes: the name of a program or class, and for which model, or ""."""
    if "model_name" not in settings:
        return "GRPOConfig", ""
    return "train.py", " for the tiny model" if settings["model_name"] == TINY_NAME else ""
