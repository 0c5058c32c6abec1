"""`python -m crosscheck`: the same as `tunix-torch crosscheck`, see `tunix_torch/cli/crosscheck.py`."""

from tunix_torch.cli.crosscheck import main
from tunix_torch.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
