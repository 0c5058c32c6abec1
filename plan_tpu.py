"""`python plan_tpu.py`: the same as `tunix-torch plan`, see `tunix_torch/cli/plan.py`."""

from tunix_torch.cli.plan import main
from tunix_torch.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
