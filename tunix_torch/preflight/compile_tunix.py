"""Trace graphs of Google's Tunix and compile them for a TPU slice with libtpu, in a process of its own.

`preflight/beside.py` starts it as `python -m tunix_torch.preflight.compile_tunix REQUEST`, where REQUEST is a JSON file
with the fields of `TunixRequest`. It writes a JSON file with a list of `TunixCompiled` (`TunixRequest.result`), and
beside it the text of each compiled program. Like `compile_tpu.py` it is a separate process since libtpu needs its own
environment, and since a compiler that runs out of memory is killed.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .compile_tpu import Compiled, compile_module, slice_devices

ROLLOUT, LOGPS, LEARNING = "rollout", "log-probabilities", "learning"  # the parts of a step that are traced together


@dataclass(frozen=True)
class TunixRequest:
    """A part of a training step of Tunix to compile: the model, the slice, and the settings that decide its graphs."""

    part: str  # ROLLOUT, LOGPS or LEARNING
    topology: str  # the name of a slice, for `chips.parse_topology`
    mesh: list[list]  # sizes and names of the axes
    model: dict[str, Any]  # the config of the Hugging Face model, as its `to_dict` gives it
    dtype: str  # of the base weights, and of the LoRA, to which Tunix gives the same dtype
    lora_rank: int
    lora_alpha: float
    rows: int  # of a rollout, or of one pass
    prompt_length: int
    completion_length: int
    temperature: float
    # Of a rollout:
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    # Of log-probabilities and learning:
    beta: float = 0.0  # of the KL penalty; 0: no reference policy
    has_old: bool = False  # whether the old policy's log-probabilities are computed, as where a batch is used twice
    # Of learning:
    epsilon: float = 0.2
    max_grad_norm: float = 0.0  # 0: gradients are not clipped
    weight_decay: float = 0.0
    passes: int = 1  # micro-batches whose gradients are summed for one step of the optimizer
    rematerialisation: str = "NONE"  # a name of Tunix's RematConfig: NONE, BLOCK or DECODER


@dataclass
class TunixCompiled(Compiled):
    """What the compiler reports about one graph of Tunix. Bytes are those of one chip."""

    name: str = ""  # of the graph, as in `trace.py`
    live_bytes: float = 0.0  # of the graph's arguments, and of what the job holds besides: weights, LoRA, optimizer
    program: str = ""  # name of the file with the compiled program's text, beside the result


def compile_part(request: TunixRequest, folder: Path) -> list[TunixCompiled]:
    """Trace and compile the graphs of a part, in their order, and write the programs into a folder.

    After a graph that does not compile come no others, as these need the layout of its results.
    """
    from .tunix_graphs import TunixGraph, trace_part

    devices = slice_devices(request.topology, math.prod(request.mesh[0]))
    compiled = []

    def compile_graph(graph: TunixGraph) -> Any:
        program = f"{len(compiled)}.txt"
        report, executable = compile_module(
            graph.module, devices, str(folder / program), graph.free_parameters, graph.free_results
        )
        live_bytes = report.argument_bytes + graph.held_bytes
        compiled.append(TunixCompiled(**asdict(report), name=graph.name, live_bytes=live_bytes, program=program))
        return executable

    trace_part(request, devices, compile_graph)
    return compiled


def main() -> None:
    file = Path(sys.argv[1])
    request = TunixRequest(**json.loads(file.read_text()))
    compiled = compile_part(request, file.parent)
    (file.parent / "result").write_text(json.dumps([asdict(one) for one in compiled]))
    sys.stdout.flush()
    os._exit(0)  # libtpu crashes when the interpreter shuts down in the usual way


if __name__ == "__main__":
    main()
