"""What every dataclass of settings shares: a field with its help, names that others use, checks of types and values."""

import contextlib
import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from typing import Any, Union, get_args, get_origin, get_type_hints

from .aliases import ALIASES


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with the help that its flag shows."""
    return field(default=default, metadata={"help": help, **metadata})


def nearest(name: str, names: list[str]) -> str:
    """A hint such as "; did you mean 'epsilon'?", or "" when nothing comes close."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def canonical_names(settings: dict[str, Any], valid: list[str]) -> dict[str, Any]:
    """Replace aliases by our names.

    Raises:
        ValueError: a name is neither a field nor an alias (the message has the nearest one), or a setting is given
            twice with different values.
    """
    result: dict[str, Any] = {}
    for name, value in settings.items():
        ours = name if name in valid else ALIASES.get(name, name)
        if ours not in valid:
            raise ValueError(f"unknown setting {name!r}{nearest(name, [*valid, *ALIASES])}")
        if ours in result and result[ours] != value:
            raise ValueError(f"{name}={value!r}: the same setting as {ours!r}, which is already {result[ours]!r}")
        result[ours] = value
    return result


@contextlib.contextmanager
def said_as(instead: Mapping[str, str]) -> Iterator[None]:
    """In messages of the form "NAME=VALUE: HINT", put the name that the user has written.

    Args:
        instead: how a message may begin, such as "NAME=" or "NAME=VALUE", each with what to put there.

    Raises:
        ValueError: the code within this context raised one.
    """
    try:
        yield
    except ValueError as error:
        said = str(error)
        for beginning, other in instead.items():
            if said.startswith(beginning):
                error.args = (other + said.removeprefix(beginning),)  # the same error, with its notes
        raise


def with_aliases(names: Iterable[str]) -> dict[str, str]:
    """What `said_as` takes, so that messages about settings that were given by an alias name both."""
    return {f"{ALIASES[name]}=": f"{ALIASES[name]} ({name})=" for name in names if name in ALIASES}


def accept_aliases(cls: type) -> type:
    """Let the constructor of a dataclass take aliases, and name the nearest field when it gets an unknown name."""
    init, valid = cls.__init__, [f.name for f in dataclasses.fields(cls)]

    @functools.wraps(init)
    def init_with_aliases(self: Any, *args: Any, **settings: Any) -> None:
        settings, aliases = canonical_names(settings, valid), with_aliases(settings)
        with said_as(aliases):
            init(self, *args, **settings)

    cls.__init__ = init_with_aliases
    return cls


def name_nearest(cls: type, removed: Mapping[str, str] = types.MappingProxyType({})) -> type:
    """Let the constructor of a dataclass that takes no aliases name the nearest field when it gets an unknown name.

    The error stays a TypeError, as the constructor of every dataclass has it.

    Args:
        removed: names that the class once had, each with what to do instead, which is said in place of the nearest.
    """
    init, valid = cls.__init__, [f.name for f in dataclasses.fields(cls) if f.init]

    @functools.wraps(init)
    def init_with_hints(self: Any, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in valid:
                hint = f": {removed[name]}" if name in removed else nearest(name, valid)
                raise TypeError(f"{cls.__name__} has no setting {name!r}{hint}")
        init(self, *args, **settings)

    cls.__init__ = init_with_hints
    return cls


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of an annotated type; True for annotations that are not understood."""
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def is_finite(value: object) -> bool:
    """False for a float that is infinite or NaN, and for a list or mapping that holds one."""
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check_fields_finite(config: Any) -> None:
    """Check that no field of a dataclass of settings is infinite or NaN, since these would pass many a comparison.

    Raises:
        ValueError: a field is; the message names it.
    """
    for name in config.__dataclass_fields__:
        value = getattr(config, name, None)
        require(is_finite(value), name, value, "must be finite")


def check_types(config: Any) -> None:
    """Check that the fields of a dataclass of settings have the types of their annotations, and that all are finite.

    Of inherited fields only the types of numbers are checked.

    Raises:
        ValueError: a value has another type, or is infinite or NaN; the message names the field.
    """
    check_fields_finite(config)
    hints = get_type_hints(type(config))
    for name in config.__dataclass_fields__:
        hint, value = hints[name], getattr(config, name, None)
        checked = name in type(config).__annotations__ or hint in (int, float, bool)
        if checked and not _fits(value, hint):
            expected = hint.__name__ if isinstance(hint, type) else str(hint)
            raise ValueError(f"{name}={value!r}: expected {expected}, got {type(value).__name__}")


def require(condition: bool, name: str, value: object, hint: str) -> None:
    """Refuse a setting that has a value that is not possible.

    Args:
        condition: whether the value is possible.
        hint: what would be right, for the message.

    Raises:
        ValueError: the value is not possible; the message is "NAME=VALUE: HINT".
    """
    if not condition:
        raise ValueError(f"{name}={value!r}: {hint}")
