"""`python -m tunix_torch.diagnose`: the same as `tunix-torch diagnose`, see `cli/diagnose.py`."""

from .cli.diagnose import main
from .cli.script import run_script

if __name__ == "__main__":
    run_script(main)
