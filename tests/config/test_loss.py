"""Settings of advantages and loss: what is in force, what is refused in one line, and what is warned of once."""

import pytest

from tunix_torch import GRPOConfig
from tunix_torch.config.loss import loss_settings, warn_of_loss
from tunix_torch.grpo import LOSS_TYPES


def test_a_loss_type_brings_its_aggregation_unless_another_is_given(subtests):
    for loss_type, aggregation in LOSS_TYPES.items():
        with subtests.test(loss_type=loss_type):
            assert GRPOConfig(loss_type=loss_type).aggregation == aggregation
            given = GRPOConfig(loss_type=loss_type, loss_aggregation="seq-mean-token-sum")
            assert given.aggregation == "seq-mean-token-sum"
            assert loss_settings(given)["loss_type"] == loss_type


def test_without_one_the_algorithm_decides():
    for algorithm, loss_type, aggregation in (
        ("grpo", "grpo", "sequence-mean-token-mean"),
        ("gspo", "grpo", "sequence-mean-token-mean"),
        ("rloo", "grpo", "sequence-mean-token-mean"),
        ("dapo", "dapo", "token-mean"),
        ("dr_grpo", "dr_grpo", "sequence-mean-token-scale"),
    ):
        args = GRPOConfig(algorithm=algorithm)
        assert (loss_settings(args)["loss_type"], args.aggregation) == (loss_type, aggregation)
        assert args.sequence_level == (algorithm == "gspo")
    assert not GRPOConfig(algorithm="gspo", importance_sampling_level="token").sequence_level
    assert GRPOConfig(importance_sampling_level="sequence").sequence_level


def test_wrong_values_are_refused_by_name_and_value(subtests):
    for name, value in (
        ("loss_type", "ppo"),
        ("importance_sampling_level", "row"),
        ("scale_rewards", "all"),
        ("multi_objective_aggregation", "sum"),
        ("sampler_correction", "truncate"),
        ("sampler_correction_max", 0.0),
        ("delta", 0.0),
        ("sapo_temperature_pos", 0.0),
        ("top_entropy_quantile", 1.1),
        ("off_policy_mask_threshold", 0.0),
        ("overlong_buffer_length", -1),
        ("overlong_buffer_length", 300),
        ("overlong_penalty", -1.0),
        ("entropy_coef_delta", -0.1),
        ("entropy_coef_min", 2.0),
    ):
        with subtests.test(name=name, value=value):
            with pytest.raises(ValueError, match=rf"^{name}={value!r}: "):
                GRPOConfig(**{name: value})


def test_settings_that_contradict_each_other_are_refused(subtests):
    gdpo = {"multi_objective_aggregation": "normalize_then_sum"}
    for settings, message in (
        ({"scale_rewards": "group", "normalize_advantages": False}, "^scale_rewards='group': normalize_advantages=F"),
        ({"scale_rewards": "batch", "algorithm": "rloo"}, "^scale_rewards='batch': algorithm='rloo' never"),
        ({"scale_rewards": True, "algorithm": "dr_grpo"}, "^scale_rewards='group': algorithm='dr_grpo' never"),
        (gdpo | {"normalize_advantages": False}, "^multi_objective_aggregation='normalize_then_sum': divides"),
        (gdpo | {"scale_rewards": "none"}, "^multi_objective_aggregation='normalize_then_sum': scales"),
        (gdpo | {"overlong_buffer_length": 8}, "^multi_objective_aggregation='normalize_then_sum': takes"),
        ({"sampler_correction_min": 3.0}, "^sampler_correction_min=3.0: must be below sampler_correction_max=3.0"),
        ({"sampler_correction": "token_truncate", "sampler_correction_max": None}, "^sampler_correction='token_trunc"),
        ({"loss_type": "vespo", "sampler_correction": "sequence_mask"}, "^sampler_correction='sequence_mask': vespo"),
    ):
        with subtests.test(settings=settings):
            with pytest.raises(ValueError, match=message):
                GRPOConfig(**settings)


def test_what_may_not_be_meant_is_said_once(subtests, caplog):
    whole = {"generation_top_k": 0, "generation_top_p": 1.0}
    sequence = {"importance_sampling_level": "sequence"}
    for settings, words in (
        ({}, "sampler_correction"),
        ({"generation_top_k": 0}, "sampler_correction"),
        ({"sampler_correction": "token_mask"}, None),
        (whole, None),
        (whole | {"loss_type": "dapo"} | sequence, "weights each sequence by its completion length"),
        (whole | {"algorithm": "dr_grpo"} | sequence, "weights each sequence by its completion length"),
        (whole | {"algorithm": "gspo"}, None),
        (whole | {"loss_type": "luspo"}, "luspo"),
        (whole | {"loss_type": "luspo"} | sequence, None),
        (whole | {"loss_type": "vespo"} | sequence, "vespo"),
        (whole | {"loss_type": "cispo"}, "epsilon_high=5"),
        (whole | {"loss_type": "cispo", "epsilon_high": 5.0}, None),
    ):
        with subtests.test(settings=settings):
            caplog.clear()
            warn_of_loss(GRPOConfig(**settings))
            assert len(caplog.records) == (words is not None) and (words or "") in caplog.text
