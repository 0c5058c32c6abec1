"""`python report.py`: the same as `tunix-torch report`, see `tunix_torch/cli/report.py`."""

from tunix_torch.cli.report import main
from tunix_torch.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
