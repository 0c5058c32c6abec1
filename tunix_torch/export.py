"""`python -m tunix_torch.export`: the same as `tunix-torch export`, see `cli/export.py`."""

from .cli.export import main
from .cli.script import run_script

if __name__ == "__main__":
    run_script(main)
