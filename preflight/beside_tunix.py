"""`python -m preflight.beside_tunix`: the same as `tunix-torch beside_tunix`, see `tunix_torch/cli/beside_tunix.py`."""

from tunix_torch.cli.beside_tunix import main
from tunix_torch.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
