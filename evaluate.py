"""`python evaluate.py`: the same as `tunix-torch evaluate`, see `tunix_torch/cli/evaluate.py`."""

from tunix_torch.cli.evaluate import main
from tunix_torch.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
