"""Runs a step of XLA many times in one program, by a loop on the device: the host is needed once for all of them.

torch-xla's own loops (`torch_xla.experimental.scan`) record gradients, which a decode step has none of, and turn as
often as one of their tensors is long, so that another number of turns is another program.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_builder as xb

from .arguments import tensors_in
from .mesh import has_mesh, lay, sharding_of


def in_a_loop(step: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return a function of the step's arguments and of how often it runs, which runs it so often, in one program.

    Args:
        step: takes tensors and lists of tensors, and returns tensors. Its results take the place of its first
            arguments in its next run, whose shapes and dtypes they have. It may change other arguments in place, and
            draws no random numbers. It is traced once in each call.

    Returns:
        a function that takes one more argument than the step, the number of runs, (1,) int32. It returns the results
        of the last run, and changes in place the arguments that the step changes.
    """

    def steps(*args: Any) -> tuple[torch.Tensor, ...]:
        *args, runs = args
        given, body = tensors_in(args), _traced(step, args)
        after = _loop_around(body, [*given, *body.reads], runs)
        for place in body.renewed[body.num_results :]:
            given[place].copy_(after[place])
        return tuple(after[: body.num_results])

    return steps


@dataclass
class _Body:
    """A step as a computation. The loop hands on the step's arguments and, after them, all else that the step reads."""

    computation: xb.Op
    reads: list[torch.Tensor]  # what it reads beside its arguments, such as weights
    takes: list[int]  # for each of its parameters, the place among what the loop hands on
    renewed: list[int]  # for each of its results, the place that it takes there
    num_results: int  # those of the step; then come the arguments that it changes in place


def _traced(step: Callable[..., Any], args: Sequence[Any]) -> _Body:
    """Trace a step with arguments like these, which hold nothing."""
    stand_ins = [xb.create_placeholder_tensor(tensor.shape, tensor.dtype) for tensor in tensors_in(args)]
    # The step gets values that are computed, since to lay out data, as a step may do with its arguments, would put
    # other data in its place, and parameters are told apart by their data.
    computed = [~~tensor if tensor.dtype == torch.bool else tensor * 1 for tensor in stand_ins]
    layouts = [sharding_of(tensor) for tensor in tensors_in(args)] if has_mesh() else []
    for tensor, layout in zip(computed, layouts, strict=False):
        lay(tensor, layout)
    versions, left = [tensor._version for tensor in computed], iter(computed)
    results = list(step(*([next(left) for _ in arg] if isinstance(arg, list) else next(left) for arg in args)))
    changed = [i for i, tensor in enumerate(computed) if tensor._version != versions[i]]
    assert not changed or changed[0] >= len(results), "a result takes the place of an argument changed in place"
    renewed, outputs = [*range(len(results)), *changed], results + [computed[i] for i in changed]
    if layouts:  # left alone, the partitioner may lay out anew in each turn what the loop hands on
        for tensor, place in zip(outputs, renewed, strict=True):
            lay(tensor, layouts[place])
    data_ids, _ = torch_xla._XLAC._get_tensors_xla_device_data_node(outputs)
    assert torch_xla._XLAC._get_seed_info_id() not in data_ids, "a compiled step draws random numbers"

    context = torch_xla._XLAC.lowering.LoweringContext("step")
    context.build(outputs)
    data = context.device_parameter_id_tensor_mapping()  # by the number of the computation's parameter
    arguments = [context.tensor_parameter_id(tensor) for tensor in stand_ins]  # -1: the step does not read it
    others = [number for number in data if number not in arguments]
    places = {number: place for place, number in enumerate([*arguments, *others]) if number != -1}
    return _Body(
        computation=xb.computation_from_module_proto("step", context.hlo()),
        reads=[data[number] for number in others],
        takes=[places[number] for number in range(len(places))],
        renewed=renewed,
        num_results=len(results),
    )


def _loop_around(body: _Body, handed_on: Sequence[torch.Tensor], runs: torch.Tensor) -> list[torch.Tensor]:
    """Return what the loop hands on after its last turn."""

    def once(turn: xb.Op, runs: xb.Op, *before: xb.Op) -> tuple[xb.Op, ...]:
        results = xb.Op.call(body.computation, [before[place] for place in body.takes])
        after = list(before)
        for number, place in enumerate(body.renewed):
            after[place] = results.get_tuple_element(number)
        return turn + xb.Op.scalar(turn.builder(), 1, dtype=xb.Type.S32), runs, *after

    taken = [torch.zeros((), dtype=torch.int32, device=runs.device), runs[0], *handed_on]
    builder = xb.create_builder("steps")
    parameters = [xb.mkparam(builder, number, xb.tensor_shape(tensor)) for number, tensor in enumerate(taken)]
    loop = xb.Op.mkwhile(parameters, lambda turn, runs, *_: turn < runs, once).build("steps")
    _, _, *after = torch_xla._XLAC._xla_user_computation("tunix_torch::steps", taken, loop)
    return after
