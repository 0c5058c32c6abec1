"""Read the graphs that torch_tpu has deferred and not computed, for the pre-flight.

torch_tpu notes operations and runs them later, as torch-xla does. The graph of all that is noted when `device.sync` is
called is read as one program. On a device, torch_tpu cuts it into several, at the results that Python can still reach,
so that what is planned is the program at its best, and no result overwrites an argument. A decode step is compiled as a
whole there too. It is read from the compiler, and its program says itself which arguments it overwrites.
"""

import itertools
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..runtime.deferred import is_deferred, run_and_read, stablehlo_of
from ..runtime.device import sync
from .graph import Graph, TracedGraph


class Reader:
    """Reads the graphs of a trainer whose operations torch_tpu defers.

    Args:
        live: gives every tensor on the device that Python can still reach. Those that were made since it was called
            before are in the order in which they were made.
        keep: takes graphs that do not end in `sync`: decode steps.
    """

    def __init__(self, live: Callable[[], list[Tensor]], keep: Callable[[TracedGraph], None]) -> None:
        self.live, self.keep = live, keep
        self.ages = WeakTensorKeyDictionary()  # numbers of the tensors that were there when an earlier graph ended
        self.next_age = itertools.count()

    def value_of(self, tensor: Tensor) -> Hashable:
        """What tells apart the values of two tensors that are there at the same time."""
        return tensor.data_ptr(), tensor.shape, tensor.stride()

    def pending_graph(self) -> TracedGraph | None:
        """The graph of all values that were traced and not computed. None: there are none."""
        tensors, in_hbm, results, outputs = self.live(), {}, {}, {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            is_pending = is_deferred(tensor)
            if not is_pending or tensor in self.ages:  # one that is changed in place has its old value until then
                in_hbm[storage.data_ptr()] = storage.nbytes()
            if is_pending:
                results.setdefault(self.value_of(tensor), []).append(tensor)
        for tensor in tensors:
            if tensor not in self.ages:
                self.ages[tensor] = next(self.next_age)
        for value in sorted(results, key=lambda value: min(self.ages[tensor] for tensor in results[value])):
            outputs.setdefault(results[value][0].untyped_storage().data_ptr(), results[value][0])
        if not outputs:
            return None
        program = stablehlo_of(list(outputs.values())).encode()
        return TracedGraph(Graph("", program, [], 1, sum(in_hbm.values()), "stablehlo"), results)

    def traced_once(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A decode step that is compiled and run in its first call; later calls return the results of the first."""
        results: list[Any] = []

        def traced_step(*args: Any) -> Any:
            if not results:
                sync()  # otherwise what is pending now would be computed with the step
                in_hbm = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.live()}
                outputs, text = run_and_read(step, args)
                self.keep(TracedGraph(Graph("", text.encode(), [], 1, sum(in_hbm.values()), "stablehlo")))
                results.append(outputs)
            return results[0]

        return traced_step
