"""What `train.py --help` and `--help-all` print: the settings that matter first, or all of them by group."""

import argparse
import dataclasses
import enum
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HELP, HELP_ALL = ("-h", "--help"), ("--help-all", "--help_all")

# The settings that `--help` shows, in this order, with what it says of them in a few words.
FIRST = {
    "use_grpo": "reinforcement learning; false: supervised fine-tuning",
    "model_name": "hub id or folder; tiny is made here, offline",
    "dataset": "a known one: gsm8k, math or arc",
    "data_path": "or your own rows: a file, a folder or a hub id",
    "reward_funcs": "names from rewards/, or my_module.my_reward",
    "num_completions_per_prompt": "answers to each prompt, one group",
    "generation_max_length": "the most tokens of an answer",
    "per_device_train_batch_size": "prompts a step",
    "learning_rate": "the highest, after the warm-up",
    "max_steps": "optimizer steps; -1: as num_train_epochs says",
    "output_dir": "where everything is written",
    "resume_from_checkpoint": "go on from here: a folder, latest, auto or false",
}
# The fields of `GRPOConfig` that `transformers.TrainingArguments` has not stand there by subject. A group goes from the
# field that is named here to the first field of the next group.
OWN_GROUPS = {
    "use_grpo": "Task, device and prompts",
    "num_completions_per_prompt": "Rollouts",
    "algorithm": "Advantages and loss",
    "preference_loss": "Preferences, and a teacher",
    "reward_weights": "Calling the reward functions",
    "allow_changes": "Resuming, and records of steps",
    "num_eval_completions": "Answers at evaluation",
}
SECTIONS = {"ModelConfig": "Model, LoRA and mesh", "DataConfig": "Data and rewards"}  # groups that are a dataclass each
MOVED = {"resume_from_checkpoint": "Resuming Training"}  # Transformers has it among what its Trainer does not use
METAVARS = {"int": "INT", "float": "NUMBER", "string_to_bool": "true|false"}  # by the function that reads a value


def help_asked(argv: Sequence[str]) -> str | None:
    """ "help" or "help-all", where a flag among these words asks for it; else None."""
    if any(word in HELP_ALL for word in argv):
        return "help-all"
    return "help" if any(word in HELP for word in argv) else None


def without_help(argv: Sequence[str]) -> list[str]:
    """The words without the flags that ask for help."""
    return [word for word in argv if word not in (*HELP, *HELP_ALL)]


def group_titles(configs: Sequence[type]) -> dict[str, str]:
    """The title of the group of every setting, by the setting's name; groups and names stand in order.

    A dataclass of few settings is a group. Of `GRPOConfig` the fields that `transformers.TrainingArguments` has too
    are grouped by the headings in that class's docstring, and the others by `OWN_GROUPS`.
    """
    titles: dict[str, str] = {}
    for config in configs:
        fields = [field.name for field in dataclasses.fields(config) if field.init]
        if config.__name__ in SECTIONS:
            titles |= dict.fromkeys(fields, SECTIONS[config.__name__])
            continue
        inherited = _headings(next(base for base in config.__mro__ if base.__name__ == "TrainingArguments"))
        title = ""
        for name in fields:
            if name not in inherited:
                title = OWN_GROUPS.get(name, title)
                titles[name] = title
        titles |= inherited
    return titles


def _headings(config: type) -> dict[str, str]:
    """The fields of `transformers.TrainingArguments`, each with the heading above it in the docstring."""
    fields = [field.name for field in dataclasses.fields(config) if field.init]
    titles, title = {}, "Output"
    for line in (config.__doc__ or "").splitlines():
        if heading := re.fullmatch(r" {8}> (\w.*)", line):
            title = heading[1].strip()
        elif (field := re.match(r" {8}(\w+) ?\(", line)) and field[1] in fields:
            titles[field[1]] = title
    others = dict.fromkeys((name for name in fields if name not in titles), "Others of Transformers")
    return titles | others | MOVED


