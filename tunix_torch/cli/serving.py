"""The commands of other programs that serve a plain Hugging Face model: vLLM, Transformers and llama.cpp."""

import json
import shlex
from pathlib import Path

PORT = 8000  # at which vLLM and Transformers listen, unless told otherwise


def serving_lines(model: str, system_message: str = "", is_folder: bool | None = None) -> list[str]:
    """The lines to print for a model that is served by other programs, none of which is part of this package.

    Args:
        model: the folder of a whole model, or a hub id.
        system_message: the instruction that the model was trained with. A server does not know it, so who asks gives
            it: before the question, in the user's turn.
        is_folder: the model is a folder, which may not be there yet; None: look.
    """
    name, is_folder = shlex.quote(model), Path(model).is_dir() if is_folder is None else is_folder
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


def how_to_serve(model_path: str) -> list[str]:
    """The lines that say how other programs serve a model; an adapter is merged into its base model first.

    Raises:
        ValueError: there is no such model.
    """
    # What knows Transformers is loaded when the device has been chosen.
    from ..model.adapter import read_lora
    from ..model.loading import base_model_name, resolve_model_name
    from ..model.origin import hub_id
    from ..run.folder import find_system_message

    message, path = find_system_message(model_path), shlex.quote(model_path)
    resolved, base = resolve_model_name(model_path), base_model_name(model_path)
    if base == model_path:
        return serving_lines(resolved, message)
    merged = f"{model_path.rstrip('/')}-merged"
    lines = ["Merge the adapter into its base model first:"]
    lines += [f"  python -m tunix_torch.export {path} --merged {shlex.quote(merged)}"]
    lines += serving_lines(merged, message, is_folder=True)
    if hub_id(base) is not None:
        rank = read_lora(model_path).r
        flags = f"--enable-lora --max-lora-rank {rank} --lora-modules tuned={path}"
        lines += ["Or let vLLM put the adapter on the base model; then the model's name is tuned:"]
        lines += [f"  vllm serve {shlex.quote(hub_id(base))} {flags}"]
    return lines
