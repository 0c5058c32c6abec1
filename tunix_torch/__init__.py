"""Tunix-Torch: GRPO post-training of Gemma in PyTorch, on TPU through torch-xla, on CUDA and on the CPU."""

from . import device  # isort: skip  # first: decides for or against XLA before Transformers is imported
from .config import DataConfig, GRPOConfig, ModelConfig
from .evaluation import Answers
from .model import load_model, load_tokenizer
from .sampler import Sampler, SamplingParams
from .trainer import TunixTrainer

__all__ = [
    "Answers",
    "DataConfig",
    "GRPOConfig",
    "ModelConfig",
    "Sampler",
    "SamplingParams",
    "TunixTrainer",
    "device",
    "load_model",
    "load_tokenizer",
]
