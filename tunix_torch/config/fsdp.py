"""The settings `fsdp` and `fsdp_config` of Transformers: what they may hold here, and what they mean."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import FullyShardedDataParallelPlugin

from ..runtime import mesh, together
from ..runtime.fsdp import ON_A_MESH, Splitting, why_not
from .settings import nearest, require

if TYPE_CHECKING:
    from .grpo import GRPOConfig

WORDS = ("full_shard", "shard_grad_op", "auto_wrap")  # Transformers' older form, several words in one text
_YES, _NO = (True, "true", "True"), (None, False, "false", "False")  # 0 equals False


def _is_off(value: Any) -> bool:
    return value in _NO


# For each key of `fsdp_config`: whether a value is possible, and what is.
KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "version": (lambda v: v in (2, "2"), "weights are split by FSDP2: give 2, or leave it out"),
    "reshard_after_forward": (lambda v: v in _YES + _NO, "expected true or false"),
    "state_dict_type": (lambda v: v == "FULL_STATE_DICT", "checkpoints hold whole tensors: leave it out"),
    "auto_wrap_policy": (lambda v: v == "TRANSFORMER_BASED_WRAP", "layers are gathered one by one: leave it out"),
    "transformer_layer_cls_to_wrap": (lambda v: not v, "all layers of the model are gathered one by one: leave it out"),
    "min_num_params": (_is_off, "layers are gathered one by one: leave it out"),
    "cpu_offload": (_is_off, "weights stay on the GPUs: leave it out, and take more GPUs"),
    "cpu_ram_efficient_loading": (_is_off, "each process reads the weights itself: leave it out"),
    "activation_checkpointing": (_is_off, "set gradient_checkpointing instead"),
    "xla": (_is_off, ON_A_MESH),
    "xla_fsdp_v2": (_is_off, ON_A_MESH),
    "xla_fsdp_grad_ckpt": (_is_off, ON_A_MESH),
}
# Optimizers that keep numbers of a weight's own shape, which are split and saved as the weight is.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


def read_fsdp(args: "GRPOConfig") -> Any:
    """Check both settings, and bring them into Transformers' newer form: `fsdp` True, all else in `fsdp_config`.

    Returns:
        `fsdp` as it was given; None: weights are not split.

    Raises:
        ValueError: a value is not possible, or this machine can't split weights over processes.
    """
    given, config = args.fsdp or None, args.fsdp_config
    if given is None:
        require(not config, "fsdp_config", config, "has an effect with fsdp only: set fsdp to true")
        require(args.gather_for_rollout is None, "gather_for_rollout", args.gather_for_rollout, "is about fsdp: set it")
        return None
    require(why_not() is None, "fsdp", given, str(why_not()))
    words = [] if given in _YES else given.split() if isinstance(given, str) else given
    hint = f"give true, or some of {', '.join(WORDS)}"
    require(isinstance(words, list) and all(word in WORDS for word in words), "fsdp", given, hint)
    require(not {"full_shard", "shard_grad_op"} <= set(words), "fsdp", given, "give one of full_shard, shard_grad_op")
    require(config is None or isinstance(config, Mapping), "fsdp_config", config, "expected names and values")
    config = {str(name).removeprefix("fsdp_"): value for name, value in (config or {}).items()}
    for name, value in config.items():
        hint = f"it has no {name!r} here{nearest(name, list(KEYS))}"
        require(name in KEYS, "fsdp_config", config, hint)
        is_possible, hint = KEYS[name]
        require(is_possible(value), f"fsdp_config[{name!r}]", value, hint)
    if words and "reshard_after_forward" not in config:
        config["reshard_after_forward"] = "shard_grad_op" not in words
    args.fsdp, args.fsdp_config = True, config
    return given


def make_splitting(args: "GRPOConfig", given: Any) -> Splitting | None:
    """How weights are split, once the processes have met and `transformers.TrainingArguments` has read the settings.

    Accelerate's plugin says it, but is not handed on to Accelerate. That would use it on GPUs only, and it gathers
    weights in a model's own `forward` only, which is never called here: hidden states and heads are computed apart.

    Args:
        given: what `read_fsdp` returned.

    Raises:
        ValueError: there is only one process.
    """
    if given is None:
        return None
    hint = "splits the weights over several processes, and this is the only one: accelerate launch --num_processes 2"
    if mesh.along_tp() > 1:
        hint = "splits the weights along fsdp, where the mesh has one process only: leave it out"
    require(together.count() > 1, "fsdp", given, hint)
    plugin, args.fsdp_plugin_args = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args), None
    return Splitting(plugin.reshard_after_forward, args.gather_for_rollout)


def check_optimizer(args: "GRPOConfig") -> None:
    """See that the state of the optimizer can be split as the weights that learn, where these are split.

    Raises:
        ValueError: it can't.
    """
    name = args.optim.value
    hint = f"with fsdp, training all weights takes one of {', '.join(OPTIMIZERS)}"
    require(not args.fsdp or name in OPTIMIZERS, "optim", name, hint)
