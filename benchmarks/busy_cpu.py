"""Measure what it costs that OpenMP's threads spin while they wait, on quiet cores and beside a job that uses them too.

Run it as `python -m benchmarks.busy_cpu`. The default job takes four steps with GNU's own number of turns and with the
number that `runtime/choice.py` sets, one after the other, alone and beside a process that multiplies matrices.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tunix_torch.runtime.choice import SPINS_OF_THREADS

ROOT = Path(__file__).parent.parent
SPINS = {"GNU's 300,000 turns": "300000", "ours": SPINS_OF_THREADS}
OTHER = "import torch; torch.set_num_threads(1); a = torch.randn(256, 256)\nwhile True: a @ a"
ROUNDS, STEPS = 2, 4


def seconds(spins: str) -> float:
    """The median seconds of a step of the default job."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--use_grpo --max_steps {STEPS} --eval_strategy no --eval_on_start false --save_strategy no"
        command = [sys.executable, "train.py", *flags.split(), "--output_dir", folder]
        environment = os.environ | {"TUNIX_DEVICE": "cpu", "GOMP_SPINCOUNT": spins}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return statistics.median(row["step_seconds"] for row in rows if "step_seconds" in row)


def main() -> None:
    for beside in (False, True):
        other = subprocess.Popen([sys.executable, "-c", OTHER]) if beside else None
        try:
            found: dict[str, list[float]] = {name: [] for name in SPINS}
            for _ in range(ROUNDS):
                for name, spins in SPINS.items():
                    found[name].append(seconds(spins))
        finally:
            if other is not None:
                other.kill()
        for name, values in found.items():
            where = "beside another job" if beside else "alone"
            print(f"{where}, {name}: {statistics.median(values):.2f} s a step ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
