"""Trace the graphs of one training step, without the model's weights and without running the graphs.

A `TunixTrainer` is made around a model of zeros, and its own methods are called: the rollout, the reference's
log-probabilities, a learning pass and the optimizer's step. Wherever one of them would run a graph, in `device.sync`,
the graph is handed to a `GraphPlanner` and its results are replaced by zeros. The graphs that are planned are
therefore those of training; `tests/preflight` compares them with the graphs that a real run compiles.

How a graph is read differs between torch-xla (`lazy_graphs.py`) and torch_tpu (`deferred_graphs.py`).
"""

import gc
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .. import GRPOConfig, ModelConfig, TunixTrainer
from ..batch import PromptBatch, TrainBatch
from ..model import tiny
from ..model.loading import lora_config, torch_dtype
from ..runtime import device
from ..runtime.mesh import has_mesh, lay, sharding_of
from .graph import Graph, TracedGraph
from .graph_names import DECODE, LEARN, OLD, OPTIMIZER, PREFILL, REFERENCE

if device.graph_dialect() == "stablehlo":
    from .deferred_graphs import Reader
else:
    from .lazy_graphs import Reader


def model_of_zeros(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model on the CPU that takes no memory: every parameter is a single zero, expanded to its shape."""
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"  # as `load_base_model` chooses
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    model.tie_weights()
    return model


class _TrainerOfZeros(TunixTrainer):
    def _sums_of_frozen(self) -> dict[str, float]:
        return {}  # it would run a graph that copies every weight in float32, for which the host may have no memory


def make_trainer(config: PretrainedConfig, model_config: ModelConfig, args: GRPOConfig) -> TunixTrainer:
    """Return the job's trainer around a model of zeros, ready for its first step.

    Its rows and its reward function are placeholders, since they decide no shape. `args` is changed.
    """

    def no_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        return [0.0] * len(completions)

    logging.getLogger("tunix_torch.learn.collapse").setLevel(logging.ERROR)  # it would warn that all rewards are equal
    args.system_message = ""
    args.reward_weights = None
    args.output_dir = os.path.join(tempfile.gettempdir(), "plan-tpu")  # required, though nothing is written to it
    args.report_to = []
    rows = [{"prompt": "?", "answer": "!"}] * args.per_device_train_batch_size
    model = model_of_zeros(config, torch_dtype(model_config.model_dtype))
    trainer = _TrainerOfZeros(
        model,
        no_reward,
        args,
        rows,
        rows,
        processing_class=tiny.make_tokenizer(),
        peft_config=lora_config(model_config),
    )
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    trainer.begin_run()  # here, so that its graphs are not among those of the first step
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    device.sync()
    return trainer


class GraphPlanner:
    """Collects each graph that a trainer would run, in the device's place: see `runtime.device.Planner`."""

    def __init__(self, trainer: TunixTrainer) -> None:
        self.trainer = trainer
        self.reader = Reader(lambda: live_tensors(trainer.model), self._keep)
        self.shardings = {id(p): sharding_of(p) for p in trainer.model.parameters()} if has_mesh() else {}
        self.found: list[Graph] = []

    def graphs_of(self, run: Callable[[], object]) -> list[Graph]:
        """Return the graphs that a call would run, in order."""
        self.found = []
        few = int(os.environ.get("CPU_NUM_DEVICES", 1)) <= 127  # PyTorch's autograd threads fail with more devices
        gc.collect()
        gc.disable()  # so that `live_tensors` finds what a graph makes in the order in which it is made
        try:
            with device.planned_by(self), torch.autograd.set_multithreading_enabled(few):
                run()
        finally:
            gc.enable()
        return self.found

    def plan_step(self, step: Callable[..., object]) -> Callable[..., object]:
        """Return what the trainer calls in place of a decode step: one call of it is traced."""
        return self.reader.traced_once(step)

    def graph_ends(self) -> None:
        """Keep the pending graph, if there is one, and put zeros in place of its results."""
        traced = self.reader.pending_graph()
        if traced is not None:
            self._keep(traced)

    def _keep(self, traced: TracedGraph) -> None:
        self.found.append(traced.graph)
        layouts = self._layouts_of_trained() if has_mesh() else {}
        with torch.no_grad():
            for value, tensors in traced.results.items():
                layout = next(filter(None, map(sharding_of, tensors)), layouts.get(value)) if has_mesh() else None
                zeros = zeros_in_place_of(tensors[0], layout)
                for tensor in tensors:
                    tensor.data = zeros

    def _layouts_of_trained(self) -> dict[int, object]:
        """Return the sharding of each trained parameter, its gradient and AdamW's averages, by `Reader.value_of`.

        A gradient and the averages get their parameter's sharding. Without one, XLA would choose it, and the zeros in
        their place could lie differently than in a real run.
        """
        layouts = {}
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad:
                layout = self.shardings[id(parameter)]
                state = self.trainer.optimizer.state.get(parameter, {}).values()
                for tensor in (parameter, parameter.grad, *state):
                    if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                        layouts[self.reader.value_of(tensor)] = layout
        return layouts


def live_tensors(model: nn.Module) -> list[Tensor]:
    """Return every tensor on the device that Python can still reach: those that `device.sync` would compute."""
    kind, parameters = device.torch_device().type, list(model.parameters())
    found = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.device.type == kind]
    found = [tensor for tensor in found if type(tensor) is not FakeTensor]  # which TorchDynamo leaves
    return [*parameters, *(p.grad for p in parameters if p.grad is not None), *found]


