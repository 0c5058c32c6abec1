"""Runs a whole job: set up, evaluate, train, evaluate, save; resumes a run, and leaves a finished one as it is."""

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

from ..checkpoints.files import STATE_FILE, has_final_files
from ..checkpoints.whole import explaining_full_disk, finish_writing
from ..compat.agent_tunix import GRPOTrainingConfig
from ..config.data import DataConfig
from ..config.grpo import GRPOConfig
from ..config.method import method_name
from ..config.model import ModelConfig
from ..config.saved import CONFIG_FILE, WHOLE_CONFIG_FILE, check_same_run, save_config
from ..report.diagnosis import diagnose
from ..report.findings import in_one_line
from ..report.page import REPORT_FILE, write_report_of_ended_run
from ..report.record import read_run
from ..report.starts import note_start
from ..runtime import device, mesh, together
from ..runtime.columns import columns_of
from ..trainer import TunixTrainer
from .callbacks import BeforeTraining, SaveOnSignal, complete_metrics, signal_name
from .curves import CURVES_FILE, plot_training_curves
from .folder import check_output_dir, get_latest_checkpoint, names_folder, resolve_checkpoint, set_aside_previous_run
from .lock import locked
from .outcome import write_final_files
from .services import log_in
from .setup import build_trainer, settings_in_force
from .terminal import summary


def train(
    config: GRPOTrainingConfig | ModelConfig, data_config: DataConfig | None = None, args: GRPOConfig | None = None
) -> TunixTrainer:
    """Run a whole job: set up, evaluate, train, evaluate, save. Everything is written to `args.output_dir`.

    A finished run that is resumed stays as it is; only final files that are missing are written.

    Args:
        config: either the whole job in sections, or the model's settings, followed by those of data and training.

    Raises:
        ValueError: a setting, file, model or data set that can't work; nothing has been written or moved then.
        KeyboardInterrupt: after Ctrl-C: the step was finished and a checkpoint saved, but not after a second Ctrl-C.
        SystemExit: with code 128 + N, after another signal N that asks to end: likewise.
    """
    mesh.use_mesh((config.model if isinstance(config, GRPOTrainingConfig) else config).mesh)  # before args are made
    if isinstance(config, GRPOTrainingConfig):
        if data_config is not None or args is not None:
            raise ValueError("train: a GRPOTrainingConfig is the whole job; leave out data_config and args")
        model_config, data_config, args = config.flat()
    else:
        model_config, data_config, args = config, data_config or DataConfig(), args or GRPOConfig()
    check_output_dir(args.output_dir, model_config.model_name)
    folder = Path(args.output_dir)
    with explaining_full_disk(folder), _without_empty_folders(folder), _alone_in(args.output_dir):
        return _train(model_config, data_config, args)


