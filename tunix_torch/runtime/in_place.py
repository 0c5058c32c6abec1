"""torch_tpu's compiler of steps, told to write what a step changes in place where it lies, and not into a copy.

torch_tpu 0.2.0 lets no result of `torch.compile(backend="tpu")` overwrite an argument: a decode step would copy all KV
caches for each token, and need their memory twice. Its compiler can be told so (`donated_inputs`), though not by a
setting.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from .device import KIND

assert KIND == "tpu", KIND

from torch_tpu._internal.compile import TpuBackend  # noqa: E402
from torch_tpu._internal.compile.compiler import CompiledArtifact, StaticCompiler  # noqa: E402


class InPlaceBackend(TpuBackend):
    """torch_tpu's backend, for steps without gradients. What a step changes may share no memory with another tensor."""

    def _compile_graph_module(
        self,
        compiler_instance: Any,
        is_fwd: bool,
        custom_module_name: str | None,
        debug: Any,
        compiled_artifacts: list[CompiledArtifact],
        graph_module: torch.fx.GraphModule,
        example_inputs: Sequence[torch.Tensor],
    ) -> Any:
        if not any("c10d" in str(node.target) for node in graph_module.graph.nodes):  # which torch_tpu cuts graphs at
            changed = torch._guards.TracingContext.get().fw_metadata.mutated_inp_runtime_indices
            compiler_instance = functools.partial(StaticCompiler(debug=debug), donated_inputs=list(changed))
        rest = is_fwd, custom_module_name, debug, compiled_artifacts, graph_module, example_inputs
        return super()._compile_graph_module(compiler_instance, *rest)
