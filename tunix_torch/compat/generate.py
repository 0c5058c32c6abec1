"""Writes `conf/`, `config_example.json` and pages of docs/ from the dataclasses and recipes of settings.

These hold every default.

python -m tunix_torch.compat.generate            # into the current folder
python -m tunix_torch.compat.generate FOLDER

`conf/experiment/` is written by hand: its files are jobs, not defaults.
"""

import dataclasses
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..config.checks import NOT_FOR_US
from ..config.flags import CONFIGS, parse_job
from ..config.grpo import GRPOConfig
from ..config.help import as_flag, group_titles
from ..config.model import GEMMA3_SIZES, TINY_NAME
from ..config.recipes import AGENT_TUNIX, AGENT_TUNIX_AGREES, AGENT_TUNIX_MODEL, JOB, TINY
from ..config.saved import settings_of
from .agent_tunix import GRPOTrainingConfig, name_in_grpo_config, sections_of_settings
from .trl_config import table_of_fields, table_of_removed

CONFIG_HEAD = """\
# What run_training.py starts from. A section's file gives its values; a model's file may change any of them, an
# experiment's file again, and the command line has the last word.
defaults:
  - _self_
"""
HYDRA = """
hydra:
  run:
    dir: outputs/tunix-grpo/${now:%Y-%m-%d}/${now:%H-%M-%S}
  sweep:
    dir: multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}
  job:
    name: run_training
    chdir: false
  job_logging: # warnings, as train.py shows them, and in train.log beside what is printed
    formatters:
      simple:
        format: "%(message)s"
    handlers:
      console:
        stream: ext://sys.stderr
      file:
        filename: ${hydra.runtime.output_dir}/train.log
    root:
      level: WARNING
"""
MAX_WIDTH = 110  # of a line
FROM_TRL, ALL_SETTINGS = "docs/from_trl.md", "docs/all_settings.md"
ALL_SETTINGS_HEAD = """\
# Every setting

Written by `python -m tunix_torch.compat.generate` from the dataclasses that hold the settings. Each is a flag of
`train.py`, a key of `--config FILE` and an argument of its class in Python. Defaults are those for any model; what the
tiny model's job has instead stands behind them, in brackets. [settings.md](settings.md) says what settings mean
together.
"""
TABLE_BEGINS, TABLE_ENDS = "<!-- {}: written by python -m tunix_torch.compat.generate -->\n", "<!-- end -->"
OF_A_MODEL = "# @package _global_\n"
TINY_HEAD = "# The embedded model and the job it is made for, offline: what `python train.py --use_grpo` runs.\n"
# A section's settings that stand in another section's file, where agent-tunix has them too.
ELSEWHERE = ("training.learning_rate", "training.warmup_ratio", "training.max_grad_norm")


def files() -> dict[str, str]:
    """Path -> text of every file that is generated."""
    sections = {name: section for name, section in sections_of_settings().items() if name not in ("model", "data")}
    written = {"conf/config.yaml": _config_yaml(list(sections)), "conf/model/tiny.yaml": _tiny_yaml()}
    for size in GEMMA3_SIZES:
        written[f"conf/model/gemma3_{size}.yaml"] = _gemma_yaml(size)
    values = _values_of_agent_tunix()
    for name, section in sections.items():
        lines = [_line(field, values[f"{name}.{field.name}"]) for field in _shown(name, section)]
        written[f"conf/{name}/default.yaml"] = "".join(lines)
    settings = settings_of(*parse_job(["--use_grpo"]))
    written["config_example.json"] = json.dumps(settings, indent=2) + "\n"
    written[ALL_SETTINGS] = _all_settings()
    page = (Path(__file__).parents[2] / FROM_TRL).read_text()
    written[FROM_TRL] = _with_table(_with_table(page, "fields", table_of_fields()), "removed", table_of_removed())
    return written


def _with_table(page: str, name: str, table: str) -> str:
    """A page with the table of this name written anew."""
    before, begin, rest = page.partition(TABLE_BEGINS.format(name))
    _, end, after = rest.partition(TABLE_ENDS)
    return before + begin + table + end + after


