"""Write a Gemma 3 of real size with random weights, and a tokenizer trained on a text file, as a Hugging Face folder.

It is for runs at real size on a machine that can download nothing, such as a GPU machine without a network:

    python -m benchmarks.random_gemma /tmp/gemma-270m --text train.jsonl
"""

import argparse

import tunix_torch  # noqa: F401  (first: it chooses the device)

# isort: split

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3ForCausalLM, PreTrainedTokenizerFast

from tunix_torch.model.tiny import CHAT_TEMPLATE, ROLES, SPECIAL_TOKENS, TAGS
from tunix_torch.preflight.models import model_config

SIZES = ("270m", "1b")


def make_tokenizer(text_file: str, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: at most 8,192 words learned from the file, and unused words for the rest."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([text_file], trainer)
    backend.add_tokens([*TAGS, *ROLES])
    backend.add_tokens([f"<unused{i}>" for i in range(vocabulary_size - backend.get_vocab_size())])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end_of_turn>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--text", required=True, help="the tokenizer is trained on this file")
    parser.add_argument("--size", choices=SIZES, default="270m")
    args = parser.parse_args()
    config = model_config(f"google/gemma-3-{args.size}")
    tokenizer = make_tokenizer(args.text, config.vocab_size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    print(f"{args.folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} words")


if __name__ == "__main__":
    main()
