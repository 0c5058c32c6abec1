"""Call the scripts as a user does, in a process of their own or in this one, and check how they refuse."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The flags of a job that is planned in seconds, for any small model.
SMALL_JOB = ["--use_grpo", "--per_device_train_batch_size", 2, "--max_prompt_length", 16, "--generation_max_length", 8]


def run(script, *args, cwd=ROOT, cache=None, timeout=120, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("USE_TORCH_XLA", "TORCH_DEVICE_BACKEND_AUTOLOAD")}
    env = {**inherited, "TUNIX_DEVICE": "cpu", "PYTHONPATH": str(ROOT), **environment}
    if cache:
        env["TUNIX_CACHE"] = cache
    command = [str(ROOT / script)] if script.endswith(".sh") else [sys.executable, str(ROOT / script)]
    return subprocess.run(
        [*command, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )


def refused(result, *words):
    """Check that a script ended with code 2 and one error line that has all these words, without a traceback."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
