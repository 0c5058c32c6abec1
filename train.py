"""Train a model: GRPO with --use_grpo, else supervised fine-tuning. Every setting is a flag; --config reads a file.

python train.py --use_grpo --num_completions_per_prompt 4          # the embedded default, offline, in minutes
python train.py --use_grpo --model_name google/gemma-3-270m-it --data_path openai/gsm8k --dataset_config main
python train.py --config config_example.json --learning_rate 5e-4  # flags win over the file
"""

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import utils

if __name__ == "__main__":
    utils.run_script(utils.choose_device)  # before anything imports Transformers

from peft import PeftModel
from transformers import HfArgumentParser, PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

import rewards
from tunix_torch import DataConfig, GRPOConfig, ModelConfig, TunixTrainer, device, load_tokenizer, tiny
from tunix_torch.callbacks import ConsoleProgress, MetricsFile
from tunix_torch.settings import ALIASES, canonical_names, nearest
from tunix_torch.data import load_data
from tunix_torch.model import load_model, lora_config, torch_dtype

logger = logging.getLogger(__name__)

CONFIGS = (ModelConfig, DataConfig, GRPOConfig)
NUM_SHOWN = 3  # completions printed before and after
# Two ways to say the same: where one is given, the other one's value of lower precedence (recipe, file) is dropped.
OUTWEIGHS = {"max_length": "max_prompt_length", "num_train_epochs": "max_steps"}


class Parser(HfArgumentParser):
    """Errors are one line without the usage text, which lists some two hundred flags."""

    def error(self, message: str) -> NoReturn:
        utils.fail(message)


def parse_args(argv: Sequence[str]) -> tuple[ModelConfig, DataConfig, GRPOConfig]:
    """Settings, in rising order of precedence: defaults, the tiny model's recipe, the config file, flags.

    Raises:
        ValueError: an unknown name (with the nearest one) or a value that can't be.
    """
    parser = Parser(
        CONFIGS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="a JSON or YAML file with settings; flags win over it")
    names = sorted({field.name for config in CONFIGS for field in dataclasses.fields(config) if field.init})
    argv = _replace_aliases(argv)
    file = parser.parse_known_args(argv)[0].config
    settings = canonical_names(utils.load_config(file), names) if file else {}

    given = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    for name, rival in OUTWEIGHS.items():
        if name in given and rival not in given:
            settings.pop(rival, None)
    lowest = {"use_grpo": False, "eval_on_start": True}
    parser.set_defaults(**_as_defaults(lowest | settings))
    model_name = parser.parse_known_args(argv)[0].model_name
    if model_name == tiny.NAME:
        chosen = given | {name for name, value in settings.items() if value is not None}
        rivals = {rival for name, rival in OUTWEIGHS.items() if name in chosen}
        recipe = {name: value for name, value in tiny.RECIPE.items() if name not in rivals}
        parser.set_defaults(**_as_defaults(lowest | recipe | settings))
    model_config, data_config, args, _, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].partition("=")[0].removeprefix("--")
        raise ValueError(f"unknown argument {unknown[0]!r}{nearest(name, [*names, *ALIASES]) if name else ''}")
    return model_config, data_config, args


def _replace_aliases(argv: Sequence[str]) -> list[str]:
    """`--beta 0.1` -> `--kl_penalty_coef 0.1`; the same setting under two names is a mistake."""
    result, seen = [], {}
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            ours = ALIASES.get(name[2:], name[2:])
            if seen.setdefault(ours, name) != name:
                raise ValueError(f"{name} and {seen[ours]} are the same setting: give one of them")
            word = f"--{ours}{equals}{value}"
        result.append(word)
    return result


def _as_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Values of a file as parser defaults: as text, which the parser converts and checks like a flag's."""
    plain = (list, dict, type(None), bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}


