"""`python -m tunix_torch.replay`: the same as `tunix-torch replay`, see `cli/replay.py`."""

from .cli.replay import main
from .cli.script import run_script

if __name__ == "__main__":
    run_script(main)
