"""Runs TRL's own tests of its GRPO trainer on this library, or on TRL itself, without a network.

    python -m benchmarks.trl_suite PATH/TO/trl/tests/test_grpo_trainer.py                 # this library
    python -m benchmarks.trl_suite PATH/TO/trl/tests/test_grpo_trainer.py --trainer trl   # TRL, to see that it can pass
    python -m benchmarks.trl_suite PATH/TO/trl/tests/test_grpo_trainer.py -- -k loss_types -x

The file is in TRL's repository and not in its package, so it is read from a checkout. The two names `GRPOConfig` and
`GRPOTrainer` are taken from `tunix_torch.compat.trl`; nothing else in the file is changed. The models and the data set
that the tests name are made on the spot: models of the same architectures with random weights, and the sentences of the
Zen of Python. Tests are counted that need neither vision, vLLM, liger, bitsandbytes, remote code nor an accelerator.
"""

import argparse
import codecs
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

OWNER = "trl-internal-testing"
# Not counted: tests of what this library does not have on purpose, by words in their names.
NOT_COUNTED = "vlm or Vision or vllm or liger or remote_code or Slow or multimodal or continuous_batching"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Most tokens mean nothing, so that, as in the models of the tests, a completion hardly ever ends by itself.
VOCABULARY = 32768
SIZE = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# The name of a model in the tests -> (type of its config, settings, whether it is a reward model).
MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}, False),
    "tiny-Qwen3ForCausalLM": ("qwen3", {"head_dim": 4}, False),
    "tiny-Gemma2ForCausalLM": ("gemma2", {"head_dim": 4}, False),
    "tiny-LlamaForCausalLM-3.2": ("llama", {}, False),
    "tiny-MistralForCausalLM-0.2": ("mistral", {}, False),
    "tiny-Cohere2ForCausalLM": ("cohere2", {}, False),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", EXPERTS | {"head_dim": 4}, False),
    "tiny-Glm4MoeForCausalLM": (
        "glm4_moe",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 4},
        False,
    ),
    "tiny-GptOssForCausalLM": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}, False),
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", {}, True),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", {"head_dim": 4}, True),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", {}, True),
}
CONFTEST = """
import datasets
import transformers

FOLDER = {folder!r}
load = datasets.load_dataset


def load_dataset(name, config=None, split=None, streaming=False):
    files = {{part: f"{{FOLDER}}/{{config}}-{{part}}.json" for part in ("train", "test")}}
    return load("json", data_files=files, split=split, streaming=streaming)


datasets.load_dataset = load_dataset
# TRL computes in bfloat16 by default, which Transformers expects of a GPU alone.
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
"""
# In place of TRL's `tests/testing_utils.py`: a folder for each test, and marks by what is installed.
TESTING_UTILS = """
import importlib.util

import pytest


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


require_bitsandbytes = needs("bitsandbytes")
require_jmespath = needs("jmespath")
require_kernels = needs("kernels")
require_liger_kernel = needs("liger_kernel")
require_peft = needs("peft")
require_vision = needs("torchvision")
require_vllm = needs("vllm")
require_torch_accelerator = pytest.mark.skip(reason="no accelerator")
is_ampere_or_newer = lambda: False


class TrlTestCase:
    @pytest.fixture(autouse=True)
    def own_folder(self, tmp_path):
        self.tmp_dir = str(tmp_path)
"""


def make_tokenizer():
    """A tokenizer of bytes, with ChatML's tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *specials]
    tokens += [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    return fast


def make_models(hub: Path) -> None:
    """Write the models into a folder with the layout of the hub's cache, so that they are found by their names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = make_tokenizer()
    ids = {"vocab_size": VOCABULARY, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name, (kind, settings, is_reward) in MODELS.items():
        torch.manual_seed(0)
        labels = {"num_labels": 1} if is_reward else {}
        config = AutoConfig.for_model(kind, **SIZE | settings | ids | labels)
        factory = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
        model = factory.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5 if is_reward else 0.2)
        repository = hub / f"models--{OWNER}--{name}"
        snapshot = repository / "snapshots" / "0"
        model.save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")


def make_data(folder: Path) -> None:
    """Write prompts that are beginnings of the sentences of the Zen of Python: 17 to train on, 2 to test."""
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints its text when it is imported
        zen = importlib.import_module("this").s
    lines = [line for line in codecs.decode(zen, "rot13").splitlines()[2:] if line]
    beginnings = [re.split(r" (?:than|is|are|pass|break|beats|refuse)\b", line)[0] for line in lines]
    beginnings = ["Beautiful is better than", "Explicit is", "Simple is better", "Complex", *beginnings[4:]]
    for config, row in (
        ("standard_prompt_only", lambda text: {"prompt": text}),
        ("conversational_prompt_only", lambda text: {"prompt": [{"role": "user", "content": text}]}),
    ):
        for part, texts in (("train", beginnings[:17]), ("test", beginnings[17:19])):
            rows = "\n".join(json.dumps(row(text)) for text in texts)
            (folder / f"{config}-{part}.json").write_text(rows)


def run(test_file: Path, trainer: str, further: list[str]) -> int:
    """Run the tests in a folder of their own. Returns the number of those that failed."""
    with tempfile.TemporaryDirectory(prefix="trl-suite-") as name:
        folder = Path(name)
        make_models(folder / "hub")
        make_data(folder)
        tests = folder / "tests"
        tests.mkdir()
        text = test_file.read_text()
        if trainer == "ours":
            ours = "from tunix_torch.compat.trl import GRPOConfig, GRPOTrainer"
            text, count = re.subn(r"^from trl import GRPOConfig, GRPOTrainer$", ours, text, flags=re.MULTILINE)
            assert count == 1, f"{test_file}: no line 'from trl import GRPOConfig, GRPOTrainer'"
        (tests / "test_grpo_trainer.py").write_text(text)
        (tests / "testing_utils.py").write_text(TESTING_UTILS)
        (tests / "__init__.py").write_text("")
        (folder / "conftest.py").write_text(CONFTEST.format(folder=str(folder)))
        env = os.environ | {
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "TUNIX_DEVICE": "cpu",
            "USE_TORCH_XLA": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["--rootdir", str(folder), "-k", f"not ({NOT_COUNTED})", *further, "tests"]
        subprocess.run(command, cwd=folder, env=env, check=False)
        outcome = Counter(
            next(iter(re.findall(r"<(failure|error|skipped)", case)), "passed")
            for case in re.findall(r"<testcase .*?(?:/>|</testcase>)", report.read_text(), flags=re.DOTALL)
        )
    counted = sum(outcome.values()) - outcome["skipped"]
    print(f"{trainer}: {outcome['passed']} of {counted} pass; {outcome['skipped']} need what is not installed here")
    return counted - outcome["passed"]


def main() -> int:
    """Read the command line. The exit status is 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test_file", type=Path, help="tests/test_grpo_trainer.py of a checkout of TRL")
    parser.add_argument("--trainer", choices=("ours", "trl"), default="ours", help="whose trainer the tests use")
    own, further = sys.argv[1:], []
    if "--" in own:
        own, further = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    if not args.test_file.is_file():
        parser.error(f"test_file={str(args.test_file)!r}: no such file; it is in TRL's repository, not in its package")
    return int(run(args.test_file, args.trainer, further) > 0)


if __name__ == "__main__":
    sys.exit(main())