def print_help(
    parser: argparse.ArgumentParser, configs: Sequence[type], meant_by_none: Mapping[str, Any], everything: bool
) -> None:
    """Print the parser's description, and the first settings or all of them.

    Each setting has its meaning and the value that it has where no flag is given. Lines are as wide as the terminal.

    Args:
        parser: whose flags are the fields of the dataclasses, with the defaults that are in force.
        meant_by_none: what a job takes for settings that have no value, by their names.
        everything: print all settings by group, not the first ones alone.
    """
    form = _Form(parser.prog)
    form.add_usage("%(prog)s [--config FILE] [--SETTING VALUE ...]", (), ())
    form.add_text(parser.description)
    form.start_section("Options")
    form.add_argument(next(action for action in parser._actions if action.dest == "config"))
    form.add_argument(argparse._HelpAction(HELP, help="the settings that matter first"))
    form.add_argument(argparse._HelpAction(HELP_ALL[:1], help=f"all {len(group_titles(configs))} settings, by group"))
    form.end_section()
    _add_groups(form, parser, configs, meant_by_none, everything)
    print(form.format_help().rstrip())


def print_groups(parser: argparse.ArgumentParser, configs: Sequence[type], meant_by_none: Mapping[str, Any]) -> None:
    """Print all settings by group, for a command whose other flags have been printed. See `print_help`."""
    form = _Form(parser.prog)
    _add_groups(form, parser, configs, meant_by_none, everything=True)
    print(f"\n{form.format_help().rstrip()}")


def _add_groups(
    form: argparse.HelpFormatter,
    parser: argparse.ArgumentParser,
    configs: Sequence[type],
    meant_by_none: Mapping[str, Any],
    everything: bool,
) -> None:
    actions = {action.dest: action for action in reversed(parser._actions)}  # `--no_NAME` comes after `--NAME`
    sections = _by_group(configs) if everything else [("The settings that matter first [default]", list(FIRST))]
    own = {name for config in configs for name in config.__dict__["__annotations__"]}
    for title, names in sections:
        form.start_section(title)
        for name in names:
            in_short = not everything or (name in FIRST and name not in own)  # Transformers says what its Trainer does
            default = actions[name].default
            default = meant_by_none.get(name) if default is None else default
            form.add_argument(_shown(actions[name], default, FIRST[name] if in_short else None))
        form.end_section()


def _by_group(configs: Sequence[type]) -> Iterator[tuple[str, list[str]]]:
    titles = group_titles(configs)
    for title in dict.fromkeys(titles.values()):
        yield title, [name for name in titles if titles[name] == title]


def _shown(action: argparse.Action, default: Any, words: str | None) -> argparse.Action:
    """The flag as it is printed: with a placeholder for its value, the words to choose from, and the default in force.

    Args:
        default: the value in force where the flag is not given.
        words: what is said of it; None: its own help.
    """
    text = words or " ".join((action.help or "").split())  # `%` is written `%%`, as argparse wants it
    if action.choices:
        text = f"{text.rstrip('.')}; one of {', '.join(str(_plain(choice)) for choice in action.choices)}"
    reader = "string_to_bool" if action.nargs == "?" and action.const is True else action.type.__name__
    return argparse.Action(
        [f"--{action.dest}"],
        action.dest,
        nargs="+" if action.nargs in ("+", "*") else None,
        metavar=METAVARS.get(reader, "TEXT"),
        help=f"{text} [{as_flag(default).replace('%', '%%')}]",
    )


def as_flag(default: Any) -> str:
    """A default as one would write it after its flag, in words: "none" where there is no value."""
    default = _plain(default)
    if default is None or default is argparse.SUPPRESS:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return " ".join(map(str, default)) or "none"
    return repr(default) if default == "" else str(default)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


class _Form(argparse.HelpFormatter):
    """Fills paragraphs, but for those of several lines: these are commands, of which only long ones are folded."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        parts = text.strip().split("\n\n")
        return "\n\n".join(folded(part, width) if "\n" in part else fill(part, width, indent) for part in parts)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)


def folded(commands: str, width: int) -> str:
    """Commands and comments, one a line. Commands that are longer than the width are folded as a shell takes them."""
    commands = re.sub(r"(--\w+) (?=[^-\s])", "\\1\xa0", commands)  # a flag and its value stay together
    how = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}
    lines = [
        [line] if line.startswith("#") or len(line) <= width else textwrap.wrap(line, width - 2, **how)
        for line in commands.splitlines()
    ]
    return "\n".join(" \\\n".join(parts) for parts in lines).replace("\xa0", " ")
