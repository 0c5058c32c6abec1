"""`generation_kwargs` set our settings by the names of Transformers, and refuse what sampling here can't do."""

import pytest

from tunix_torch import GRPOConfig, SamplingParams
from tunix_torch.config.flags import parse_job

GIVEN = {"temperature": 0.7, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2, "max_new_tokens": 32}
MEANT = SamplingParams(32, 0.7, 7, 0.8, 0.1, 1.2)


def test_generation_kwargs_say_how_rollouts_are_sampled_and_win_over_other_settings(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), top_k=3, generation_kwargs=GIVEN | {"do_sample": True, "num_beams": 1})
    assert SamplingParams.of_rollouts(args) == MEANT
    by_name = {name: value for name, value in GIVEN.items() if name != "max_new_tokens"}
    assert SamplingParams.of_rollouts(GRPOConfig(**by_name, max_completion_length=32)) == MEANT
    off = GRPOConfig(generation_kwargs={"top_k": None, "top_p": None, "min_p": None, "repetition_penalty": None})
    assert SamplingParams.of_rollouts(off) == SamplingParams(256, 0.8)


def test_a_flag_takes_generation_kwargs_as_json(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--generation_kwargs", '{"top_k": 7}', "--min_p", "0.2"]
    args = parse_job(flags)[2]
    assert (args.generation_top_k, args.min_p) == (7, 0.2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"generation_kwargs": {"num_beams": 2}}, r"generation_kwargs\['num_beams'\]=2: must be 1"),
        ({"generation_kwargs": {"topk": 2}}, r"generation_kwargs\['topk'\]=2: .*did you mean 'top_k'"),
        ({"generation_kwargs": {"top_p": 2.0}}, r"generation_top_p=2.0: must be in \(0, 1\]"),
        ({"generation_kwargs": {"max_new_tokens": None}}, "generation_max_length=None: expected int"),
        ({"generation_kwargs": "{top_k"}, "generation_kwargs='{top_k': not valid JSON"),
        ({"generation_kwargs": [5]}, r"generation_kwargs=\[5\]: expected names and values"),
        ({"min_p": 1.5}, r"min_p=1.5: must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
    ],
)
def test_what_can_not_be_sampled_is_refused_in_one_line(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        GRPOConfig(output_dir=str(tmp_path), **settings)
    assert "\n" not in str(error.value)


def test_trls_name_for_completions_at_evaluation(tmp_path):
    assert GRPOConfig(output_dir=str(tmp_path), num_generations_eval=3).num_eval_completions == 3
