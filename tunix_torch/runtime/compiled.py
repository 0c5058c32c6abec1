"""Compiles a decode step once for each shape of its arguments, and through torch-xla as a loop that runs it many times.

On CUDA and the CPU the step is called as it is. So it is where torch_tpu's processes split the weights along tp: its
operations are then deferred, like those of a pass.
"""

from collections.abc import Callable
from typing import Any

import torch

from .arguments import tensors_in
from .device import KIND, planner
from .mesh import along_tp, has_mesh

if KIND == "xla":
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.utils.buffer_donor_context as buffer_donor_context

    from .loops import in_a_loop
if KIND == "tpu":
    from .in_place import InPlaceBackend

    # A step has a shape for each number of rows and each width of the cache, for sampling and for greedy answers.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024


RUNS_MANY = KIND == "xla"  # whether a step that `compile_step` returns takes the number of its runs, as `runs`


def compile_step(step: Callable[..., Any], model: torch.nn.Module) -> Callable[..., Any]:
    """Compile a function of static shapes that runs once a token. On XLA this saves 20 to 30 ms of tracing a call.

    Where `RUNS_MANY` holds, one call runs it as often as its keyword `runs` says, each time on what the last run left.
    The host then needs for all of these tokens what it needs for one.

    Args:
        step: takes tensors and lists of tensors, and returns tensors. It may change its arguments in place. Of all that
            may change between calls it reads only the weights of `model`, and it draws no random numbers. Its results
            have the shapes of its first arguments, whose place they take in the next call.
        model: the step reads the parameters, buffers and other tensors of its modules, whose values may change between
            calls. Other state, such as the active adapter, stays that of the first call.
    """
    planning = planner()
    if RUNS_MANY:
        loop = in_a_loop(step)
        return _with_runs(_CompiledStep(loop, model) if planning is None else planning.plan_step(loop))
    if planning is not None:
        return planning.plan_step(step)
    if KIND == "tpu" and along_tp() == 1:  # what a step sends along tp has never been compiled
        return compile_for_torch_tpu(step)
    return step


def _with_runs(steps: Callable[..., Any]) -> Callable[..., Any]:
    """Let steps take the number of their runs as a number. Each is sent to the device once."""
    numbers: dict[int, torch.Tensor] = {}

    def run(*args: Any, runs: int = 1) -> Any:
        if runs not in numbers:
            numbers[runs] = torch.tensor([runs], dtype=torch.int32, device=args[0].device)
        return steps(*args, numbers[runs])

    return run


def compile_for_torch_tpu(step: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compile a step by torch_tpu, with options of its backend of `torch.compile`."""
    return torch.compile(step, backend=InPlaceBackend(), fullgraph=True, dynamic=False, options=options)


def trace_as(function: Callable[..., Any], other: Callable[..., Any]) -> None:
    """Let `torch.compile` trace another function, of the same arguments, wherever a step calls one that it can't trace.

    Nothing else sees the other one: only torch_tpu's steps are compiled so.
    """
    if KIND == "tpu":
        torch._dynamo.substitute_in_graph(function)(other)


class _CompiledStep:
    """A step whose graph is traced once for each shape of its arguments, and then run by its hash.

    This is what `torch.compile(backend="openxla")` does, without Dynamo, which traces slowly, and right on a mesh
    too: there, torch-xla 2.9's bridge takes the weights for constants, because it tells a graph's inputs apart by
    tensor ids that its own copies have overwritten. Here an input is known by the handle of its data.
    """

    def __init__(self, step: Callable[..., Any], model: torch.nn.Module) -> None:
        self.step = step
        self.slots = [
            (tensors, name)
            for module in model.modules()
            for tensors in (module._parameters, module._buffers, vars(module))
            for name, tensor in tensors.items()
            if isinstance(tensor, torch.Tensor)
        ]
        self.programs: dict[tuple[torch.Size, ...], _Program] = {}

    def __call__(self, *args: Any) -> tuple[torch.Tensor, ...]:
        tensors = tensors_in(args)
        weights = [tensors_of_module[name] for tensors_of_module, name in self.slots]
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.programs:
            self.programs[shapes] = _Program(self.step, args, tensors, weights)
        return self.programs[shapes].run(tensors, weights)


class _Program:
    """One compiled graph of a step, and where each of its inputs comes from."""

    def __init__(
        self,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        tensors: list[torch.Tensor],
        weights: list[torch.Tensor],
    ) -> None:
        torch_xla.sync()
        xm.wait_device_ops()
        handles = torch_xla._XLAC._get_tensors_handle([*tensors, *weights])
        places = dict(zip(handles, range(len(handles)), strict=True))
        distinct = len(tensors) + len({id(weight) for weight in weights})
        assert len(places) == distinct, "two inputs of a compiled step share their data, so they can't be told apart"

        # Traced on copies, which have the same data: what the step changes in place stays untouched here.
        copies = iter([tensor.clone() for tensor in tensors])
        copied_args = [[next(copies) for _ in arg] if isinstance(arg, list) else next(copies) for arg in args]
        results = list(step(*copied_args))
        copied = tensors_in(copied_args)
        changed = torch_xla._XLAC._check_tensor_need_materialization(copied)
        self.num_results, self.changed = len(results), [i for i, new in enumerate(changed) if new]
        outputs = results + [copied[i] for i in self.changed]
        for output, i in zip(outputs, [*range(len(results)), *self.changed], strict=True):
            assert output.shape == tensors[i].shape, (output.shape, tensors[i].shape)
            if has_mesh():  # left alone, the partitioner may lay out a result otherwise than the graph takes it
                sharding = torch_xla._XLAC._get_xla_op_sharding(tensors[i])
                torch_xla._XLAC._xla_mark_sharding(output, sharding)

        ids, inputs = torch_xla._XLAC._get_tensors_xla_device_data_node(outputs)
        assert torch_xla._XLAC._get_seed_info_id() not in ids, "a compiled step draws random numbers"
        handles = torch_xla._XLAC._get_tensors_handle(inputs)
        self.inputs = [places.get(handle) for handle in handles]
        self.constants = [tensor if place is None else None for tensor, place in zip(inputs, self.inputs, strict=True)]
        assert all(c is None or c.dim() == 0 for c in self.constants), (
            "a compiled step reads a tensor of unknown origin"
        )
        with buffer_donor_context.alias_with_buffer_donor_config():  # what is changed in place needs its memory once
            for i in self.changed:
                torch_xla._XLAC._set_buffer_donation(tensors[i], True)
            self.hash = torch_xla._XLAC._get_graph_hash(outputs)
            torch_xla._XLAC._xla_warm_up_cache(outputs, [])

    def run(self, tensors: list[torch.Tensor], weights: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = tensors + weights
        inputs = [c if i is None else given[i] for i, c in zip(self.inputs, self.constants, strict=True)]
        outputs = torch_xla._XLAC._run_cached_graph(self.hash, inputs)
        for i, output in zip(self.changed, outputs[self.num_results :], strict=True):
            tensors[i].data = output
        return tuple(outputs[: self.num_results])
