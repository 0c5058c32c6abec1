"""Write a Gemma of real shape with random weights, and a tokenizer trained on a text file, as a Hugging Face folder.

    python -m benchmarks.random_gemma /tmp/gemma-270m --text ../shared/data/gsm8k/train.jsonl

For runs at real size on a machine that can download nothing.
"""

import argparse

import tunix_torch  # noqa: F401  (before Transformers: keeps it off torch_xla)

# isort: split

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from tunix_torch.model.tiny import CHAT_TEMPLATE, ROLES, SPECIAL_TOKENS, TAGS

VOCABULARY = 262_144
SHAPES = {  # config.json of google/gemma-3-270m and google/gemma-3-1b-pt
    "270m": {"num_hidden_layers": 18, "hidden_size": 640, "intermediate_size": 2048, "sliding_window": 512},
    "1b": {"num_hidden_layers": 26, "hidden_size": 1152, "intermediate_size": 6912, "sliding_window": 512},
}


def make_tokenizer(text_file: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 8,192 words learned from the file, filled up with unused words to 262,144."""
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
    backend.add_tokens([f"<unused{i}>" for i in range(VOCABULARY - backend.get_vocab_size())])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end_of_turn>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--text", required=True, help="the tokenizer is trained on this file")
    parser.add_argument("--size", choices=SHAPES, default="270m")
    args = parser.parse_args()
    tokenizer = make_tokenizer(args.text)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SHAPES[args.size],
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    print(f"{args.folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} words")


if __name__ == "__main__":
    main()
