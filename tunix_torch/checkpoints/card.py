"""The model card (`README.md`) of what a run has trained: base model, task, data, figures, settings, how to load it."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config.checks import PREFERENCE_LOSSES
from ..config.data import DataConfig
from ..config.method import method_name, method_of
from ..config.recipes import defaults_in_force, whose_defaults
from ..config.saved import MAY_BE_ADDED, MAY_CHANGE, changed_from_defaults, config_file
from ..evals.estimators import wilson_interval
from ..model import tiny
from ..model.origin import hub_id, is_tiny, licence_of, public_name

CARD_FILE, CURVES_FILE = "README.md", "training_curves.png"
TAG = "tunix-torch"  # by which a card of ours is known
ADAPTER, MERGED = "A LoRA adapter for", "A plain model, of an adapter that was merged into"
ABOUT, LOADING, SETTINGS, LICENCE = "What it is", "How to load it", "Settings", "Licence"  # headings
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
DATA_SETS = {"gsm8k": "openai/gsm8k", "math": "MATH", "arc": "allenai/ai2_arc"}
STAND_ELSEWHERE = ("model_name", "system_message", "data_path", "val_data_path", "use_grpo")
NOT_SHOWN = (*STAND_ELSEWHERE, *MAY_CHANGE, *MAY_BE_ADDED)  # the rest changes what is learned


@dataclass
class CardFacts:
    """What a card says of a model, apart from its files.

    Attributes:
        base: the name by which the base model was loaded.
        model_type: of the base model's config.
        is_adapter: the folder holds an adapter; else a whole model.
        settings: those of the run, as its config file has them; empty: not known.
        log_history: of the trainer's state.
        reward_funcs: the names of the reward functions in force.
        questions: how many evaluation questions there are, by the name of the data set; of one set the name is "".
        repo: the hub repository that the card is for; None: it is not known.
        are_messages: the questions of the training rows are messages.
    """

    base: str
    model_type: str
    is_adapter: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    reward_funcs: Sequence[str] = ()
    log_history: Sequence[Mapping[str, Any]] = ()
    questions: Mapping[str, int] = field(default_factory=dict)
    repo: str | None = None
    are_messages: bool = False


@dataclass(frozen=True)
class Figure:
    """A share of right answers, of N questions, at the first and at the last evaluation that was logged."""

    data_set: str
    name: str
    first: float | None  # None: there was one evaluation only
    last: float
    steps: tuple[int, int]  # of both evaluations
    intervals: tuple[tuple[float, float], tuple[float, float]]  # 95%, of both evaluations
    num_questions: int

    @property
    def shown(self) -> tuple[str, str]:
        """Both shares with their intervals; the first is empty where there was one evaluation only."""
        words = [
            "" if share is None else f"{share:.1%} ({low:.1%} to {high:.1%})"
            for share, (low, high) in zip((self.first, self.last), self.intervals, strict=True)
        ]
        return words[0], words[1]


def model_card(folder: str | Path, facts: CardFacts, metadata: Mapping[str, Any] | None = None) -> ModelCard:
    """The card of what lies in a folder. The same facts give the same card.

    Args:
        metadata: more of the card's metadata, by their names in its head; they win.
    """
    folder, found = Path(folder), figures(facts)
    title = facts.repo or Path(folder).resolve().name
    licence = licence_of(facts.base, facts.model_type)
    base, data_set = hub_id(facts.base), _hub_data_set(facts.settings)
    data = ModelCardData(
        base_model=base,
        datasets=[data_set] if data_set else None,
        eval_results=[_eval_result(figure, facts.settings) for figure in found] or None,
        library_name="peft" if facts.is_adapter else "transformers",
        license=licence,
        model_name=title if found else None,
        pipeline_tag="text-generation",
        tags=sorted([TAG, *([method_of(facts.settings)] if facts.settings else []), *["lora"] * facts.is_adapter]),
    )
    for name, value in (metadata or {}).items():
        data[name] = value
    sections = {
        ABOUT: _about(facts),
        "Figures": _figures_text(found, folder),
        LOADING: loading_text(facts, folder),
        SETTINGS: _settings_text(facts.settings, folder),
        LICENCE: licence_text(licence),
        "Versions": versions(facts.is_adapter),
    }
    body = "".join(f"\n## {heading}\n\n{text}\n" for heading, text in sections.items() if text)
    return ModelCard(f"---\n{data}\n---\n\n# {title}\n{body}")


# ---- what it is ----


def _how(settings: Mapping[str, Any]) -> str:
    """By which method the model learned, and from what."""
    method, name = method_of(settings), method_name(settings)
    if method == "sft":
        return "by supervised fine-tuning: from completions that the rows hold"
    if method == "distillation":
        return f"by {name}: from a teacher's view of answers that the model sampled itself"
    if method in PREFERENCE_LOSSES:
        return f"with {name}: from pairs of a chosen and a rejected completion"
    return f"with {name}: from answers that the model sampled itself and reward functions scored"


def _about(facts: CardFacts) -> str:
    what = ADAPTER if facts.is_adapter else "A model with all weights trained, from"
    lines = [f"{what} {_base_text(facts.base)}."]
    if facts.settings:
        lines[0] += f" Tunix-Torch trained it {_how(facts.settings)}."
        lines += [
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {_cell(text)} |" for name, text in _task(facts.settings, facts.reward_funcs)),
        ]
    return "\n".join(lines)


def _base_text(name: str) -> str:
    base = hub_id(name)
    if base is not None:
        return f"[{base}](https://huggingface.co/{base})"
    if is_tiny(name):
        return f"`{public_name(name)}`, a Gemma of one million parameters that the package makes itself"
    if not name:
        return "a model that the script made"
    return f"a model that lies in a local folder, `{Path(name).name}`, and not on the hub"


def _task(settings: Mapping[str, Any], reward_funcs: Sequence[str]) -> list[tuple[str, str]]:
    """The rows of the table that says what was learned from what."""
    rows = [("data", _data_text(settings))]
    if settings.get("use_grpo", True) and reward_funcs:
        weights = settings.get("reward_weights") or [1] * len(reward_funcs)
        pairs = zip(reward_funcs, weights, strict=True)
        rows.append(("rewards", ", ".join(name if w == 1 else f"{name} (weight {w:g})" for name, w in pairs)))
    if "judge" in settings:
        rows.append(("right answers", settings["judge"] or DataConfig(dataset=settings.get("dataset")).judge_in_force))
    message = settings.get("system_message")
    rows.append(("instruction before each question", f"`{' '.join(message.split())}`" if message else "none"))
    return rows


def _data_text(settings: Mapping[str, Any]) -> str:
    if "data_path" not in settings:
        return "rows that the script gave"
    path, known = settings["data_path"], settings.get("dataset")
    if path is None and known is None:
        return "generated arithmetic, with evaluation questions that do not occur in training"
    name = DATA_SETS[known] if path is None else _without_folders(path)
    config = settings.get("dataset_config")
    return f"{name}{f', {config}' if config else ''}, split {settings['dataset_split']}"


def _hub_data_set(settings: Mapping[str, Any]) -> str | None:
    """The hub id of the data that was trained on; None: it was generated, lies in a file, or is not known."""
    path, known = settings.get("data_path"), settings.get("dataset")
    if path is None:
        return DATA_SETS[known] if known and "/" in DATA_SETS[known] else None
    on_hub = settings.get("data_source") in (None, "huggingface") and not Path(path).exists()
    return path if on_hub and path.count("/") == 1 and not Path(path).suffix else None


# ---- figures ----


def figures(facts: CardFacts) -> list[Figure]:
    """The shares of right answers in the first and in the last evaluation that was logged."""
    rows = [row for row in facts.log_history if any(name.startswith("eval_") for name in row)]
    found = []
    for data_set, num_questions in facts.questions.items():
        start = f"eval_{data_set}_" if data_set else "eval_"
        names = {name for row in rows for name in row if name.startswith(start)}
        shares = [name for name in names if name == f"{start}accuracy" or name.startswith(f"{start}mean@")]
        for name in sorted(shares):
            known = [row for row in rows if name in row and math.isfinite(row[name])]
            if known:
                first, steps = known[0][name] if len(known) > 1 else None, (known[0]["step"], known[-1]["step"])
                short = name.removeprefix(start)
                intervals = tuple(_interval(row, start, short, num_questions) for row in (known[0], known[-1]))
                found.append(Figure(data_set, short, first, known[-1][name], steps, intervals, num_questions))
    return found


def _interval(row: Mapping[str, Any], start: str, name: str, num_questions: int) -> tuple[float, float]:
    """The 95% interval of a share that an evaluation logged, or Wilson's of one answer to each question where early
    versions logged none."""
    low, high = (row.get(f"{start}interval/{name}_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return wilson_interval(min(1.0, max(0.0, row[f"{start}{name}"])), num_questions)
    return low, high


def _in_words(figure: Figure) -> str:
    name = (
        "greedy answers that are right"
        if figure.name == "accuracy"
        else f"mean of {figure.name.removeprefix('mean@')} sampled answers"
    )
    return f"{figure.data_set}: {name}" if figure.data_set else name


def _figures_text(found: Sequence[Figure], folder: Path) -> str:
    lines = []
    if found:
        counts = sorted({figure.num_questions for figure in found})
        first, last = found[0].steps
        first = "before training" if first == 0 else f"after step {first}"
        lines += [f"| on {' or '.join(map(str, counts))} held-out questions | {first} | after step {last} |"]
        lines += ["|---|---|---|"]
        lines += [f"| {_in_words(f)} | {' | '.join(f.shown)} |" for f in found]
        lines += ["", "In brackets: 95% intervals."]
    if (folder / CURVES_FILE).is_file():
        lines += [""] * bool(lines) + [f"![Curves of the training]({CURVES_FILE})"]
    return "\n".join(lines)


def _eval_result(figure: Figure, settings: Mapping[str, Any]) -> EvalResult:
    low, high = figure.intervals[1]
    data_set = _hub_data_set(settings)
    return EvalResult(
        task_type="text-generation",
        dataset_type=data_set or "held-out",
        dataset_name=figure.data_set or _data_text(settings),
        metric_type="accuracy" if figure.name == "accuracy" else figure.name,
        metric_name=_in_words(figure),
        metric_value=round(figure.last, 4),
        metric_args={"interval_95": [round(low, 4), round(high, 4)], "num_questions": figure.num_questions},
    )


# ---- how to load it ----


def loading_text(facts: CardFacts, folder: Path) -> str:
    """Python that loads the model with PEFT and Transformers, and asks it as it was trained."""
    place = repr(facts.repo or Path(folder).resolve().name).replace("'", '"')
    base, lines = hub_id(facts.base), []
    if facts.is_adapter:
        load = f'AutoModelForCausalLM.from_pretrained("{base}")'
        lines = ["from peft import PeftModel"]
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if facts.is_adapter and is_tiny(facts.base):
        load = "AutoModelForCausalLM.from_pretrained(ensure_tiny_model())"
        lines += ["from tunix_torch.model.tiny import ensure_tiny_model  # makes the base model where it is missing"]
    lines += ["", f"place = {place}  # on the hub, or this folder"]
    if facts.is_adapter and base is None and not is_tiny(facts.base):
        lines += [f'base = "{Path(facts.base).name}"  # a folder that is not on the hub: give its path here']
        load = "AutoModelForCausalLM.from_pretrained(base)"
    lines += [f"model = PeftModel.from_pretrained({load}, place)"] if facts.is_adapter else []
    lines += [] if facts.is_adapter else ["model = AutoModelForCausalLM.from_pretrained(place)"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(place)", "", *_asking(facts.settings, facts.are_messages)]
    text = "```python\n" + "\n".join(lines) + "\n```"
    if facts.is_adapter and base is not None:
        text += "\n\nWhere PEFT is installed, `AutoModelForCausalLM.from_pretrained(place)` alone loads both too."
    if facts.is_adapter and is_tiny(facts.base):
        made = "`ensure_tiny_model` makes this base model in a minute or two"
        text += (
            f"\n\n{made}, in the version of the package whose folder is called `{public_name(facts.base)}`; now it is "
        )
        text += f"`{tiny.folder_name()}`."
    return text


def _asking(settings: Mapping[str, Any], are_messages: bool) -> list[str]:
    """Lines of Python that ask `model` a question as the run asked it."""
    message, wraps = settings.get("system_message") or "", are_messages or settings.get("wrap_prompts", True)
    question = '"What is 47 + 38?"'
    lines = [f"question = {question}"]
    if message:
        lines = [f"instruction = {message!r}", f'question = instruction + "\\n\\n" + {question}']
    if not wraps:
        lines += ['inputs = tokenizer(question, return_tensors="pt")']
    else:
        kwargs = "".join(f", {name}={v!r}" for name, v in (settings.get("chat_template_kwargs") or {}).items())
        lines += [
            'messages = [{"role": "user", "content": question}]',
            "inputs = tokenizer.apply_chat_template(",
            f'    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{kwargs}',
            ")",
        ]
    lines += [
        f"output = model.generate(**inputs, max_new_tokens={settings.get('generation_max_length', 256)})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return lines


# ---- settings, licence, versions ----


def _settings_text(settings: Mapping[str, Any], folder: Path) -> str:
    if not settings:
        return ""
    changed = changed_from_defaults(dict(settings), defaults_in_force(settings))
    shown = {name: value for name, (value, _) in changed.items() if name not in NOT_SHOWN}
    length = "max_steps" if settings.get("max_steps", -1) > 0 else "num_train_epochs"
    lines = [f"The run had `{length}` {settings[length]}.", ""] if length in settings else []
    of = "`{}`{}".format(*whose_defaults(settings))
    if shown:
        lines += [f"Of the settings that change what is learned, these differ from the defaults of {of}:", ""]
        lines += ["| setting | value |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(_without_folders(value))} |" for name, value in sorted(shown.items())]
    else:
        lines += [f"All settings that change what is learned are at the defaults of {of}."]
    file = config_file(folder)
    if file.is_file() and "model_name" in settings:  # else a script has made the trainer
        lines += ["", f"All are in `{file.name}`: `python train.py --config {file.name}` repeats the run."]
    return "\n".join(lines)


def licence_text(licence: str | None) -> str:
    """What the card says of the licence."""
    if licence == "gemma":
        return f"Gemma is provided under and subject to the Gemma Terms of Use: {GEMMA_TERMS}"
    if licence is not None:
        return f"That of the base model: {licence}."
    unknown = "The licence of the base model was not known where this card was written"
    return f"{unknown}; what it allows and asks for holds for this model too."


def versions(is_adapter: bool) -> str:
    """The packages that a model was trained with."""
    packages = ["tunix-torch", "transformers", *(["peft"] if is_adapter else []), "torch"]
    return ", ".join(f"{name} {_version(name)}" for name in packages)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # this package runs from a checkout that nobody has installed
        return "(from source)"


def _without_folders(value: Any) -> Any:
    """A path of this machine without the folders that it lies in, which say nothing elsewhere."""
    is_path = isinstance(value, str) and (Path(value).is_absolute() or value.startswith((".", "~")))
    return Path(value).name if is_path else value


def _cell(value: Any) -> str:
    """A value as a cell of a table in Markdown."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.replace("|", "\\|").split())
