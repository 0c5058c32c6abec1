"""Every block of Python on a page is run by a test, or says in a comment what it needs that is not here.

They run as they stand, with the tiny model in place of a model of the hub, some rows in place of a data set of the hub,
and few steps.
"""

import json
import shutil
from pathlib import Path

import pytest
from how_commands_are_run import NEEDS
from shown_commands import PAGES, ROOT, blocks_of

# The tests that run the blocks of other pages, and how many blocks these are.
ELSEWHERE = {
    "docs/index.md": (1, "tests/test_docs.py::test_the_python_of_the_quick_start_runs"),
    "docs/rewards.md": (3, "tests/rewarding/test_rewards_page.py::test_the_page_has_the_examples_that_are_run_here"),
    "docs/from_trl.md": (4, "tests/compat/test_trl.py::test_the_scripts_of_the_page_run"),  # the first is one import
}
HERE = {"README.md": 1, "docs/data.md": 1, "docs/models.md": 2, "docs/settings.md": 2, "docs/pipeline.md": 1}
ROWS = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(16)]
SMALL = "max_steps=2, per_device_train_batch_size=2, generation_max_length=8, report_to='none', disable_tqdm=True"
GEMMA = '"google/gemma-3-270m-it"'


def python_on(place):
    """The blocks of Python on a page, without those whose first line is a comment such as `# needs a GPU`."""
    blocks = ["\n".join(lines) for _, language, lines in blocks_of(PAGES[place]) if language == "python"]
    return [block for block in blocks if not block.startswith(tuple(f"# needs {what}" for what in NEEDS))]


def test_every_block_of_python_on_a_page_is_run_by_a_test():
    counts = {place: len(python_on(place)) for place in PAGES}
    known = HERE | {place: count for place, (count, _) in ELSEWHERE.items()}
    hint = "run it in this file, or begin it with a comment such as `# needs a GPU`"
    assert {place: count for place, count in counts.items() if count} == known, hint
    for _, place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), place


@pytest.fixture
def execute(cache, tmp_path, monkeypatch):
    """`execute(place, number, replaced, **names)` runs a block in an empty folder, and returns its names."""
    import datasets

    monkeypatch.setenv("TUNIX_CACHE", cache)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **others: datasets.Dataset.from_list(ROWS))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def execute(place, number, replaced=(), **names):
        code = python_on(place)[number]
        for old, new in dict(replaced).items():
            assert old in code, f"{place}: {old} is not there any more"
            code = code.replace(old, new)
        exec(compile(code, f"{place}, block {number + 1}", "exec"), names := {"__name__": "block"} | names)
        return names

    return execute


@pytest.mark.thorough
def test_the_script_of_the_readme_trains_and_saves(execute):
    names = execute("README.md", 0, {GEMMA: '"tiny"', "max_steps=500": SMALL})
    assert names["trainer"].state.global_step == 2
    saved = Path(names["trainer"].args.output_dir)
    assert (saved / "adapter_model.safetensors").is_file() and (saved / "README.md").is_file()


def test_the_reward_function_of_the_page_on_data_pays_for_short_completions(execute):
    reward = execute("docs/data.md", 0)["short_reward"]
    assert reward(completions=["x" * 199, "x" * 200], prompts=["?", "?"]) == [1.0, 0.0]


@pytest.mark.thorough
def test_all_weights_are_trained_and_read_as_a_plain_model(execute):
    import torch

    from tunix_torch import GRPOConfig

    settings = eval(f"dict({SMALL})")
    given = {
        "reward": lambda completions, **columns: [float(len(text)) for text in completions],
        "args": GRPOConfig(output_dir="outputs", kl_penalty_coef=0.0, **settings),
        "rows": ROWS,
    }
    trainer = execute("docs/models.md", 0, {GEMMA: '"tiny"'}, **given)["trainer"]
    trainer.train()
    trainer.save_model()
    model = execute("docs/models.md", 1)["model"]
    trained, read = trainer.model.state_dict(), model.state_dict()
    assert read and all(torch.equal(trained[name].to(tensor.dtype), tensor) for name, tensor in read.items())


@pytest.mark.thorough
def test_the_answers_of_an_evaluation_are_read_by_pandas(execute, finished_run):
    folder = Path("outputs", "completions")
    folder.mkdir(parents=True)
    first = min((finished_run / "completions").glob("evaluation_*.parquet"))
    shutil.copyfile(first, folder / "evaluation_00000.parquet")  # where an evaluation comes before the first step
    answers = execute("docs/settings.md", 0)["answers"]
    assert len(answers) == 4 and {"question", "answer", "completion", "right"} <= set(answers.columns)


@pytest.mark.thorough
def test_a_job_of_sections_runs(execute):
    replaced = {
        'model_size="270m"': 'model_name="tiny"',
        'dataset="gsm8k"': 'data_path="rows.jsonl"',
        "num_batches=100": "num_batches=2",
    }
    execute("docs/settings.md", 1, replaced)
    (metrics,) = Path().rglob("metrics.jsonl")
    steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "reward" in row]
    assert steps == [1, 2]


@pytest.mark.thorough
def test_three_stages_train_one_adapter(execute):
    (lines,) = [lines for _, language, lines in blocks_of(PAGES["docs/pipeline.md"]) if language == "json"]
    for name, line in zip(("answers", "pairs", "questions"), lines, strict=True):
        Path(f"{name}.jsonl").write_text(f"{line}\n" * 8)
    small = SMALL.replace("generation_max_length=8", "generation_max_length=64, system_message=''")
    execute("docs/pipeline.md", 0, {GEMMA: '"tiny"', "**settings)": f"{small}, **settings)"})
    for name in ("sft", "simpo", "grpo"):
        folder = Path("outputs", name)
        assert (folder / "adapter_model.safetensors").is_file() and (folder / "metrics.jsonl").is_file(), name
    before = json.loads(Path("outputs", "grpo", "adapter_config.json").read_text())["base_model_name_or_path"]
    assert "sft" not in before and "simpo" not in before, "one adapter on the base model"


def test_a_block_that_needs_something_says_so_in_its_first_line(monkeypatch):
    page = "```python\n# needs a GPU\nimport torch\n```\n\n```python\nimport re\n```\n"
    monkeypatch.setitem(PAGES, "docs/none.md", page)
    assert python_on("docs/none.md") == ["import re"]
