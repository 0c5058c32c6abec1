"""Two processes that split the weights by FSDP2 give what one process gives that holds all of them.

They talk through gloo on the CPU, as processes of several GPUs under `accelerate launch` talk through NCCL.
"""

import json

import pytest
import several_processes
import torch
from safetensors.torch import load_file

from tunix_torch import GRPOConfig

# A case takes STEPS optimizer steps, each with PROMPTS prompts over all processes. It saves after the second.
STEPS, PROMPTS = 3, 4

JOB = """
import gc, sys, torch
from transformers import TrainerCallback
from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.model import tiny
from tunix_torch.runtime import fsdp, together
from several_processes import completions_of, make_pairs, settings_of_case, spoil_loss
from trainers import digits_reward

folder, root, others, steps, prompts, cases = *sys.argv[1:4], *map(int, sys.argv[4:6]), sys.argv[6].split(",")

def learning(trainer):
    return [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]

class Recorder(TrainerCallback):
    def on_pre_optimizer_step(self, *args, **kwargs):
        gradients.append({name: fsdp.whole(p.grad).clone() for name, p in learning(trainer)})

    def on_step_end(self, *args, **kwargs):
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter, fsdp.DTensor)]
        parts = [fsdp.own_part(x) for x in tensors]
        parts = [x.untyped_storage() for x in parts if torch._C._has_storage(x)]  # not of one that is just let go
        storages = {x.data_ptr(): x.nbytes() for x in parts}
        held.append(sum(storages.values()) - sum(g.nbytes for of_step in gradients for g in of_step.values()))

whole = {"adam_epsilon": 1e-2, "learning_rate": 1e-3, "sync_ref_model": True, "ref_model_sync_steps": 2}
saved, evaluated = {"save_strategy": "steps", "save_steps": 2}, {"eval_strategy": "steps", "eval_steps": 2}
changed = {"allow_changes": ["processes", "per_device_train_batch_size"]}
CASES = {
    "lora": saved | evaluated | {"num_eval_completions": 2, "eval_on_start": True},
    "whole": saved | whole | {"gather_for_rollout": False},
    # Many tokens end a completion, so that the processes' rows end at different times.
    "layers": evaluated | {"gather_for_rollout": False, "gradient_accumulation_steps": 2, "micro_batch_size": 2},
    "passes": {"num_iterations": 2, "steps_per_generation": 3, "fsdp_config": {"reshard_after_forward": False}},
    "sft whole": evaluated | {"use_grpo": False, "generation_max_length": 64, "gradient_checkpointing": True,
                              "learning_rate": 1e-3},
    "pairs": evaluated | {"use_grpo": False, "preference_loss": "dpo"},
    "teacher": {"teacher": f"{root}/whole"},
    "skipped whole": {"use_grpo": False, "generation_max_length": 64, "learning_rate": 1e-3},
    "resumed": {}, "whole resumed": whole,
    "of others": changed, "whole of others": changed | whole,
}
GRPOConfig(output_dir=root)  # joins the processes
for case in cases:
    settings = settings_of_case(root, case, steps, prompts) | CASES[case]
    if together.count() > 1:
        settings["fsdp"] = "full_shard"
    else:
        settings = {name: v for name, v in settings.items() if name not in ("gather_for_rollout", "fsdp_config")}
    rows, eval_rows, functions = tiny.arithmetic_rows("train", 64), tiny.arithmetic_rows("test", 7), [digits_reward]
    if case == "pairs":
        functions = None
        make_pairs(rows + eval_rows)
    gradients, held = [], []
    args = GRPOConfig(**settings)
    trainer = TunixTrainer(folder, functions, args, rows, eval_rows, callbacks=[Recorder()], full="whole" in case)
    if case == "layers":
        ends = range(5, trainer.policy.num_embeddings, 4)
        trainer.sampler.eos_token_ids = tuple({*trainer.sampler.eos_token_ids, *ends})
    parts = [(p.nbytes, fsdp.own_part(p).nbytes) for p in trainer.model.parameters()]
    completions = completions_of(trainer)
    if case == "skipped whole":  # the loss of the last process alone is not finite, in the second step
        spoil_loss(trainer, 1)
    run = "whole" if "whole" in case else "lora"
    place = f"{root}/{run}" if "resumed" in case else f"{others}/{run}" if "others" in case else None
    trainer.train(resume_from_checkpoint=place and f"{place}/checkpoint-2")
    trainer.save_model()
    weights = {name: fsdp.whole(p).detach().clone() for name, p in learning(trainer)}
    everyones = together.gather(weights)
    assert all(torch.equal(everyones[0][name], theirs[name]) for theirs in everyones for name in weights)
    if together.index() == 0:
        answers = trainer.last_answers and trainer.last_answers.completions
        torch.save({"gradients": gradients, "completions": completions, "weights": weights, "answers": answers,
                    "held": held, "parts": parts, "log": trainer.state.log_history}, f"{root}/{case}.pt")
    del trainer, weights, everyones
"""
BOTH = ("lora", "whole", "layers", "passes", "sft whole", "pairs", "teacher", "skipped whole")
SLOW = ("passes", "sft whole", "pairs", "teacher", "skipped whole")
GONE_ON = ("resumed", "whole resumed", "of others", "whole of others")


