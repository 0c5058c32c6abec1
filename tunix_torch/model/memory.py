"""Says before anything is allocated that a LoRA or the lengths of a run can't fit into the memory of this machine.

What is counted is the least that is needed, so what can work is never refused: of a LoRA its weights and gradients, of
a rollout the keys and values of all rows at their greatest length.
"""

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..config.grpo import GRPOConfig
from ..runtime import device, mesh
from .attention import layer_windows
from .forward import text_config


def check_rank(model: nn.Module, config: LoraConfig) -> None:
    """See that a new LoRA can fit.

    Raises:
        ValueError: it can't.
    """
    sizes = [
        sum(layer.weight.shape)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and _is_target(config, name)
    ]
    needed = 2 * 4 * config.r * sum(sizes)  # float32
    _require_memory(f"lora_rank={config.r}", "the LoRA and its gradients", needed)


def _is_target(config: LoraConfig, name: str) -> bool:
    return config.target_modules == "all-linear" or bool(check_target_module_exists(config, name))


def check_lengths(model: nn.Module, args: GRPOConfig) -> None:
    """See that the model has positions for a completion, and that the rollout of one batch can fit, where all
    completions are as long as they may be.

    Raises:
        ValueError: it has not, or it can't.
    """
    if not args.use_grpo:
        return
    config, length = text_config(model), args.generation_max_length
    heads = -(-config.num_key_value_heads // mesh.along_tp())
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * heads * size * next(model.parameters()).element_size()
    shared = getattr(config, "num_kv_shared_layers", None) or 0  # Gemma 4: the last layers keep none of their own
    windows = layer_windows(config)[: config.num_hidden_layers - shared]
    tokens = sum(min(length, window or length) for window in windows)
    needed = args.rows_per_step * tokens * per_token
    given = f"generation_max_length={length}"
    _require_memory(given, f"the keys and values of {args.rows_per_step} completions of that length", needed)
    if device.static_shapes():  # else a batch is as wide as its longest prompt
        width = args.max_prompt_length
        tokens = sum(min(width, window or width) for window in windows)
        needed = args.per_device_train_batch_size * tokens * per_token
        _require_memory(f"max_prompt_length={width}", "the keys and values of the prompts of a batch", needed)
    if length > config.max_position_embeddings:
        most = f"the model has {config.max_position_embeddings} positions, for prompt and completion"
        raise ValueError(f"generation_max_length={length}: {most}")


def _require_memory(given: str, what: str, needed: int) -> None:
    each, num_devices = device.memory_bytes(), mesh.axis_size("fsdp") * mesh.axis_size("tp")
    if each is not None and needed > each * num_devices:
        there = f"{each * num_devices / 2**30:,.1f} GiB"
        raise ValueError(f"{given}: {what} need at least {needed / 2**30:,.1f} GiB, and the memory has {there} in all")
