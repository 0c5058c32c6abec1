"""Settings that are mappings: what a flag gave as JSON text or as the name of a file, read and checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_pt_utils import AcceleratorConfig

from .files import NotJSON, load_config, parse_json
from .settings import nearest, require

if TYPE_CHECKING:
    from .grpo import GRPOConfig

# Arguments of `apply_chat_template` that the library gives itself.
OWN_TEMPLATE_ARGUMENTS = (
    "conversation",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)


def read_mappings(args: "GRPOConfig") -> None:
    """Read settings that are mappings, where a flag gave them as JSON text or named a file, and check them.

    Raises:
        ValueError: a text is no JSON, a file is not there, or a mapping holds what it can't.
    """
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name)
        if isinstance(value, str) and value.startswith("{"):
            try:
                setattr(args, name, parse_json(value))
            except NotJSON as error:
                raise ValueError(f"{name}={value!r}: {error}") from error
    for name, library in (("fsdp_config", "FSDP"), ("accelerator_config", "Accelerate")):
        value = getattr(args, name)
        if isinstance(value, str):
            hint = f"no such file; expected one with settings of {library}, or the settings as JSON"
            require(Path(value).is_file(), name, value, hint)
            setattr(args, name, load_config(value))
    if isinstance(args.accelerator_config, dict):
        _check_accelerator_config(args.accelerator_config)
    value = args.lr_scheduler_kwargs
    hint = 'expected names and values, such as {"num_cycles": 2}'
    require(value is None or isinstance(value, dict), "lr_scheduler_kwargs", value, hint)
    if args.chat_template_kwargs is not None:
        check_template_kwargs(args.chat_template_kwargs)


def check_template_kwargs(value: object) -> None:
    """Check that names and values can be given to a chat template.

    Raises:
        ValueError: `value` is no mapping with texts as names, or has a name that the library gives itself.
    """
    name, named = "chat_template_kwargs", isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    require(named, name, value, 'expected names and values, such as {"enable_thinking": false}')
    own = next((key for key in value if key in OWN_TEMPLATE_ARGUMENTS), None)
    require(own is None, name, value, f"{own!r} is given by the library itself; leave it out")


def _check_accelerator_config(value: Mapping[str, Any]) -> None:
    """Check that a mapping has nothing but fields of `AcceleratorConfig`.

    Raises:
        ValueError: it has another name.
    """
    known = list(AcceleratorConfig.__dataclass_fields__)
    for name in value:
        require(name in known, "accelerator_config", dict(value), f"it has no {name!r}{nearest(name, known)}")