def launch(number, folder, root, others, cases):
    """Run cases by a number of processes. The job's results lie in `root`."""
    several_processes.launch(JOB, number, root, folder, root, others, STEPS, PROMPTS, ",".join(cases))


@pytest.fixture(scope="module")
def results(request, model_folder, tmp_path_factory):
    """What every case recorded, by "one" process and by "two", and the folders of both as "folders"."""
    one, two = (tmp_path_factory.mktemp(f"fsdp-{number}") for number in (1, 2))
    asked = tuple(several_processes.asked_for(request, BOTH, SLOW))
    launch(1, model_folder, one, two, asked)
    launch(2, model_folder, two, one, asked + GONE_ON)
    launch(1, model_folder, one, two, GONE_ON[2:])
    cases = {one: asked + GONE_ON[2:], two: asked + GONE_ON}
    read = {root: {case: torch.load(root / f"{case}.pt") for case in cases[root]} for root in (one, two)}
    return {"one": read[one], "two": read[two], "folders": (one, two)}


def logged(result, name):
    return [row[name] for row in result["log"] if name in row]


both = pytest.mark.parametrize("case", several_processes.marked(BOTH, SLOW))


@pytest.mark.thorough
@both
def test_completions_gradients_and_weights_are_those_of_one_process(results, case):
    one, two = results["one"][case], results["two"][case]
    assert len(two["completions"]) == len(one["completions"])
    for ids, expected in zip(two["completions"], one["completions"], strict=True):
        assert torch.equal(ids, expected)
    for gradients, expected in zip(two["gradients"], one["gradients"], strict=True):
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).abs().max() <= 1e-5 * largest, name
    for name, weight in one["weights"].items():
        assert (two["weights"][name] - weight).abs().max() <= 1e-5, name


@pytest.mark.thorough
@both
def test_metrics_are_those_of_one_process(results, case):
    one, two = results["one"][case], results["two"][case]
    names = {name for row in one["log"] for name in row}
    assert names == {name for row in two["log"] for name in row} and "loss" in names
    for name in names:
        if "second" not in name and "runtime" not in name:
            assert logged(two, name) == pytest.approx(logged(one, name), abs=1e-5), name
    assert two["answers"] == one["answers"]


@pytest.mark.thorough
@pytest.mark.parametrize("case", several_processes.marked(["lora", "whole", "teacher"], SLOW))
def test_a_process_holds_half_of_the_weights_and_nothing_more_between_steps(results, case):
    """A LoRA is whole in each process. What a layer or a rollout gathered is freed: all tensors that Python knows are
    weights, moments, the reference policy that moves, and a batch."""
    one, two = results["one"][case], results["two"][case]
    base = sum(size for size, part in two["parts"] if part < size)
    lora = sum(size for size, part in two["parts"] if part == size)
    assert base > 3_800_000 and (lora == 0) == (case == "whole")
    assert sum(part for _, part in two["parts"]) == pytest.approx(lora + base / 2, rel=0.01)
    expected = {"lora": base / 2 + 3 * lora, "whole": 4 * base / 2, "teacher": 2 * base / 2 + 3 * lora}[case]
    assert two["held"][-1] == pytest.approx(expected, rel=0.05) and two["held"][-1] < 0.7 * one["held"][-1]


@pytest.mark.thorough
def test_rows_of_the_processes_ended_at_different_times(results):
    """In "layers" a process with rows that have ended goes on gathering weights for the other."""
    steps = [(ids != ids[0, -1]).sum(dim=1) for ids in results["two"]["layers"]["completions"]]
    assert any(int(lengths[:4].max()) != int(lengths[4:].max()) for lengths in steps)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["lora", "whole"])
