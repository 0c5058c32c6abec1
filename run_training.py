"""`python run_training.py`: train from sections with Hydra, see `tunix_torch/cli/sections.py`.

python run_training.py                                       # the tiny model, offline
python run_training.py model=gemma3_270m training.micro_batch_size=1
python run_training.py +experiment=quick_test
python run_training.py --multirun optimizer.learning_rate=1e-6,3e-6,1e-5
"""

from pathlib import Path

from tunix_torch.cli.script import run_script
from tunix_torch.cli.sections import main

CONF = Path(__file__).parent / "conf"

if __name__ == "__main__":
    run_script(lambda: main(CONF))
