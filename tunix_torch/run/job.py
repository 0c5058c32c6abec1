"""A whole job: model, data and rewards by their names; evaluate, train, evaluate, save."""

import contextlib
import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from .. import rewards
from ..checkpoints.files import has_final_files
from ..compat.agent_tunix import GRPOTrainingConfig
from ..config.data import DataConfig
from ..config.grpo import GRPOConfig
from ..config.model import ModelConfig
from ..config.saved import CONFIG_FILE, check_same_run, save_config, settings_of
from ..config.settings import require
from ..data.rows import Row, answer_text, has_column, question_of
from ..data.shapes import completion_of
from ..data.sources import load_data
from ..model.loading import base_model_name, load_model, load_tokenizer, lora_config, torch_dtype
from ..rewarding.scoring import RewardFunc, name_of, require_columns
from ..runtime import device, mesh, together
from ..trainer import TunixTrainer
from .callbacks import BeforeTraining, ConsoleProgress, MetricsFile, SaveOnSigterm
from .curves import CURVES_FILE, plot_training_curves
from .folder import check_output_dir, get_latest_checkpoint, names_folder, resolve_checkpoint, set_aside_previous_run
from .services import log_in

logger = logging.getLogger(__name__)

NUM_SHOWN = 3  # completions printed before and after


def choose_rewards(config: DataConfig, args: GRPOConfig) -> list[RewardFunc]:
    """The reward functions that a configuration names. Sets `args.reward_weights` to a preset's, unless it is given.

    Raises:
        ValueError: an unknown name, or not one weight for each function.
    """
    if config.reward_preset is None:
        functions = [rewards.find_reward(name) for name in config.reward_funcs or [config.right_answers, "format"]]
    else:
        functions, weights = map(list, zip(*rewards.get_preset(config.reward_preset), strict=True))
        args.reward_weights = args.reward_weights or weights
    weights = args.reward_weights
    twice = {name for name, count in Counter(map(name_of, functions)).items() if count > 1}
    require(not twice, "reward_funcs", config.reward_funcs, f"{', '.join(twice)} is there twice")
    right = f"{len(functions)} reward functions need as many weights"
    require(weights is None or len(weights) == len(functions), "reward_weights", weights, right)
    return functions


