"""The Hydra app behind run_training.py: one job, or a sweep of several, from sections."""

import contextlib
import gc
import io
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..compat.agent_tunix import GRPOTrainingConfig, unknown_setting
from ..config.model import TINY_NAME
from ..data.visible import visible
from ..report.metrics import load_metrics
from ..run.job import train

NUM_LAST_STEPS = 10  # whose mean reward a sweep's table shows


@dataclass
class Job:
    """What became of one run; a sweep has several."""

    number: int
    overrides: list[str]
    output_dir: str
    seconds: float = 0.0
    error: str | None = None
    exit_code: int = 0
    results: dict[str, float] = field(default_factory=dict)


# ---- one job ----


def config_from(config: DictConfig, run_dir: str, subfolder: str = "") -> GRPOTrainingConfig:
    """The job that a composed configuration describes.

    Args:
        run_dir: where it is written, unless it has an output_dir or a checkpoint_dir.
        subfolder: goes below these two, so that the jobs of a sweep do not share a folder.

    Raises:
        ValueError: an unknown name, or a value that can't be.
    """
    settings: Any = OmegaConf.to_container(config, resolve=True)
    for name in ("output_dir", "checkpoint_dir"):
        if settings[name] is not None:
            settings[name] = os.path.join(str(settings[name]), subfolder)
    if settings["model"]["model_name"] == TINY_NAME and settings["model"]["model_size"] is not None:
        size = settings["model"]["model_size"]
        raise ValueError(f"model.model_size={size!r}: the settings are the tiny model's; choose model=gemma3_{size}")
    if settings["checkpoint_dir"] is None:
        settings["output_dir"] = settings["output_dir"] or run_dir
    return GRPOTrainingConfig.from_dict(settings)


def results_of(output_dir: str) -> dict[str, float]:
    """The last evaluation of a run, and the mean reward of its last steps."""
    rows = load_metrics(output_dir)
    last = next((row for row in reversed(rows) if "eval_accuracy" in row), {})
    results = {
        n.removeprefix("eval_"): v for n, v in last.items() if n == "eval_accuracy" or n.startswith("eval_mean@")
    }
    rewards = [row["reward"] for row in rows if "reward" in row][-NUM_LAST_STEPS:]
    return results | ({"reward": sum(rewards) / len(rewards)} if rewards else {})


class Tee(io.TextIOBase):
    """Writes to two files at once."""

    def __init__(self, *files: TextIO) -> None:
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            file.write(text)
        return len(text)

    def flush(self) -> None:
        for file in self.files:
            file.flush()

    def isatty(self) -> bool:
        return self.files[0].isatty()


@contextlib.contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """What is printed within also goes to a file, and so does the error it ends with. Progress bars are on stderr."""
    with open(path, "a", buffering=1, encoding="utf-8") as file, contextlib.redirect_stdout(Tee(sys.stdout, file)):
        try:
            yield
        except ValueError as error:
            print(f"error: {error}", file=file)
            raise
        except BaseException:
            traceback.print_exc(file=file)
            raise


# ---- a sweep ----


def table(jobs: list[Job]) -> str:
    """One line for each job, with its own overrides and its results. A failed job shows its error."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    overrides = [" ".join(word for word in job.overrides if word not in common) for job in jobs]
    columns = list(dict.fromkeys(name for job in jobs for name in job.results if name != "reward")) + ["reward"]
    width = max(map(len, ["overrides", *overrides]))
    names = {"accuracy": "greedy", "reward": "reward at end"}
    lines = [f"  # {'overrides':<{width}}{''.join(f'{names.get(n, n):>15}' for n in columns)}{'seconds':>9}"]
    for job, told in zip(jobs, overrides, strict=True):
        shown = "".join(_cell(name, job.results.get(name)) for name in columns) + f"{job.seconds:>9.0f}"
        lines.append(f"{job.number:>3} {told:<{width}}" + (shown if job.error is None else f"  failed: {job.error}"))
    return "\n".join(lines)


def _cell(name: str, value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.3f}' if name == 'reward' else f'{value:.1%}':>15}"


# ---- the app ----


def explain(error: Exception) -> ValueError:
    """Hydra's error about the command line, in the words of the other scripts where it is about a name."""
    if isinstance(error, MissingConfigException) and error.options:
        section, _, name = error.missing_cfg_file.rpartition("/")
        return ValueError(f"{section}={name!r}: choose one of {', '.join(error.options)}")
    name = re.match(r"Could not override '([\w.]+)'", str(error))
    if name and name[1] != "experiment":  # of which Hydra says that it is +experiment
        return unknown_setting(name[1])
    return ValueError(str(error))


class App:
    """Runs what Hydra composes, one job after the other, and keeps what became of each."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.sweep_dir: Path | None = None  # None: not a sweep
        self.error_alone: Exception | None = None  # of the only job

    def run(self, config: DictConfig) -> None:
        """Run a job. One that fails does not stop a sweep: the error is kept in its `Job`."""
        context = HydraConfig.get()
        run_dir = os.path.relpath(context.runtime.output_dir)
        self.sweep_dir = Path(context.sweep.dir) if context.mode == RunMode.MULTIRUN else None
        number = context.job.num if self.sweep_dir else 0
        job = Job(number, list(context.overrides.task), run_dir)
        self.jobs.append(job)
        started = time.perf_counter()
        try:
            with printed_to(Path(run_dir) / "train.log"):
                settings = config_from(config, run_dir, str(number) if self.sweep_dir else "")
                job.output_dir = settings.checkpoint_dir or settings.output_dir
                train(settings)
            job.results = results_of(job.output_dir)
        except KeyboardInterrupt:
            job.error, job.exit_code, job.seconds = "interrupted", 130, time.perf_counter() - started
            raise
        except Exception as error:  # the other jobs of a sweep run all the same
            self._keep_error(job, error)
        job.seconds = time.perf_counter() - started
        gc.collect()  # a trainer is part of cycles; its model must go before the next one comes

    def _keep_error(self, job: Job, error: Exception) -> None:
        job.error = " ".join(str(error).split()) or type(error).__name__
        job.exit_code = 2 if isinstance(error, ValueError) else 1
        if not self.sweep_dir:
            self.error_alone = error
        elif job.exit_code == 2:
            print(f"error: {visible(job.error)}", file=sys.stderr)
        else:
            traceback.print_exc()

    def report(self) -> None:
        """Write and print a sweep's results."""
        if self.sweep_dir:
            path = self.sweep_dir / "sweep.json"
            path.write_text(json.dumps([asdict(job) for job in self.jobs], indent=2) + "\n")
            print(f"\n{table(self.jobs)}\n{path}")


def run_app(conf: Path, words: Sequence[str]) -> None:
    """Compose settings from the files in `conf` and the words of the command line, and run the job or jobs.

    Raises:
        ValueError: Hydra does not take a word, or the only job can't work.
        SystemExit: with the exit code, 0 where all went well.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors then, instead of printing them and exiting
    sys.argv[1:] = [re.sub(r"^\+{0,2}args\.", "++args.", word) for word in words]  # whether it is there or not
    app = App()

    def task(config: DictConfig) -> None:
        app.run(config)

    try:
        hydra.main(version_base="1.3", config_path=str(conf.resolve()), config_name="config")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    finally:
        app.report()
    if app.error_alone is not None:  # raised here, since Hydra would print a line of its own above it
        raise app.error_alone
    sys.exit(min((job.exit_code for job in app.jobs if job.exit_code), default=0))
