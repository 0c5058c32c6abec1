"""Compile one graph for a TPU slice with libtpu, on a machine without a TPU, in a process of its own.

It is a separate process because libtpu needs its own environment, and because a compiler that runs out of memory is
killed by the system. `preflight/compiler.py` starts it as `python -m tunix_torch.preflight.compile_tpu REQUEST`, where
REQUEST is a JSON file with the fields of `Request`. It writes a JSON file with the fields of `Compiled`
(`Request.result`) and the compiled program as text (`Request.program`). Besides this file, only those of the
pre-flight that trace Tunix import jax.
"""

import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# torch_tpu 0.2.0 writes an attribute that jaxlib 0.10.2 can't read. It allows equal numbers to come in any order.
NOT_STABLE = re.compile(rb"(chlo\.top_k\(%[\w#]+, k = \d+), is_stable = false")


@dataclass
class Request:
    """One graph to compile, and the files to read it from and to write results to."""

    topology: str  # the name of a slice, for `chips.parse_topology`
    num_partitions: int  # devices of the mesh; 1 means no mesh
    graph: str  # path of the file to read
    dialect: str  # of that file, as in `graph.Graph`
    donated: list[int]  # indices of the parameters whose buffers the results may overwrite
    result: str  # path of the JSON file to write
    program: str  # path of the text file to write


@dataclass
class Compiled:
    """What the compiler reports about one graph. Bytes and operations are those of one chip in one run of the graph."""

    error: str | None = None  # the compiler's words when the graph did not compile
    seconds: float = 0.0  # that the compilation took
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0  # the part of output_bytes that overwrites an argument's buffer
    temporary_bytes: int = 0
    code_bytes: int = 0
    flops: float = 0.0


def mark_donated(module: "ir.Module", donated: list[int]) -> None:  # noqa: F821
    """Tell the compiler which parameters of the entry function it may overwrite."""
    from jaxlib.mlir import ir

    main = next(op for op in module.body.operations if op.attributes["sym_name"].value == "main")
    if "arg_attrs" in main.attributes:
        attributes = list(main.attributes["arg_attrs"])
    else:
        attributes = [ir.DictAttr.get({}) for _ in main.type.inputs]
    for index in donated:
        known = {item.name: item.attr for item in attributes[index]}
        attributes[index] = ir.DictAttr.get(known | {"jax.buffer_donor": ir.BoolAttr.get(True)})
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)


def slice_devices(topology: str, num_partitions: int) -> list:
    """Return the first chips of a slice, described by libtpu as jax devices that can only be compiled for."""
    from jax.experimental import topologies

    from .chips import parse_topology

    slice_ = parse_topology(topology)
    # libtpu assumes hosts of 2x2 chips unless it is told otherwise, and would refuse slices that are smaller than one
    host = [min(2, size) for size in slice_.sizes] + [1] * (3 - len(slice_.sizes))
    described = topologies.get_topology_desc(slice_.name, "tpu", chips_per_host_bounds=host)
    return sorted(described.devices, key=lambda device: device.id)[:num_partitions]


def compile_module(
    module: "ir.Module",  # noqa: F821
    devices: list,
    program: str,
    free_parameters: list[bool] | None = None,
    free_results: list[bool] | None = None,
) -> tuple[Compiled, Any]:
    """Compile a StableHLO module, within its context, with SPMD and without Shardy.

    Args:
        devices: from `slice_devices`, one for each partition.
        program: path of the text file to which the compiled program is written.
        free_parameters, free_results: for each of them, whether the compiler chooses its layout on the mesh where the
            module gives none. None: for no parameter, and for every result.

    Returns:
        the compiler's report, and the executable; None when the module does not compile.
    """
    import numpy as np
    from jax._src.lib import xla_client
    from jax.errors import JaxRuntimeError

    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = 1, len(devices)
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[d.id for d in devices]]))
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, len(devices)
    build.use_spmd_partitioning = len(devices) > 1
    build.use_shardy_partitioner = False
    build.allow_spmd_sharding_propagation_to_output = [True] if free_results is None else free_results
    if free_parameters is not None:
        build.allow_spmd_sharding_propagation_to_parameters = free_parameters
    started = time.perf_counter()
    try:
        executable = devices[0].client.compile(module, xla_client.DeviceList(tuple(devices)), options)
    except JaxRuntimeError as error:
        return Compiled(error=str(error), seconds=time.perf_counter() - started), None
    memory, cost = executable.get_compiled_memory_stats(), executable.cost_analysis()
    Path(program).write_text(executable.hlo_modules()[0].to_string())
    report = Compiled(
        seconds=time.perf_counter() - started,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=cost["flops"],
    )
    return report, executable


def compile_graph(request: Request) -> Compiled:
    """Compile as torch-xla and torch_tpu do: the compiler chooses the layout of results, and of no parameter."""
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    devices = slice_devices(request.topology, request.num_partitions)
    graph = Path(request.graph).read_bytes()
    if request.dialect == "hlo":
        stablehlo = xla_client._xla.mlir.hlo_to_stablehlo(graph)
    else:
        stablehlo = NOT_STABLE.sub(rb"\1", graph)
    with mlir.make_ir_context():
        module = ir.Module.parse(stablehlo)
        mark_donated(module, request.donated)
        return compile_module(module, devices, request.program)[0]


def main() -> None:
    request = Request(**json.loads(Path(sys.argv[1]).read_text()))
    Path(request.result).write_text(json.dumps(asdict(compile_graph(request))))
    sys.stdout.flush()
    os._exit(0)  # libtpu crashes when the interpreter shuts down in the usual way


if __name__ == "__main__":
    main()
