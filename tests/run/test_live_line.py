"""The live line stays below what others print, fits the terminal, and is gone when it ends, however that happens."""

import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
from types import SimpleNamespace

import pytest
from commands import ROOT
from transformers import TrainerState

from tunix_torch.run import terminal
from tunix_torch.run.terminal import SPARKS, sparkline, summary, takes_unicode, trend

# ---- a terminal ----


class Screen:
    """What a terminal of so many columns shows: it knows the few codes that the line may use, and no others."""

    def __init__(self, columns):
        self.columns, self.lines, self.column, self.shown = columns, [""], 0, set()

    def feed(self, text):
        for code, character in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|(.)", text, re.DOTALL):
            if code == "\x1b[2K":
                self.lines[-1] = ""
            elif code:
                assert re.fullmatch(r"\x1b\[[0-9;]*m", code), f"{code!r} is no colour"
            elif character == "\r":
                self.column = 0
            elif character == "\n":
                self.lines.append("")
            else:
                if self.column == self.columns:
                    self.lines.append("")
                    self.column = 0
                line = self.lines[-1].ljust(self.column)
                self.lines[-1] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1
                self.shown.add(self.lines[-1].rstrip())
        return self


def in_terminal(code, columns=80, act=None, **environment):
    """Run Python code in a terminal. Returns the exit status, what was written, and the screen at the end.

    `act(process, text)` is called with what was written so far.
    """
    process, terminal = pty.fork()
    if process == 0:
        settled = {"TUNIX_DEVICE": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TERM": "xterm"}
        settled["COLUMNS"] = "80"  # as it was when a shell exported it, before the window was made narrow
        environment = settled | environment
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.execvpe(sys.executable, [sys.executable, "-c", code], os.environ | environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
            if act is not None:
                act(process, written.decode(errors="replace"))
    except OSError:  # the other end was closed
        pass
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    text = written.decode()
    return os.waitstatus_to_exitcode(status), text, Screen(columns).feed(text)


LINE = """
import os, sys, time
from rich.text import Text
from tunix_torch.runtime import phases
from tunix_torch.run.live import LiveLine
count = iter(range(10**6))
line = LiveLine(lambda width: Text(f"live {next(count)} " + "x" * 200, style="red"))
"""


def shown_lines(screen):
    return [line.rstrip() for line in screen.lines]


@pytest.mark.parametrize("columns", [80, 40])
def test_what_others_print_stands_above_it_and_it_is_gone_at_the_end(columns):
    code = LINE + (
        "line.start()\n"
        "for i in range(3):\n    time.sleep(0.5); print('out', i); print('err', i, file=sys.stderr)\n"
        "print('half', end='', flush=True); time.sleep(0.5); print(' whole')\n"
        "time.sleep(0.5); line.stop(); line.stop(); print('after')\n"
    )
    status, text, screen = in_terminal(code, columns)
    expected = [f"{name} {i}" for i in range(3) for name in ("out", "err")] + ["half whole", "after", ""]
    assert status == 0 and shown_lines(screen) == expected, text
    live = {line for line in screen.shown if line.startswith("live")}
    assert live and max(map(len, live)) == columns - 1, "it fills the terminal and never wraps"


def test_an_error_leaves_nothing_behind():
    code = LINE + (
        "class Watcher:\n    close = line.stop\n"
        "phases.watch(Watcher())\n"
        "with phases.closing():\n    line.start(); time.sleep(0.5); raise SystemExit('failed')\n"
    )
    status, text, screen = in_terminal(code)
    assert status == 1 and "live 0" in text and shown_lines(screen) == ["failed", ""]


def test_ctrl_c_leaves_nothing_behind():
    code = LINE + (
        "class Watcher:\n    close = line.stop\n"
        "phases.watch(Watcher())\n"
        "try:\n"
        "    with phases.closing():\n        line.start(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopped')\n"
    )
    asked = []

    def interrupt(process, text):
        if "live 0" in text and not asked:
            asked.append(os.kill(process, signal.SIGINT))

    status, text, screen = in_terminal(code, act=interrupt)
    assert status == 0 and shown_lines(screen)[-2:] == ["stopped", ""] and "live" not in "".join(screen.lines), text


def test_a_forked_process_prints_without_it():
    """It has no thread that draws, and another thread may have held the lock."""
    code = LINE + (
        "line.start(); line._lock.acquire()\n"  # the lock is this thread's, as it would be another one's
        "if os.fork() == 0:\n    print(type(sys.stdout).__name__, flush=True); os._exit(0)\n"
        "os.wait(); line._lock.release(); line.stop()\n"
    )
    status, text, screen = in_terminal(code)
    assert status == 0 and "TextIOWrapper" in text


@pytest.mark.parametrize("environment, colours", [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_respected(environment, colours):
    _, text, _ = in_terminal(LINE + "line.start(); time.sleep(0.5); line.stop()", **environment)
    assert "live 0" in text and ("\x1b[31m" in text) == colours


# ---- what it says ----


def test_the_line_says_what_fits_with_what_matters_most_first(monkeypatch):
    """At step 20 of 30, of which 10 were done by an earlier start: 100 seconds of steps and 30 of an evaluation."""
    seconds = [0.0]
    monkeypatch.setattr(terminal, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    history = [{"step": step, "reward": 1.0} for step in range(1, 11)] + [{"step": 10, "eval_accuracy": 0.5}]
    now = terminal.Now(TrainerState(global_step=10, max_steps=30, log_history=history))
    now.line.stop()
    now.unicode = True
    now.began("rollout")
    assert now.text(80).plain.split() == ["step", "10/30", "reward", "1.000", "→", "accuracy", "50.0%", "→", "rollout"]
    now.ended("rollout")
    for seconds[0], change in ((40.0, now.began), (70.0, now.ended)):
        change("evaluating")
    for step in range(11, 21):
        now.logged({"reward": 1.5, "rollout_tokens_per_second": 12345.6, "loss": 0.0})
        now.stepped(step)
    now.logged({"eval_accuracy": 0.625})
    seconds[0] = 130.0
    now.began("scoring")
    now.advanced("rows", 3, 8)
    now.widest = 0  # the phase before was shorter
    narrow = now.text(40)
    assert narrow.plain.rstrip() == "step 20/30  1:40 left  scoring 3/8"
    wide = now.text(80)
    assert wide.plain.rstrip() == "step 20/30  1:40 left  reward 1.500 ↗  accuracy 62.5% ↗  scoring 3/8 rows"
    assert len(narrow.plain.rstrip()) <= 40 and len(wide.plain.rstrip()) <= 80
    everything = "step 20/30  1:40 left  reward 1.500 ↗  accuracy 62.5% ↗  12,346 tokens/s  scoring 3/8 rows"
    assert now.text(100).plain.rstrip() == everything
    now.began("evaluating")
    for how, shown in (("greedy", "3/8 greedy"), ("x 4 samples", "3/8 x 4 samples"), ("", "3/8 questions")):
        now.advanced("questions", 3, 8, how)
        assert now.text(100).plain.rstrip().endswith(f"  evaluating {shown}")
        assert now.text(40).plain.rstrip().endswith("  evaluating 3/8")
    now.ended("evaluating")
    now.widest = 0
    now.unicode = False
    now.logged({"eval_accuracy": 0.5})
    assert now.text(100).plain.rstrip() == everything.replace("62.5% ↗", "50.0% \\").replace("↗", "/")


# ---- a job ----

JOB = """
from runs import run
from tunix_torch.run import live
live.INTERVAL = 0.01  # so that short phases are seen, too
def fails(completions, trainer_state, **columns):
    if trainer_state.global_step == {fails}:
        raise ValueError("no\\x1b[31m more")
    return [float(len(text)) for text in completions]
from tunix_torch.cli.script import quiet_transformers, run_script
from tunix_torch.run import setup
setup.choose_rewards = lambda config, args: [fails]
quiet_transformers()
run_script(lambda: run({model!r}, {folder!r}, disable_tqdm=None, eval_on_start=True, log_completions=True,
    num_completions_to_print=1, max_steps=3, **{settings}))
"""


@pytest.mark.parametrize("columns", [80, pytest.param(40, marks=pytest.mark.thorough)])
def test_a_job_says_what_it_does_and_leaves_its_log(model_folder, tmp_path, columns):
    code = JOB.format(fails=-1, model=model_folder, folder=str(tmp_path), settings={"logging_steps": 1})
    status, text, screen = in_terminal(code, columns)
    lines = shown_lines(screen)
    assert status == 0, text
    live = {line for line in screen.shown if re.match(r"step \d+/3 ", line)}
    for phase in ("evaluating", "rollout", "learning"):
        assert any(phase in line for line in live), (phase, live)
    assert max(map(len, live)) < columns and (columns == 40 or any("reward" in line for line in live))
    assert sum(line.startswith("step    2/3  reward") for line in lines) == 1
    assert not any(re.match(r"step \d+/3 ", line) for line in lines), "a live line was left behind"
    assert any(line.startswith("training reward ") and SPARKS[True][-1] in line for line in lines), lines


def test_a_job_that_fails_ends_with_one_line(model_folder, tmp_path):
    code = JOB.format(fails=1, model=model_folder, folder=str(tmp_path), settings={})
    status, text, screen = in_terminal(code, 3000)
    *_, last, empty = shown_lines(screen)
    assert status == 1 and last.startswith("error: ") and r"no\x1b[31m more" in last and empty == "", text
    assert not any(re.match(r"step \d+/3 ", line) for line in screen.lines), "a live line was left behind"


def test_without_a_terminal_there_is_a_line_a_log_and_no_control_character(model_folder, tmp_path, capfd):
    from runs import run

    run(model_folder, tmp_path, max_steps=3, disable_tqdm=False, log_completions=True, num_completions_to_print=2)
    out = capfd.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out), out
    assert [line[:11] for line in out.splitlines() if line.startswith("step") and "(" in line] == [
        f"step    {step}/3" for step in (1, 2, 3)
    ]
    assert out.count("advantage") == 3 and re.search(r"\ntraining reward +\d", out)


# ---- numbers ----


def test_a_trend_is_more_than_noise():
    assert trend([0.1] * 5 + [0.2] * 5) == "up" and trend([0.2] * 10 + [0.1] * 10) == "down"
    assert trend([0.1, 0.2] * 10) == trend([0.5]) == trend([]) == trend([0.0, 1.0] * 2) == ""


def test_sparklines_have_the_shape_of_the_numbers():
    assert sparkline(range(8), 20) == SPARKS[True] and sparkline(range(8), 20, unicode=False) == SPARKS[False]
    assert sparkline([3.0] * 5, 20) == "▁" * 5 and len(sparkline(range(1000), 40)) == 40
    assert sparkline([0, 0, 1, 1], 2) == "▁█"


SUMMED = [{"reward": step / 100, "loss": 0.1} for step in range(100)]
SUMMED += [
    {"eval_accuracy": v, "eval_mean@8": 0.5, "eval_interval/accuracy_low": 0.2, "eval_interval/accuracy_high": 0.875}
    for v in (0.25, 0.5)
]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_summary_fits_and_shows_first_and_last(width):
    head, greedy, sampled, reward = lines = summary(SUMMED, width)
    assert all(len(line) < width for line in lines) and head.split()[:2] == ["first", "last"]
    assert re.fullmatch(r"accuracy \(greedy\) +25.0%  50.0%( +20.0% to 87.5%)?  ▁█", greedy)
    assert ("20.0% to 87.5%" in greedy) == ("95% interval" in head) == (width > 40)
    assert re.fullmatch(r"mean@8 \(sampled\) +50.0%  50.0% +▁▁", sampled)
    assert re.fullmatch(r"training reward +0.000  0.990 +▁.*█", reward) and len(reward.split()[-1]) >= 4
    assert "".join(summary(SUMMED, width, "ascii")).isascii()
    told = summary(SUMMED, width, temperature=0.7)
    assert told[2].startswith("mean@8 (temperature 0.7)  50.0%" if width > 40 else "mean@8 (sampled)   50.0%")
    assert all(len(line) < width for line in told)


def test_the_summary_shows_what_there_is():
    (_, line) = summary([{"loss": 2.0}, {"loss": 1.0}])
    assert line.split() == ["training", "loss", "2.0000", "1.0000", "█▁"] and summary([]) == []
    once = summary([{"eval_accuracy": 1.0, "eval_loss": 0.5, "rewards/accuracies": 0.5, "eval_sampled/reward": 1}])
    assert [line.split("  ")[0] for line in once[1:]] == ["accuracy (greedy)", "held-out loss", "training pairs right"]
    assert once[1].split("  ")[-1] == "100.0%", "there is nothing to compare it with"


def test_encodings_that_take_no_bars_are_known():
    assert takes_unicode("utf-8") and not any(map(takes_unicode, ("ascii", "latin-1", None, "nonsense")))
