"""Compile one graph for a TPU slice with libtpu, on a machine without a TPU. The only importer of jax here.

A process of its own, since libtpu wants its own settings and a compiler that runs out of memory is killed:
`python -m tunix_torch.preflight.compile_tpu REQUEST`, where REQUEST is a JSON file of `Request`'s fields. It writes
`Request.result`, a JSON file of `Compiled`'s fields, and the compiled program as text, `Request.program`.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Request:
    """One graph to compile."""

    topology: str  # as `chips.parse_topology` takes it
    num_partitions: int  # devices of the mesh; 1: no mesh
    hlo: str  # file with a serialized HloModuleProto
    donated: list[int]  # parameters whose buffers results may take over
    result: str  # file to write
    program: str  # file to write


@dataclass
class Compiled:
    """What the compiler says of one graph. Bytes and operations are those of one chip, in one run."""

    error: str | None = None  # why it did not compile
    seconds: float = 0.0  # that compiling took
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0  # of outputs that take over an argument's buffer
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


def compile_graph(request: Request) -> Compiled:
    """Compile as torch-xla does on a TPU: SPMD, without Shardy, the layout of results left to the compiler."""
    import numpy as np
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies
    from jaxlib.mlir import ir

    from .chips import parse_topology

    slice_ = parse_topology(request.topology)
    # libtpu takes hosts of 2x2 chips unless told otherwise, and refuses slices that are smaller
    host = [min(2, size) for size in slice_.sizes] + [1] * (3 - len(slice_.sizes))
    described = topologies.get_topology_desc(slice_.name, "tpu", chips_per_host_bounds=host)
    devices = sorted(described.devices, key=lambda device: device.id)[: request.num_partitions]
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = 1, request.num_partitions
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[d.id for d in devices]]))
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, request.num_partitions
    build.use_spmd_partitioning = request.num_partitions > 1
    build.use_shardy_partitioner = False
    build.allow_spmd_sharding_propagation_to_output = [True]

    stablehlo = xla_client._xla.mlir.hlo_to_stablehlo(Path(request.hlo).read_bytes())
    started = time.perf_counter()
    with mlir.make_ir_context():
        module = ir.Module.parse(stablehlo)
        mark_donated(module, request.donated)
        try:
            executable = devices[0].client.compile(module, xla_client.DeviceList(tuple(devices)), options)
        except JaxRuntimeError as error:
            return Compiled(error=str(error), seconds=time.perf_counter() - started)
    memory, cost = executable.get_compiled_memory_stats(), executable.cost_analysis()
    Path(request.program).write_text(executable.hlo_modules()[0].to_string())
    return Compiled(
        seconds=time.perf_counter() - started,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=cost["flops"],
    )


def main() -> None:
    request = Request(**json.loads(Path(sys.argv[1]).read_text()))
    Path(request.result).write_text(json.dumps(asdict(compile_graph(request))))
    sys.stdout.flush()
    os._exit(0)  # libtpu crashes when the interpreter takes it down


if __name__ == "__main__":
    main()
