"""Reads YAML as people mean it in settings: 1e-5 is a number, a name is there once, and a date stays a text."""

import re
from typing import Any

import yaml

# YAML 1.1, which PyYAML reads, takes numbers with an exponent and without a point, such as 1e-5, for texts.
_NUMBER = re.compile(
    r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class SettingsLoader(yaml.SafeLoader):
    """A loader of plain values only: no tag of a file makes it import or call anything."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping. Python would silently take the last of two values of one name.

        Raises:
            yaml.constructor.ConstructorError: a name is there twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"found duplicate key {key.value}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _replace_resolvers() -> None:
    """Let numbers with an exponent be numbers, and dates be texts."""
    replaced = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    SettingsLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    SettingsLoader.add_implicit_resolver(replaced[0], re.compile(f"(?:{_NUMBER.pattern})$"), list("-+0123456789."))


_replace_resolvers()
