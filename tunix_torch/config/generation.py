"""`generation_kwargs`: settings of generation under the names that Transformers has for them, translated to ours."""

from collections.abc import Mapping
from typing import Any

from .files import NotJSON, parse_json
from .settings import nearest, require

# Each name in Transformers' `GenerationConfig` with our setting of the same meaning.
OURS = {
    "temperature": "generation_temperature",
    "top_k": "generation_top_k",
    "top_p": "generation_top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "generation_max_length",
}
# What None means for these. A length and a temperature can't be left out.
OFF = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
# Values that ask for what is done in any case: tokens are sampled, one by one, from one distribution.
ALWAYS = {"do_sample": True, "num_beams": 1, "num_beam_groups": 1, "use_cache": True}


def read_generation_kwargs(value: Any) -> dict[str, Any]:
    """Translate `generation_kwargs` to values of our own settings.

    Args:
        value: a mapping, its JSON text, or None.

    Raises:
        ValueError: it is no mapping, or it has a name or a value with which this library can't sample.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except NotJSON as error:
            raise ValueError(f"generation_kwargs={value!r}: {error}") from error
    hint = 'expected names and values, such as {"top_k": 50}'
    require(value is None or isinstance(value, Mapping), "generation_kwargs", value, hint)
    result = {}
    for name, setting in (value or {}).items():
        if name in OURS:
            result[OURS[name]] = OFF.get(name) if setting is None else setting
        elif name in ALWAYS:
            hint = f"must be {ALWAYS[name]}: a rollout samples every completion, token by token"
            require(setting == ALWAYS[name], f"generation_kwargs[{name!r}]", setting, hint)
        else:
            known = [*OURS, *ALWAYS]
            hint = f"is not known here{nearest(name, known)}; choose among {', '.join(known)}"
            require(False, f"generation_kwargs[{name!r}]", setting, hint)
    return result