def zeros_in_place_of(tensor: Tensor, sharding: Any) -> Tensor:
    """Return zeros on the device, of the tensor's shape and type.

    Args:
        sharding: how the zeros lie on the mesh, as `runtime.mesh.sharding_of` returns it; None for no sharding.
    """
    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape).to(device.torch_device())
    if sharding is not None:
        lay(zeros, sharding)
    return zeros


def trace_step(trainer: TunixTrainer) -> list[Graph]:
    """Return the graphs of one step of the trainer's job: each once, with how often it runs.

    The small graphs that cut a batch into micro-batches are left out.
    """
    args, planner = trainer.args, GraphPlanner(trainer)
    target = device.torch_device()
    num_prompts, group = args.per_device_train_batch_size, args.num_completions_per_prompt
    rows, width = num_prompts * group, args.generation_max_length
    prompt_ids = torch.zeros(num_prompts, args.max_prompt_length, dtype=torch.int64).to(target)
    prompt_mask = torch.ones(num_prompts, args.max_prompt_length, dtype=torch.bool).to(target)
    prompts = PromptBatch(prompt_ids, prompt_mask, [{"prompt": "?", "answer": "!"}] * num_prompts)

    learn, step = trainer.learning_pass, trainer.optimizer_step
    # This first pass gives AdamW its averages, which it has in every later step; its graphs are not kept.
    planner.graphs_of(lambda: (learn(_batch_of_zeros(prompts, rows, width, args)), step()))
    batches = []
    rollout_graphs = planner.graphs_of(lambda: batches.append(trainer.collect(prompts)))
    learn_graphs = planner.graphs_of(lambda: learn(batches[0]))
    optimizer_graphs = planner.graphs_of(step)

    # The graphs that multiply matrices, which the small ones do not.
    large = [graph for graph in rollout_graphs if graph.multiplies_matrices]
    names = [PREFILL, DECODE] + [REFERENCE] * (args.beta > 0) + [OLD] * (args.num_iterations > 1)
    different = list({graph.digest: graph for graph in large}.values())
    assert len(different) >= len(names), f"{len(different)} graphs for {names}"
    different = different[-len(names) :]  # before them may run a graph that merges the LoRA into float32 weights
    counts = Counter(graph.digest for graph in large)
    graphs = [
        replace(graph, name=name, runs=counts[graph.digest]) for name, graph in zip(names, different, strict=True)
    ]
    graphs[1].runs = width - 1  # the decode step, of which the reader has traced one run
    passes = [graph for graph in learn_graphs if graph.multiplies_matrices]
    # of several micro-batches the last one counts: it adds to the gradients of those before
    graphs.append(replace(passes[-1], name=LEARN, runs=len(passes) * args.num_iterations))
    graphs.append(replace(optimizer_graphs[-1], name=OPTIMIZER, runs=args.num_iterations))
    return graphs


def _batch_of_zeros(prompts: PromptBatch, rows: int, width: int, args: GRPOConfig) -> TrainBatch:
    """Return a batch of zeros with the shapes of those from `TunixTrainer.make_train_batch`."""
    target = device.torch_device()

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype).to(target)

    return TrainBatch(
        prompt_ids=prompts.prompt_ids,
        prompt_mask=prompts.prompt_mask,
        completion_ids=zeros(rows, width, dtype=torch.int64),
        completion_mask=zeros(rows, width, dtype=torch.bool),
        advantages=zeros(rows),
        token_weights=zeros(rows, width),
        lengths=torch.zeros(rows, dtype=torch.int64),
        ref_per_token_logps=zeros(rows, width) if args.beta > 0 else None,
        old_per_token_logps=zeros(rows, width) if args.num_iterations > 1 else None,
        sampler_logps=zeros(rows, width),
        entropy_weights=zeros(rows, width) if args.has_entropy_bonus else None,
    )