def test_checkpoints_are_the_files_of_one_process(results, name):
    one, two = (folder / name / "checkpoint-2" for folder in results["folders"])
    # Each process keeps the state of its own generators, the second one in its own folder.
    assert {path.name for path in one.iterdir()} - {"rng_state.pth"} == {path.name for path in two.iterdir()} - {
        "rng_state_0.pth"
    }
    for file in one.glob("*.safetensors"):
        expected, found = load_file(file), load_file(two / file.name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype and (found[key] - tensor).abs().max() <= 1e-5, key
    for file in {path.name for path in one.glob("*config.json")}:
        expected, found = (json.loads((folder / file).read_text()) for folder in (one, two))
        for config in (expected, found):  # PEFT writes a set in any order
            config["target_modules"] = sorted(config.get("target_modules", []))
        assert expected == found, file
    expected, found = (torch.load(folder / "optimizer.pt") for folder in (one, two))
    assert expected["param_groups"] == found["param_groups"] and expected["state"].keys() == found["state"].keys()
    for number, state in expected["state"].items():
        for key, value in state.items():
            assert type(found["state"][number][key]) is torch.Tensor
            assert (found["state"][number][key] - value).abs().max() <= 1e-4 * max(1, value.abs().max()), (number, key)
    known, ours = (json.loads((folder / "run.json").read_text())["base_weights"] for folder in (one, two))
    assert known == ours


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["resumed", "whole resumed"])
def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(results, case):
    uninterrupted = results["two"]["whole" if "whole" in case else "lora"]
    for name, weight in uninterrupted["weights"].items():
        assert torch.equal(results["two"][case]["weights"][name], weight), name


@pytest.mark.thorough
@pytest.mark.parametrize("number", ["one", "two"])
@pytest.mark.parametrize("case", ["of others", "whole of others"])
def test_a_checkpoint_goes_on_in_another_number_of_processes(results, number, case):
    """In one process weights are not split, so this is also a checkpoint of FSDP2 that goes on without it."""
    uninterrupted = results["two" if number == "one" else "one"]["whole" if "whole" in case else "lora"]
    for name, weight in uninterrupted["weights"].items():
        assert (results[number][case]["weights"][name] - weight).abs().max() <= 1e-5, name


@pytest.mark.slow
def test_a_step_that_one_process_must_skip_is_skipped_by_all(results):
    for number in ("one", "two"):
        assert logged(results[number]["skipped whole"], "skipped_steps") == [1, 1, 1]  # steps 2 and 3, the summary


# ---- other models ----

MODELS = """
import torch
from models import FAMILIES, add_nontrivial_lora, make_batch, make_model, weighted
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig
from tunix_torch import GRPOConfig
from tunix_torch.learn.logprobs import token_logps
from tunix_torch.learn.passes import padded_rows, plain_rows
from tunix_torch.model.checks import check_head
from tunix_torch.model.decoding import decode_weights, fast_layers
from tunix_torch.model.forward import base_model, recompute_layers
from tunix_torch.model.attention import use_own_attention
from tunix_torch.model.loading import place
from tunix_torch.rollout.sampler import Sampler
from tunix_torch.rollout.tokens import SamplingParams, draw_uniforms
from tunix_torch.runtime import device, fsdp, together

GRPOConfig(output_dir="unused")  # joins the processes
batch = make_batch(seed=2 + together.index())
step_kind = device.step_kind
params = SamplingParams(max_new_tokens=6, temperature=0.0)
uniforms = draw_uniforms((0, 1), range(6), 6)

def make_seeing_model():
    vision = SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                image_size=8, patch_size=4)
    config = Gemma3Config(text_config=make_model("gemma3").config, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()

def numbers(model, split, lay_out):
    use_own_attention(base_model(model))
    place(model, fsdp.Splitting(True, lay_out is padded_rows) if split else None, learning)
    check_head(model)
    if lay_out is plain_rows:
        recompute_layers(model)
    model.train()
    with fast_layers(model):
        logps, _ = token_logps(model, lay_out(batch))
        weighted(logps, batch).backward()
    gradients = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradients[name] = sum(together.gather(p.grad)) if not fsdp.is_part(p.grad) else fsdp.whole(p.grad)
    if split and lay_out is plain_rows:  # the shapes of a rollout on CUDA
        device.step_kind = lambda: "recorded"
    rollout = Sampler(model, [1], 0).sample(batch.prompt_ids, batch.prompt_mask, 2, params, uniforms)
    device.step_kind = step_kind
    return logps.detach(), gradients, rollout.completion_ids

CASES = [(family, {}, {}, True) for family in (*FAMILIES, "gemma3 that sees")] + [("gemma4", {}, {}, False)]
CASES += [("gemma3", {"tie_word_embeddings": False}, {}, lora) for lora in (True, False)]
CASES += [("gemma3", {}, {"use_dora": True}, True), ("gemma3", {}, {"modules_to_save": ["embed_tokens"]}, True)]
for family, overrides, settings, lora in CASES:
    for lay_out in (padded_rows, plain_rows):
        found = []
        for split in (False, True):
            model = make_model(family, **overrides) if family in FAMILIES else make_seeing_model()
            model = add_nontrivial_lora(model, **settings) if lora else model
            learning = [p for p in model.parameters() if p.requires_grad] if lora else []
            found.append(numbers(model, split, lay_out))
        (logps, gradients, ids), (their_logps, their_gradients, their_ids) = found
        where = family, overrides, settings, lora, lay_out.__name__
        assert (logps - their_logps).abs().max() < 1e-4, where
        assert torch.equal(ids, their_ids), where
        assert gradients.keys() == their_gradients.keys(), where
        largest = max(float(g.abs().max()) for g in gradients.values())
        for name, gradient in gradients.items():
            assert (gradient - their_gradients[name]).abs().max() < 1e-5 * largest, (*where, name)
        assert all(map(fsdp.is_part, (p for p in model.parameters() if not any(p is q for q in learning)))), where
"""