def build_trainer(
    model_config: ModelConfig, data_config: DataConfig, args: GRPOConfig, callbacks: Sequence[TrainerCallback] = ()
) -> TunixTrainer:
    """Load model, tokenizer, data and rewards, and put them together.

    Raises:
        ValueError: any of them can't be had.
    """
    reward_funcs = choose_rewards(data_config, args)
    judge = rewards.find_reward(data_config.judge_in_force)

    def check_first(row: Row) -> None:
        """Of a stream more is not known now."""
        if args.use_grpo:
            require_columns(reward_funcs, [row])
        else:
            completion_of(row)

    train_rows, eval_rows = load_data(data_config, args.seed, check_first)
    if args.use_grpo and isinstance(train_rows, list):  # before a large model is loaded
        require_columns(reward_funcs, train_rows)
    unanswered = bool(eval_rows) and not any(has_column(row, "answer") for row in eval_rows)
    if unanswered and not args.use_grpo and data_config.judge is None:
        reward_funcs, judge, args.reward_weights = [], None, None  # of completions that are learned the loss is enough
    elif eval_rows:
        require_columns([judge], eval_rows, "judge")
    tokenizer = load_tokenizer(model_config.model_name)
    for name, value in (
        ("early_stopping_patience", args.early_stopping_patience),
        ("load_best_model_at_end", args.load_best_model_at_end),
        ("save_strategy", args.save_strategy == "best" and "best"),
        ("lr_scheduler_type", args.follows_metric and args.lr_scheduler_type.value),
    ):
        right = "evaluations decide this, and there are no evaluation rows: give val_data_path or train_fraction"
        require(bool(eval_rows) or not value, name, value, right)
    if not eval_rows and args.eval_strategy != "no":
        logger.warning("There are no evaluation rows (val_data_path, train_fraction), so nothing is evaluated.")
        args.eval_strategy = "no"
    model = load_model(model_config.model_name, torch_dtype(model_config.model_dtype))
    has_adapter = isinstance(model, PeftModel)
    if has_adapter and together.is_first():
        lora = f"rank {model_config.lora_rank}, alpha {model_config.lora_alpha:g}"
        further = "" if args.reference == "base" else "; it is the reference policy, as it is now"
        print(f"{model_config.model_name}: an adapter ({lora}), trained further{further}")
    trainer = TunixTrainer(
        model,
        reward_funcs,
        args,
        train_rows,
        eval_rows or None,
        processing_class=tokenizer,
        peft_config=None if has_adapter else lora_config(model_config),
        callbacks=[MetricsFile(), ConsoleProgress(), *callbacks],
        judge=judge,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def settings_in_force(model_config: ModelConfig, data_config: DataConfig, args: GRPOConfig) -> dict[str, Any]:
    """What a run's config.json holds. Fills in what an adapter that is trained further and a preset decide.

    Raises:
        ValueError: an unknown reward, or a LoRA that is not that of the adapter.
    """
    name = model_config.model_name
    if base_model_name(name) != name:
        adapter = LoraConfig.from_pretrained(name)
        model_config.take_from_adapter(adapter.r, adapter.lora_alpha, adapter.lora_dropout)
    choose_rewards(data_config, args)
    return settings_of(model_config, data_config, args)


def train(
    config: GRPOTrainingConfig | ModelConfig, data_config: DataConfig | None = None, args: GRPOConfig | None = None
) -> TunixTrainer:
    """Run a whole job: set up, evaluate, train, evaluate, save. Everything is written to `args.output_dir`.

    A finished run that is resumed is left as it is, but for final files that are missing.

    Args:
        config: everything at once, in groups; or the model, followed by the data and the arguments.

    Raises:
        ValueError: a setting, file, model or data set that can't work; nothing has been written or moved then.
        SystemExit: with code 143, after SIGTERM: the step was finished and a checkpoint saved.
    """
    mesh.use_mesh((config.model if isinstance(config, GRPOTrainingConfig) else config).mesh)  # before args are made
    if isinstance(config, GRPOTrainingConfig):
        if data_config is not None or args is not None:
            raise ValueError("train: a GRPOTrainingConfig is the whole job; leave out data_config and args")
        model_config, data_config, args = config.flat()
    else:
        model_config, data_config, args = config, data_config or DataConfig(), args or GRPOConfig()
    with _without_empty_folders(Path(args.output_dir)):
        return _train(model_config, data_config, args)


@contextlib.contextmanager
def _without_empty_folders(folder: Path) -> Iterator[None]:
    """Where it ends by an exception, remove the folders that came to be for this one if there is nothing in them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in missing if together.is_first() else ():
            with contextlib.suppress(OSError):  # it holds something, or never came to be
                path.rmdir()
        raise


def _train(model_config: ModelConfig, data_config: DataConfig, args: GRPOConfig) -> TunixTrainer:
    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir)
    checkpoint = together.decided_by_first(lambda: resolve_checkpoint(args.resume_from_checkpoint, output_dir))
    settings = settings_in_force(model_config, data_config, args)
    if checkpoint is not None:
        check_same_run(settings, checkpoint)
    sigterm = SaveOnSigterm(together.anyone)
    trainer = build_trainer(model_config, data_config, args, [sigterm])

    here, finished = False, False
    if checkpoint is not None:
        args.eval_on_start = False  # the run that is resumed has done it
        here = Path(checkpoint).resolve().parent == output_dir.resolve()
        finished = together.decided_by_first(lambda: trainer.is_finished(checkpoint))
        newest = not names_folder(args.resume_from_checkpoint) and together.num_hosts() == 1
        # without a checkpoint after the last step, the final files alone say that it was taken
        if here and (finished or newest) and together.decided_by_first(lambda: _is_complete(trainer)):
            return _leave_complete(trainer, checkpoint if finished else None)

    def begin() -> None:
        """Make the folder that of this run."""
        together.wait()  # all have read what is in it
        if together.is_first():
            if not here:
                set_aside_previous_run(output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            if not (finished and (output_dir / CONFIG_FILE).is_file()):
                save_config(settings, output_dir / CONFIG_FILE)
            _describe(trainer, model_config.model_name)
            if checkpoint is not None and not finished:
                print(f"Continuing from {checkpoint}", flush=True)

    if not finished:  # as late as can be: what fails before leaves an earlier run where it is
        ready = [lambda: together.decided_by_first(lambda: log_in(trainer)), begin]
        trainer.callback_handler.callbacks[:0] = map(BeforeTraining, ready)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        newest = get_latest_checkpoint(output_dir)
        how = f"--resume_from_checkpoint latest (run_training.py: checkpoint_dir={output_dir})"
        hint = f"{how} continues from {newest}" if newest else "there is no checkpoint yet"
        print(f"\nStopped at step {trainer.state.global_step}; {hint}", file=sys.stderr)
        raise
    if sigterm.stopped:
        if together.is_first():
            where = f"--resume_from_checkpoint latest continues from {get_latest_checkpoint(output_dir)}"
            print(f"\nStopped by SIGTERM after step {trainer.state.global_step}; {where}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    if finished:
        begin()
    _write_final_files(trainer)
    if together.is_first():
        seconds = time.perf_counter() - started
        print(f"\n{seconds:.0f} s, {device.memory_summary()}. Adapter, metrics and curves: {output_dir}")
    return trainer


def _is_complete(trainer: TunixTrainer) -> bool:
    """Whether the folder holds the final files of a run that has no step left to do."""
    output_dir = trainer.args.output_dir
    return has_final_files(output_dir) and trainer.is_finished(output_dir)


def _leave_complete(trainer: TunixTrainer, checkpoint: str | None) -> TunixTrainer:
    """Give the trainer what a complete run came to: a checkpoint of its last step, or, with None, its final files."""
    output_dir = Path(trainer.args.output_dir)
    if checkpoint is not None:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(output_dir)), trainer.model.active_adapters[0])
        trainer.stay_finished(output_dir)
    if together.is_first():
        if not (output_dir / CURVES_FILE).is_file():
            plot_training_curves(output_dir)
        print(f"Adapter, metrics and curves: {output_dir}; resume_from_checkpoint=false begins a new run")
    return trainer


def _describe(trainer: TunixTrainer, model_name: str) -> None:
    others = f", {together.count()} processes" if together.count() > 1 else ""
    others += f", {together.num_hosts()} hosts" if together.num_hosts() > 1 else ""
    print(f"{'GRPO' if trainer.args.use_grpo else 'SFT'} of {model_name} on {mesh.describe()}{others}")
    num_rows = len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else "streamed"
    print(f"{num_rows} training rows, {len(trainer.eval_dataset or [])} evaluation rows", flush=True)


def _write_final_files(trainer: TunixTrainer) -> None:
    """What follows the last step: an evaluation where it had none, adapter, state, curves, and the comparison."""
    args, state = trainer.args, trainer.state
    best = state.best_global_step if args.load_best_model_at_end else None
    if best is not None and together.is_first():
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        print(f"The best model, with {name} {state.best_metric:.4g}, is that of step {best}")
    last = evaluations(trainer)[-1]["step"]
    if trainer.eval_dataset is not None and (last != state.global_step or best not in (None, last)):
        trainer.evaluate()  # the last step was not one of eval_steps, or the best model is an earlier one
    trainer.save_model()
    trainer.save_state()
    if together.is_first():
        plot_training_curves(args.output_dir)
        if trainer.eval_dataset is not None:
            print_comparison(trainer)


def evaluations(trainer: TunixTrainer) -> list[dict[str, float]]:
    """The logged evaluations, oldest first; one without anything when there was none."""
    return [row for row in trainer.state.log_history if "eval_runtime" in row] or [{"step": -1}]


def print_comparison(trainer: TunixTrainer) -> None:
    """Accuracy before and after, and a few answers of each; the loss where nothing is judged."""
    rows = evaluations(trainer)
    names = [name for name in rows[0] if name == "eval_accuracy" or name.startswith("eval_mean@")]
    print(f"\n{'on held-out questions':<24}{'before':>10}{'after':>10}")
    for name in names:
        label = "greedy pass@1" if name == "eval_accuracy" else f"{name.removeprefix('eval_')} (sampled)"
        print(f"{label:<24}{rows[0][name]:>10.1%}{rows[-1][name]:>10.1%}")
    if trainer.judge is None:
        print(f"{'loss':<24}{rows[0]['eval_loss']:>10.4f}{rows[-1]['eval_loss']:>10.4f}")
        return
    first, last = trainer.first_answers, trainer.last_answers
    if last is None:  # a finished run that is resumed was evaluated by another process
        return
    changed = [i for i in range(len(last.right)) if first.right[i] != last.right[i]]
    for i in (changed or list(range(len(last.right))))[:NUM_SHOWN]:
        print(f"\n{question_of(trainer.eval_dataset[i])}  (answer: {answer_text(trainer.eval_dataset[i])})")
        for label, answers in (("before", first), ("after", last)):
            if label == "before" and first is last:
                continue  # a resumed run has not seen what was answered before
            verdict = "right" if answers.right[i][0] else "wrong"
            text = answers.completions[i][0].replace("\n", " \u23ce ")
            print(f"  {label:<7}{verdict:<7}{text}")