@contextlib.contextmanager
def _without_empty_folders(folder: Path) -> Iterator[None]:
    """When the block ends by an exception, remove the folders that were made for this one and are still empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in missing if together.is_first() else ():
            with contextlib.suppress(OSError):  # it holds something, or was never made
                path.rmdir()
        raise


@contextlib.contextmanager
def _alone_in(output_dir: str) -> Iterator[None]:
    """Let no other job write into the folder within this context. The first process sees to that."""
    with contextlib.ExitStack() as stack:
        together.decided_by_first(lambda: stack.enter_context(locked(output_dir)) if together.is_first() else None)
        yield


def _train(model_config: ModelConfig, data_config: DataConfig, args: GRPOConfig) -> TunixTrainer:
    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    config_file = output_dir / (WHOLE_CONFIG_FILE if model_config.trains_all else CONFIG_FILE)
    checkpoint = together.decided_by_first(lambda: _checkpoint(args))
    settings = settings_in_force(model_config, data_config, args)
    if checkpoint is not None:
        check_same_run(settings, checkpoint, args.allow_changes)
    asked = SaveOnSignal(together.anyone)
    trainer = build_trainer(model_config, data_config, args, [asked])
    trainer.facts.settings = settings

    here, finished = False, False
    if checkpoint is None and _asks_for_newest(args) and together.decided_by_first(lambda: _is_complete(trainer)):
        check_same_run(settings, output_dir / STATE_FILE, args.allow_changes)  # it kept no checkpoint
        return _leave_complete(trainer, None)
    if checkpoint is not None:
        args.eval_on_start = False  # the run that is resumed has done it
        here = Path(checkpoint).resolve().parent == output_dir.resolve()
        finished = together.decided_by_first(lambda: trainer.is_finished(checkpoint))
        newest = _asks_for_newest(args)
        # without a checkpoint of the last step, only the final files say that it was taken
        if here and (finished or newest) and together.decided_by_first(lambda: _is_complete(trainer)):
            return _leave_complete(trainer, checkpoint if finished else None)

    def begin() -> None:
        together.wait()  # until all have read what is in the folder
        if together.is_first():
            if not here:
                set_aside_previous_run(output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            if not (finished and config_file.is_file()):
                save_config(settings, config_file)
            if not finished:
                note_start(output_dir, trainer.state.global_step, _facts(trainer))
            _describe(trainer, settings)
            if checkpoint is not None and not finished:
                print(f"Continuing from {checkpoint}", flush=True)

    if not finished:  # as late as possible, so that whatever fails before leaves an earlier run in its place
        ready = [lambda: together.decided_by_first(lambda: log_in(trainer)), begin]
        trainer.callback_handler.callbacks[:0] = map(BeforeTraining, ready)
    _train_until_stopped(trainer, checkpoint, asked)
    if finished:  # it was killed before its last files were there
        begin()
        complete_metrics(output_dir, trainer.state)
        trainer.log_summary(checkpoint)
    is_reported = write_final_files(trainer)
    if together.is_first():
        shown = columns_of(sys.stdout), sys.stdout.encoding, trainer.args.eval_temperature
        lines = summary(trainer.state.log_history, *shown)
        print("\n" * bool(lines) + "\n".join(lines))
        seconds = time.perf_counter() - started
        print(f"\n{seconds:.0f} s, {device.memory_summary()}. {trainer.policy.what}, metrics and curves: {output_dir}")
        if is_reported:
            print(f"What came of it, as a page: {output_dir / REPORT_FILE}")
            if names := [finding.name for finding in diagnose(read_run(output_dir))]:
                print(f"Diagnosis: {in_one_line(names, output_dir)}")
        ours = Path(sys.argv[0]).name in ("train.py", "run_training.py")  # which have inference.py beside them
        ask = "python inference.py" if ours else "tunix-torch ask"
        print(f'Ask it: {ask} --model_path {shlex.quote(str(output_dir))} --question "..."')
    return _uploaded(trainer)


def _uploaded(trainer: TunixTrainer) -> TunixTrainer:
    """The trainer, after what the folder of its finished run holds was uploaded, if `push_to_hub` asks for that."""
    if trainer.args.push_to_hub:
        trainer.upload()
        if together.is_first():
            print(f"Uploaded to {trainer.hub_model_id}")
    return trainer


def _asks_for_newest(args: GRPOConfig) -> bool:
    """Whether a run is to go on from what its folder holds, so that its final files may say that it is finished."""
    asked = args.resume_from_checkpoint
    given = asked is not None and str(asked).lower() not in ("false", "none")
    return given and not names_folder(asked) and together.num_hosts() == 1


def _checkpoint(args: GRPOConfig) -> str | None:
    """The checkpoint that the run goes on from; None: it is a new run."""
    finish_writing(Path(args.output_dir))
    return resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)


def _train_until_stopped(trainer: TunixTrainer, checkpoint: str | None, asked: SaveOnSignal) -> None:
    """Train to the last step. When the user or the machine stops it, say how the run can be continued.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        SystemExit: 128 + N after another signal N that asks to end.
    """
    output_dir = trainer.args.output_dir

    def say(stopped: str) -> None:
        newest = get_latest_checkpoint(output_dir)
        flag = "--resume_from_checkpoint latest"
        if Path(sys.argv[0]).name == "run_training.py":  # whose words are agent-tunix's
            flag = f"checkpoint_dir={output_dir}"
        how = f"the same command with {flag}"
        hint = f"{how} continues from {newest}" if newest else "there is no checkpoint yet"
        print(f"\n{stopped} step {trainer.state.global_step}; {hint}", file=sys.stderr)

    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        say("Stopped at")
        raise
    finally:
        asked.restore()
    if asked.stopped:
        number = asked.told or signal.SIGTERM  # another process was told
        if together.is_first():
            say(f"Stopped by {signal_name(number)} after")
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)


def _is_complete(trainer: TunixTrainer) -> bool:
    """Whether the folder holds the final files of a run that has no step left to do."""
    output_dir = trainer.args.output_dir
    return has_final_files(output_dir) and trainer.is_finished(output_dir)


def _leave_complete(trainer: TunixTrainer, checkpoint: str | None) -> TunixTrainer:
    """Load what a complete run came to from the checkpoint of its last step or, with None, from its final files."""
    output_dir = Path(trainer.args.output_dir)
    if checkpoint is not None:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:
        trainer.policy.load(output_dir)
        trainer.stay_finished(output_dir)
    if together.is_first():
        if not (output_dir / CURVES_FILE).is_file():
            plot_training_curves(output_dir)
        if not (output_dir / REPORT_FILE).is_file():
            write_report_of_ended_run(output_dir)
        print(f"{trainer.policy.what}, metrics and curves: {output_dir}; resume_from_checkpoint=false begins a new run")
    return _uploaded(trainer)


def _machine() -> str:
    """The device, and how many processes and hosts compute together."""
    others = f", {together.count()} processes" if together.count() > 1 else ""
    others += f", {together.num_hosts()} hosts" if together.num_hosts() > 1 else ""
    return f"{mesh.describe()}{others}"


def _facts(trainer: TunixTrainer) -> dict[str, str | int | None]:
    """What is noted of the start of a run, for its report."""
    rows = len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else None
    return {"device": _machine(), "training_rows": rows, "evaluation_rows": len(trainer.eval_dataset or [])}


def _describe(trainer: TunixTrainer, settings: dict[str, Any]) -> None:
    method = method_name(settings)
    print(f"{method[0].upper()}{method[1:]} of {settings['model_name']} on {_machine()}")
    num_rows = len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else "streamed"
    kind = "packed" if trainer.args.packing else "training"
    first = ", asked first" if trainer.args.eval_on_start else ""
    print(f"{num_rows} {kind} rows, {len(trainer.eval_dataset or [])} evaluation rows{first}", flush=True)
