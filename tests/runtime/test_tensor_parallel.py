"""A mesh of processes, of which those along tp hold parts of the weights, gives what one process gives that has all.

The processes talk through gloo on the CPU. `tests/tpu_plugin/test_chips.py` runs the same on torch_tpu's device.
"""

import pytest
import torch
from models import add_nontrivial_lora, make_model
from processes_of_mesh import JOB, main
from safetensors.torch import load_file
from several_processes import launch

from tunix_torch import GRPOConfig
from tunix_torch.model import tiny
from tunix_torch.model.policy import make_policy
from tunix_torch.runtime import mesh, tensor_parallel

CASES, SAVED = ("lora", "whole"), ("lora", "saved whole")


def read(root, cases):
    return {case: torch.load(root / f"{case}.pt") for case in cases}


def folders(root):
    """An empty folder for what one process writes, and one for a mesh."""
    one, several = root / "one", root / "mesh"
    one.mkdir()
    several.mkdir()
    return one, several


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every case gave, to "one" process and to four on a "mesh" of 2 by 2, and the folders of both."""
    one, four = (tmp_path_factory.mktemp(name) for name in ("one", "mesh"))
    main("1", str(one), "", *CASES)
    launch(JOB, 4, four, "2,2", four, one, *CASES)
    return {"one": read(one, CASES), "mesh": read(four, CASES), "folders": (one, four)}


def assert_same_run(found, expected):
    """Check that two runs have logged the same and learned the same weights."""
    for name in {name for row in expected["log"] for name in row if "second" not in name and "runtime" not in name}:
        logs = [[row[name] for row in result["log"] if name in row] for result in (found, expected)]
        assert logs[0] == pytest.approx(logs[1], abs=1e-5), name
    assert_same_weights(found, expected)


def assert_same_weights(found, expected):
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max() <= 1e-5, name


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_a_mesh_learns_what_one_process_learns(results, case):
    """Losses, rewards, norms of gradients, evaluations and weights. All processes end with the same weights."""
    assert (results["one"][case]["compared"], results["mesh"][case]["compared"]) == (1, 4)
    assert_same_run(results["mesh"][case], results["one"][case])


@pytest.mark.thorough
def test_a_process_holds_half_of_what_the_table_splits(results):
    """With one KV head, which two processes can't share, keys and values are computed by both."""
    for case, kv_share in (("lora", 2), ("whole", 1)):
        result = results["mesh"][case]
        shares = {name: size / part for name, (size, part) in result["parts"].items()}
        for name, share in shares.items():
            is_kv, is_norm = "k_proj" in name or "v_proj" in name, "norm" in name
            by_input = "o_proj" in name or "down_proj" in name
            whole = is_norm or ("lora_B" if by_input else "lora_A") in name
            assert share == (1 if whole else kv_share if is_kv else 2), name
        assert result["tied"] and len(shares) > 20


@pytest.mark.thorough
def test_checkpoints_are_whole(results):
    assert_same_checkpoints(*(folder / "lora" / "checkpoint-1" for folder in results["folders"]))


def assert_same_checkpoints(one, four):
    """Check that the files of several processes hold the tensors of one process, whole and plain."""
    for file in one.glob("*.safetensors"):
        expected, found = load_file(file), load_file(four / file.name)
        assert expected.keys() == found.keys()
        assert all((found[key] - tensor).abs().max() <= 1e-5 for key, tensor in expected.items())
    expected, found = (torch.load(folder / "optimizer.pt")["state"] for folder in (one, four))
    for number, state in expected.items():
        for key, value in state.items():
            theirs = found[number][key]
            assert type(theirs) is torch.Tensor and theirs.shape == value.shape
            assert (theirs - value).abs().max() <= 1e-4 * max(1, value.abs().max()), (number, key)


# ---- more of it ----