def _all_settings() -> str:
    """A page with a table for each group of settings."""
    fields = {field.name: field for config in CONFIGS for field in dataclasses.fields(config) if field.init}
    titles, text = group_titles(CONFIGS), ALL_SETTINGS_HEAD
    for title in dict.fromkeys(titles.values()):
        text += f"\n## {title}\n| setting | default | what it does |\n|---|---|---|\n"
        for name in (name for name in titles if titles[name] == title):
            field = fields[name]
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            tiny = f" [`{as_flag(TINY[name])}`]" if name in TINY else ""
            refused = "Does not work here: leave it out. In Transformers: " if name in NOT_FOR_US else ""
            help = refused + " ".join(field.metadata.get("help", "").replace("%%", "%").split()).replace("|", "\\|")
            text += f"| `{name}` | `{as_flag(default)}`{tiny} | {help} |\n"
    return text


def _shown(name: str, section: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(section) if f"{name}.{field.name}" not in ELSEWHERE]


def _defaults_of(config: type) -> dict[str, Any]:
    """Name -> default of a dataclass's fields, as a file has it."""
    defaults = {field.name: field.default for field in dataclasses.fields(config) if field.init}
    return {name: getattr(value, "value", value) for name, value in defaults.items()}


def _values_of_agent_tunix() -> dict[str, Any]:
    """Every setting of the sections, such as "training.num_epochs" -> agent-tunix's value; None: it has none."""
    defaults = _defaults_of(GRPOConfig)
    values = {name: defaults[name] for name in AGENT_TUNIX_AGREES} | JOB | AGENT_TUNIX
    sections = {name: section for name, section in sections_of_settings().items() if name not in ("model", "data")}
    names = [f"{name}.{field.name}" for name, section in sections.items() for field in _shown(name, section)]
    return {name: values.get(name_in_grpo_config(name)) for name in names}


def _config_yaml(sections: list[str]) -> str:
    """The file that names the sections, and holds what is in none of them."""
    defaults = "".join(f"  - {section}: default\n" for section in sections) + f"  - model: {TINY_NAME}\n"
    inner = sections_of_settings()
    outer = [field for field in dataclasses.fields(GRPOTrainingConfig) if field.name not in inner]
    text = CONFIG_HEAD + defaults + "\n"
    for field in outer:
        text += _line(field, {} if field.name == "args" else field.default)
    for name in ("model", "data"):
        text += f"\n{name}:\n"
        text += "".join(_line(field, field.default, indent="  ") for field in dataclasses.fields(inner[name]))
    return text + HYDRA


def _gemma_yaml(size: str) -> str:
    """A Gemma 3 by its size, with agent-tunix's LoRA, asked GSM8K's questions."""
    model = {"model_name": "google/gemma-3-${model.model_size}-it", "model_size": size} | AGENT_TUNIX_MODEL
    return OF_A_MODEL + OmegaConf.to_yaml({"model": model, "data": {"dataset": "gsm8k"}})


def _tiny_yaml() -> str:
    """The tiny model with its recipe in the names of the sections, and defaults where agent-tunix has other values."""
    usual, values = _values_of_agent_tunix(), _defaults_of(GRPOConfig) | JOB | TINY
    ours = {name: name_in_grpo_config(name) for name in usual}
    decided = [name for name in usual if usual[name] is not None or ours[name] in TINY]
    wanted = {name: values[ours[name]] for name in decided if usual[name] != values[ours[name]]}
    # Batches of one epoch are the steps of the run, and a command line may then give either number.
    wanted["training.num_batches"] = wanted.pop("training.max_steps")
    del wanted["training.num_epochs"]
    tree: dict[str, dict[str, Any]] = {"model": {"model_name": TINY_NAME}}
    for name, value in wanted.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    tree["args"] = {name: value for name, value in TINY.items() if name not in ours.values()}
    return OF_A_MODEL + TINY_HEAD + OmegaConf.to_yaml(tree)


def _line(field: dataclasses.Field, value: Any, indent: str = "") -> str:
    """A setting as a line of YAML, with its help as a comment: behind it, or above it where that is too long."""
    line = f"{indent}{OmegaConf.to_yaml({field.name: value}).rstrip()}"
    comment = field.metadata["help"]
    if len(line) + len(comment) + 3 <= MAX_WIDTH:
        return f"{line} # {comment}\n"
    start = f"{indent}# "
    return textwrap.fill(comment, MAX_WIDTH, initial_indent=start, subsequent_indent=start) + f"\n{line}\n"


def main(folder: Path) -> None:
    """Write every file below a folder."""
    for name, text in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
