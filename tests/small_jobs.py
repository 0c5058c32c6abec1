"""Small jobs that between them take the branches of a family, a type or a setting, the same on every device."""

import torch
from models import make_model
from trainers import make_trainer

from tunix_torch.model import tiny

JOBS = {  # the family, the type of the base weights, settings
    "sft": ("gemma3", torch.float32, {"use_grpo": False, "generation_max_length": 64}),
    "checkpointing": ("gemma3", torch.float32, {"gradient_checkpointing": True}),
    "bfloat16": ("gemma3", torch.bfloat16, {}),
    "gemma2": ("gemma2", torch.float32, {}),
    "gemma4": ("gemma4", torch.float32, {}),
    "gemma4 bfloat16": ("gemma4", torch.bfloat16, {}),
}


def log_of_job(name, output_dir):
    """Train for two steps; return the rows of the log that have a loss, and the kinds of device that tensors are on."""
    family, dtype, settings = JOBS[name]
    tokenizer = tiny.make_tokenizer()
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    more = {"vocab_size_per_layer_input": len(tokenizer)} if family == "gemma4" else {}
    model = make_model(family, **tokens, **more, vocab_size=len(tokenizer), initializer_range=0.05).to(dtype)
    short = {"max_steps": 2, "micro_batch_size": None, "per_device_train_batch_size": 2, "generation_max_length": 8}
    trainer = make_trainer(model, output_dir, processing_class=tokenizer, **(short | settings))
    trainer.train()
    places = sorted({tensor.device.type for tensor in trainer.model.state_dict().values()})
    return [row for row in trainer.state.log_history if "loss" in row], places
