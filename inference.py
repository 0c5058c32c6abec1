"""`python inference.py`: the same as `tunix-torch ask`, see `tunix_torch/cli/ask.py`."""

from tunix_torch.cli.ask import main
from tunix_torch.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
