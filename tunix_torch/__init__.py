"""Tunix-Torch: GRPO post-training of Gemma in PyTorch, on TPU through torch-xla, on CUDA and on the CPU.

Importing it decides for or against XLA (see `runtime/choice.py`) and loads nothing else; each name below is loaded when
it is first used.
"""

import contextlib
import importlib
from typing import Any

from .public import public_names
from .runtime.choice import choose

_HOMES = {
    "AlgorithmConfig": "compat.agent_tunix",
    "Answers": "evals.answers",
    "DataConfig": "config.data",
    "EvaluationConfig": "compat.agent_tunix",
    "GRPOConfig": "config.grpo",
    "GRPOTrainingConfig": "compat.agent_tunix",
    "GenerationConfig": "compat.agent_tunix",
    "ModelConfig": "config.model",
    "OptimizerConfig": "compat.agent_tunix",
    "Sampler": "rollout.sampler",
    "SamplingParams": "rollout.tokens",
    "TrainingConfig": "compat.agent_tunix",
    "TunixTrainer": "trainer",
    "load_model": "model.loading",
    "load_tokenizer": "model.loading",
    "train": "run.job",
}
__all__, _load = public_names(__name__, _HOMES)

# Where TUNIX_DEVICE asks for what can't be had, a command's `--device` may still say otherwise: the error is raised by
# `runtime/device.py`, which chooses again before anything is computed.
with contextlib.suppress(ValueError):
    choose()


def __getattr__(name: str) -> Any:
    """Load a public name. `device` is the room `runtime`, with the names that a script needs."""
    return importlib.import_module(f"{__name__}.runtime") if name == "device" else _load(name)
