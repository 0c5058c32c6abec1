"""The command `tunix-torch` works, its wheel is whole, and one line says what to install where an extra is missing."""

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import setuptools

from tunix_torch.cli import sections
from tunix_torch.cli.command import COMMANDS, main
from tunix_torch.run.curves import plot_training_curves

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Top-level names of the packages that only the extras bring.
OF_EXTRAS = (
    "hydra",
    "omegaconf",
    "matplotlib",
    "tensorflow_datasets",
    "array_record",
    "kagglehub",
    "tunix",
    "trl",
    "jax",
    "torch_xla",
)


@pytest.mark.parametrize("argv", [["--help"], ["-h"]])
def test_help_lists_the_commands(argv, capsys):
    main(argv)
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            [],
            "no command: choose one of train, evaluate, ask, export, report, diagnose, replay, plan, beside_tunix, "
            "crosscheck",
        ),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["ask", "--question", "1", "--top_p", "2"], "top_p=2.0: must be in (0, 1]"),
        (["plan"], "--topology"),
        (["export", "outputs"], "--merged"),
        (["crosscheck", "--json", "no/such/folder/a.json"], "json='no/such/folder/a.json'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def test_help_of_all_but_train_comes_without_loading_pytorch():
    """The help of `train` must load PyTorch, since its flags are the fields of a dataclass of Transformers."""
    code = (
        "import sys\n"
        "from tunix_torch.cli.command import COMMANDS, main\n"
        "for name in [*COMMANDS][1:]:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print({'torch', 'transformers'} & set(sys.modules))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.endswith("set()\n"), result.stderr
    assert all(f"usage: tunix-torch {name} " in result.stdout for name in [*COMMANDS][1:])


def test_a_flag_wins_over_an_environment_that_names_no_device():
    code = (
        "from tunix_torch.cli.command import main; main(['ask', '--question', '?', '--device', {!r}, '--top_k', '-1'])"
    )
    for device in ("cpu", "quantum"):
        environment = {**os.environ, "TUNIX_DEVICE": "abacus"}
        command = [sys.executable, "-c", code.format(device)]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 2 and result.stderr.startswith("error: top_k=-1"), result.stderr


# ---- the wheel ----


def test_the_wheel_has_one_package_with_every_room_and_the_command():
    found = setuptools.find_packages(str(ROOT), include=PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tunix_torch").rglob("*.py")}
    assert {name.replace(".", "/") for name in found} == set(map(str, folders))
    assert {name.partition(".")[0] for name in found} == {"tunix_torch"}
    others = {
        path for path in (ROOT / "tunix_torch").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    listed = PROJECT["tool"]["setuptools"]["package-data"]
    assert others == {
        path for name, globs in listed.items() for g in globs for path in (ROOT / name.replace(".", "/")).glob(g)
    }
    assert PROJECT["project"]["scripts"] == {"tunix-torch": "tunix_torch.cli.command:main"}


def test_what_an_extra_brings_is_no_requirement():
    names = [word.replace("-", "_") for word in PROJECT["project"]["dependencies"]]
    assert not [name for name in names if name.startswith((*OF_EXTRAS, "google_tunix"))]
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["all"] == [f"tunix-torch[{','.join(name for name in extras if name != 'all')}]"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder like site-packages after `pip install tunix-torch` without extras: `tunix_torch` and what it needs."""
    folder = tmp_path_factory.mktemp("site-packages")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith((*OF_EXTRAS, "google_tunix", "libtpu")):
            (folder / path.name).symlink_to(path)
    if not (folder / "tunix_torch").exists():
        (folder / "tunix_torch").symlink_to(ROOT / "tunix_torch")
    return folder


def run(installed, *argv, cwd, **environment):
    """Run `python -m tunix_torch.cli ARGV` with only the packages in `installed`; -S leaves out all others."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("USE_TORCH_XLA", "TORCH_DEVICE_BACKEND_AUTOLOAD")}
    environment = {**inherited, "PYTHONPATH": str(installed), **environment}
    command = [sys.executable, "-S", "-m", "tunix_torch.cli", *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_it_trains_without_the_extras_and_says_that_no_curves_are_drawn(installed, cache, tmp_path):
    small = "--max_steps 2 --batch_size 2 --num_eval_rows 4 --num_train_rows 16 --max_completion_length 12"
    result = run(installed, "train", "--use_grpo", *small.split(), cwd=tmp_path, TUNIX_CACHE=cache, TUNIX_DEVICE="cpu")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "outputs" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "outputs" / "training_curves.png").exists()
    assert "not drawn: matplotlib is not installed: pip install 'tunix-torch[plots]'" in result.stderr


@pytest.mark.parametrize(
    "argv, words",
    [
        (["plan", "--topology", "v5e:2x4", "--quick"], "pip install 'torch-xla[tpu]==2.9.0'"),
        (["crosscheck"], "pip install jax==0.10.2 google-tunix==0.1.7"),
    ],
)
def test_a_command_whose_extra_is_missing_says_what_to_install(argv, words, installed, tmp_path):
    result = run(installed, *argv, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert [words in line for line in result.stderr.splitlines()] == [True]


def test_without_hydra_or_matplotlib_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run_training.py needs hydra.*pip install 'tunix-torch\[hydra\]'"):
        sections.main(ROOT / "conf", [])
    assert plot_training_curves(tmp_path) is None
    assert len(capsys.readouterr().err.splitlines()) == 1