def build_trainer(model_config: ModelConfig, data_config: DataConfig, args: GRPOConfig) -> TunixTrainer:
    """Load model, tokenizer, data and rewards, and put them together.

    Raises:
        ValueError: any of them can't be had.
    """
    reward_funcs = [rewards.get_reward(name) for name in data_config.reward_funcs or ["correctness", "format"]]
    train_rows, eval_rows = load_data(data_config, args.seed)
    tokenizer = load_tokenizer(model_config.model_name)
    if not eval_rows and args.eval_strategy != "no":
        logger.warning("There are no evaluation rows (--val_data_path), so nothing is evaluated.")
        args.eval_strategy = "no"
    model = load_model(model_config.model_name, torch_dtype(model_config.model_dtype))
    has_adapter = isinstance(model, PeftModel)
    if has_adapter:  # trained further as it is
        adapter = model.peft_config["default"]
        model_config.lora_rank, model_config.lora_alpha = adapter.r, float(adapter.lora_alpha)
        model_config.lora_dropout = adapter.lora_dropout
        print(f"{model_config.model_name} is an adapter, rank {adapter.r}, which is trained further")
    trainer = TunixTrainer(
        model,
        reward_funcs,
        args,
        train_rows,
        eval_rows or None,
        processing_class=tokenizer,
        peft_config=None if has_adapter else lora_config(model_config),
        callbacks=[MetricsFile(), ConsoleProgress()],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(model_config: ModelConfig, data_config: DataConfig, args: GRPOConfig) -> TunixTrainer:
    """Run a whole job: set up, evaluate, train, evaluate, save. Everything is written to `args.output_dir`.

    Raises:
        ValueError: a setting, file, model or data set that can't work; nothing has been written then.
    """
    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    utils.check_output_dir(output_dir)
    checkpoint = utils.resolve_checkpoint(args.resume_from_checkpoint, output_dir)
    trainer = build_trainer(model_config, data_config, args)
    if checkpoint is not None:
        args.eval_on_start = False  # the run that is resumed has done it
    if checkpoint is None or Path(checkpoint).resolve().parent != output_dir.resolve():
        utils.set_aside_previous_run(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    utils.save_config(utils.settings_of(model_config, data_config, args), output_dir / "config.json")
    print(f"{'GRPO' if args.use_grpo else 'SFT'} of {model_config.model_name} on {device.describe()}")
    print(f"{len(trainer.train_dataset)} training rows, {len(trainer.eval_dataset or [])} evaluation rows", flush=True)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        newest = utils.get_latest_checkpoint(output_dir)
        hint = f"--resume_from_checkpoint latest continues from {newest}" if newest else "there is no checkpoint yet"
        print(f"\nStopped at step {trainer.state.global_step}; {hint}", file=sys.stderr)
        raise
    if trainer.eval_dataset is not None and evaluations(trainer)[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()  # the last step was not one of eval_steps
    trainer.save_model()
    trainer.save_state()
    utils.plot_training_curves(output_dir)
    if trainer.eval_dataset is not None:
        print_comparison(trainer)
    print(
        f"\n{time.perf_counter() - started:.0f} s, {utils.memory_summary()}. Adapter, metrics and curves: {output_dir}"
    )
    return trainer


def evaluations(trainer: TunixTrainer) -> list[dict[str, float]]:
    """The logged evaluations, oldest first; one without anything when there was none."""
    return [row for row in trainer.state.log_history if "eval_accuracy" in row] or [{"step": -1}]


def print_comparison(trainer: TunixTrainer) -> None:
    """Accuracy before and after, and a few answers of each."""
    rows = evaluations(trainer)
    names = [name for name in rows[0] if name == "eval_accuracy" or name.startswith("eval_mean@")]
    print(f"\n{'on held-out questions':<24}{'before':>10}{'after':>10}")
    for name in names:
        label = "greedy pass@1" if name == "eval_accuracy" else f"{name.removeprefix('eval_')} (sampled)"
        print(f"{label:<24}{rows[0][name]:>10.1%}{rows[-1][name]:>10.1%}")
    first, last = trainer.first_answers, trainer.last_answers
    changed = [i for i in range(len(last.right)) if first.right[i] != last.right[i]]
    for i in (changed or list(range(len(last.right))))[:NUM_SHOWN]:
        print(f"\n{trainer.eval_dataset[i]['question']}  (answer: {trainer.eval_dataset[i]['answer']})")
        for label, answers in (("before", first), ("after", last)):
            if label == "before" and first is last:
                continue  # a resumed run has not seen what was answered before
            verdict = "right" if answers.right[i][0] else "wrong"
            text = answers.completions[i][0].replace("\n", " \u23ce ")
            print(f"  {label:<7}{verdict:<7}{text}")


def main() -> None:
    logging.basicConfig(format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    train(*parse_args(sys.argv[1:]))


if __name__ == "__main__":
    utils.run_script(main)
