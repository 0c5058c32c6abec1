"""Tunix-Torch: GRPO post-training of Gemma in PyTorch, on TPU through torch-xla, on CUDA and on the CPU."""

from . import device  # isort: skip  # first: decides for or against XLA before Transformers is imported
from .config import DataConfig, GRPOConfig, ModelConfig
from .evaluation import Answers
from .job import train
from .model import load_model, load_tokenizer
from .nested import (
    AlgorithmConfig,
    EvaluationConfig,
    GenerationConfig,
    GRPOTrainingConfig,
    OptimizerConfig,
    TrainingConfig,
)
from .sampler import Sampler, SamplingParams
from .trainer import TunixTrainer

__all__ = [
    "AlgorithmConfig",
    "Answers",
    "DataConfig",
    "EvaluationConfig",
    "GRPOConfig",
    "GRPOTrainingConfig",
    "GenerationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Sampler",
    "SamplingParams",
    "TrainingConfig",
    "TunixTrainer",
    "device",
    "load_model",
    "load_tokenizer",
    "train",
]
