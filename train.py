"""`python train.py`: the same as `tunix-torch train`, see `tunix_torch/cli/train.py`."""

from tunix_torch.cli.script import run_script
from tunix_torch.cli.train import main

if __name__ == "__main__":
    run_script(main)