@pytest.mark.slow
def test_every_family_computes_and_samples_what_it_does_with_whole_weights(tmp_path):
    """With tied and untied embeddings, shared keys and values, DoRA, copies of layers, and layers that are computed
    again. A rollout gathers all weights at once, or layer by layer."""
    several_processes.launch(MODELS, 2, tmp_path)


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fsdp": True}, "^fsdp=True: .*this is the only one: accelerate launch"),
        ({"fsdp": "full_shard auto_wrap"}, "^fsdp='full_shard auto_wrap': .*this is the only one"),
        ({"fsdp": ["shard_grad_op"]}, "^fsdp=.'shard_grad_op'.: .*this is the only one"),
        ({"fsdp": "hybrid_shard"}, "^fsdp='hybrid_shard': give true, or some of full_shard"),
        ({"fsdp": "full_shard offload"}, "^fsdp='full_shard offload': give true, or some of full_shard"),
        ({"fsdp": "full_shard shard_grad_op"}, "^fsdp='full_shard shard_grad_op': give one of"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "^fsdp_config.'version'.=1: .*give 2"),
        ({"fsdp": True, "fsdp_config": {"fsdp_version": 1}}, "^fsdp_config.'version'.=1: .*give 2"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "^fsdp_config.'cpu_offload'.=True: .*more GPUs"),
        ({"fsdp": True, "fsdp_config": '{"cpu_ram_efficient_loading": true}'}, "^fsdp_config.'cpu_ram.*=True: "),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, "=True: set gradient_checkpointing"),
        ({"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}, "'SHARDED_STATE_DICT': .*whole"),
        ({"fsdp": True, "fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}}, "'SIZE_BASED_WRAP': "),
        ({"fsdp": True, "fsdp_config": {"xla": True}}, "^fsdp_config.'xla'.=True: .*mesh_shape"),
        ({"fsdp": True, "fsdp_config": {"reshard_after_forwards": True}}, "did you mean 'reshard_after_forward'"),
        ({"fsdp": True, "fsdp_config": "nowhere.json"}, "^fsdp_config='nowhere.json': no such file"),
        ({"fsdp_config": {"version": 2}}, "^fsdp_config=.*: has an effect with fsdp only"),
        ({"gather_for_rollout": True}, "^gather_for_rollout=True: is about fsdp"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        GRPOConfig(output_dir=str(tmp_path), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.xla
def test_on_xla_a_mesh_is_what_splits_weights(tmp_path):
    with pytest.raises(ValueError, match="^fsdp=True: on XLA a mesh splits weights: .*mesh_shape"):
        GRPOConfig(output_dir=str(tmp_path), fsdp=True)


def test_settings_are_those_of_transformers_and_come_back_from_a_saved_file(tmp_path, monkeypatch):
    """`fsdp` is read before and after Transformers has filled in what `fsdp_config` leaves out."""
    from tunix_torch.runtime import together

    monkeypatch.setattr(together, "count", lambda: 2)
    for fsdp, config, reshards in (
        (True, None, True),
        ("full_shard auto_wrap", {"version": 2}, True),
        ("shard_grad_op", None, False),
        (True, {"reshard_after_forward": "false", "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}, False),
    ):
        args = GRPOConfig(output_dir=str(tmp_path), fsdp=fsdp, fsdp_config=config, gather_for_rollout=False)
        again = GRPOConfig(
            output_dir=str(tmp_path), fsdp=args.fsdp, fsdp_config=json.loads(json.dumps(args.fsdp_config))
        )
        for each in (args, again):
            assert each.fsdp is True and each.splitting.reshard_after_forward is reshards
            assert each.fsdp_plugin_args is None, "else the Trainer would hand them to Accelerate"
        assert (args.splitting.gather_for_rollout, again.splitting.gather_for_rollout) == (False, None)


def test_all_weights_take_an_optimizer_whose_state_is_split_as_they_are(model_folder, tmp_path, monkeypatch):
    from trainers import make_trainer

    from tunix_torch.runtime import together

    monkeypatch.setattr(together, "count", lambda: 2)
    with pytest.raises(
        ValueError, match="^optim='adafactor': with fsdp, training all weights takes one of adamw_torch"
    ):
        make_trainer(model_folder, tmp_path, full=True, fsdp=True, optim="adafactor")
