"""The commands of other programs that serve a plain Hugging Face model: vLLM, Transformers and llama.cpp."""

import json
import shlex
from pathlib import Path

PORT = 8000  # at which vLLM and Transformers listen, unless told otherwise


def serving_lines(model: str, system_message: str = "") -> list[str]:
    """The lines to print for a model that is served by other programs, none of which is part of this package.

    Args:
        model: the folder of a whole model, or a hub id.
        system_message: the instruction that the model was trained with. A server does not know it, so who asks gives
            it: before the question, in the user's turn.
    """
    name, is_folder = shlex.quote(model), Path(model).is_dir()
    question = f"{system_message}\n\n" if system_message else ""
    body = {"model": model, "messages": [{"role": "user", "content": f"{question}What is 47 + 38?"}]}
    ask = f"curl http://localhost:{PORT}/v1/chat/completions -H 'Content-Type: application/json' -d "
    lines = [
        "Serve it with one of these, which are programs of their own:",
        f"  vllm serve {name}",
        f"  transformers serve {name}          # pip install 'transformers[serving]'",
        "and ask it as it was trained:",
        f"  {ask}{shlex.quote(json.dumps(body))}",
    ]
    if is_folder:  # the converter reads a folder
        gguf = shlex.quote(f"{Path(model)}.gguf")
        lines += [
            "For llama.cpp, in a checkout of it, write a GGUF file:",
            f"  python convert_hf_to_gguf.py {shlex.quote(str(Path(model).resolve()))} --outfile {gguf} --outtype bf16",
            f"  llama-server -m {gguf}",
        ]
    return lines