@pytest.mark.slow
@pytest.mark.parametrize("split", ["", "fsdp "])
def test_a_checkpoint_goes_on_with_another_number_of_processes(tmp_path, split):
    """Where weights lie in parts along both axes, by FSDP2 along fsdp, too."""
    one, four = folders(tmp_path)
    main("1", str(one), "", *SAVED)
    on_mesh, resumed = [split + case for case in SAVED], [f"{case} of others" for case in SAVED]
    launch(JOB, 4, four, "2,2", four, one, *on_mesh, *resumed)
    for case in SAVED if split else ():  # a case goes on from the folder of its own name
        (four / f"{split}{case}").rename(four / case)
    main("1", str(one), str(four), *resumed)
    for case in SAVED:
        uninterrupted = read(one, [case])[case]
        assert_same_run(read(four, [split + case])[split + case], uninterrupted)
        assert_same_checkpoints(one / case / "checkpoint-1", four / case / "checkpoint-1")
        for root in (one, four):
            assert_same_weights(read(root, [f"{case} of others"])[f"{case} of others"], uninterrupted)


@pytest.mark.slow
def test_four_processes_along_tp_learn_what_one_learns(tmp_path):
    """Of two KV heads each is that of two processes."""
    one, four = folders(tmp_path)
    cases = ("lora", "sft")
    main("1", str(one), "", *cases)
    launch(JOB, 4, four, "1,4", four, one, *cases)
    for case in cases:
        assert_same_run(read(four, cases)[case], read(one, cases)[case])


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_every_family_computes_and_samples_what_it_does_with_whole_weights(tmp_path, number):
    """With KV heads that divide and that don't, tied and untied embeddings, a copy of them, with and without a LoRA."""
    one, several = folders(tmp_path)
    main("1", str(one), "", "families")
    launch(JOB, number, several, f"1,{number}", several, one, "families")
    expected, found = (read(root, ["families"])["families"] for root in (one, several))
    assert expected.keys() == found.keys()
    for where, (logps, gradients, ids) in expected.items():
        their_logps, their_gradients, their_ids = found[where]
        assert (logps - their_logps).abs().max() < 1e-4, where
        assert torch.equal(ids, their_ids), where
        assert gradients.keys() == their_gradients.keys(), where
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert (gradient - their_gradients[name]).abs().max() < 2e-5 * largest, (where, name)


# ---- what is refused ----


@pytest.mark.parametrize(
    "environment, said",
    [
        ({}, "each device of a mesh has a process, which makes 4, and there are 1; torchrun --nproc_per_node 4"),
        ({"WORLD_SIZE": "3"}, "which makes 4, and there are 3"),
    ],
)
def test_a_mesh_needs_a_process_for_each_device(monkeypatch, environment, said):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="^mesh_shape='2,2': on 'cpu' ") as caught:
        mesh.use_mesh(((2, 2), ("fsdp", "tp")))
    assert said in str(caught.value) and "\n" not in str(caught.value) and mesh.along_tp() == 1


@pytest.mark.parametrize(
    "tp, overrides, lora, said",
    [
        (3, {}, {}, "tp=3 does not fit the 4 heads and 2 KV heads of .*self_attn; .* fit: 3,1$"),
        (
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96},
            {},
            "tp=4 does not fit the 12 heads .* fit: 4,1, 2,2$",
        ),
        (2, {"vocab_size": 97}, {}, r"tp=2 does not divide the 97 of .*embed_tokens.weight \(97, 32\); .* fit: 2,1$"),
        (2, {}, {"use_dora": True}, "tp=2 can't split DoRA"),
    ],
)
def test_what_a_mesh_does_not_divide_is_refused_with_the_meshes_that_fit(monkeypatch, tp, overrides, lora, said):
    monkeypatch.setitem(mesh._of_processes, "tp", tp)
    model = add_nontrivial_lora(make_model("gemma3", **{"vocab_size": 96} | overrides), **lora)
    with pytest.raises(ValueError, match=f"^mesh_shape: {said}"):
        tensor_parallel.split(model, "vision")


def test_dropout_is_refused_along_tp(monkeypatch, tmp_path):
    monkeypatch.setitem(mesh._of_processes, "tp", 2)
    model = add_nontrivial_lora(make_model("gemma3"), lora_dropout=0.1)
    args = GRPOConfig(output_dir=str(tmp_path), generation_max_length=16)
    with pytest.raises(ValueError, match="^mesh_shape: along tp dropout would not be drawn alike; set lora_dropout 0"):
        make_policy(model, tiny.make_tokenizer(), None, args, {})
