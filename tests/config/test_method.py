"""Every method of training has one name, which the terminal, the model card and the report share."""

import pytest
from written_runs import healthy_rows

from tunix_torch import DataConfig, GRPOConfig, ModelConfig
from tunix_torch.checkpoints.card import CardFacts, model_card
from tunix_torch.config.checks import PREFERENCE_LOSSES
from tunix_torch.config.method import method_name, method_of
from tunix_torch.config.saved import settings_of
from tunix_torch.grpo import ALGORITHMS
from tunix_torch.report.about import facts_of
from tunix_torch.report.record import RunRecord

GRPO = [({"algorithm": name}, name, name.upper()) for name in ALGORITHMS if name != "dr_grpo"]
PAIRS = [({"use_grpo": False, "preference_loss": n}, n, n.upper()) for n in PREFERENCE_LOSSES if n != "simpo"]
OTHERS = [
    ({"algorithm": "dr_grpo"}, "dr_grpo", "Dr. GRPO"),
    ({"use_grpo": False, "preference_loss": "simpo"}, "simpo", "SimPO"),
    ({"use_grpo": False}, "sft", "SFT"),
    ({"teacher": "base"}, "distillation", "on-policy distillation"),
    ({"teacher": "base", "algorithm": "dapo"}, "distillation", "on-policy distillation"),
]


@pytest.mark.parametrize("given, method, name", [*GRPO, *PAIRS, *OTHERS])
def test_card_and_report_call_a_method_by_its_name(tmp_path, given, method, name):
    settings = settings_of(ModelConfig("tiny"), DataConfig(), GRPOConfig(output_dir=str(tmp_path), **given))
    assert (method_of(settings), method_name(settings)) == (method, name)
    card = model_card(tmp_path, CardFacts("tiny", "gemma3_text", is_adapter=True, settings=settings))
    assert method in card.data.tags
    assert {"sft": "supervised fine-tuning"}.get(method, name) in card.text
    assert dict(facts_of(RunRecord(tmp_path, healthy_rows(), settings)))["method"] == name


def test_a_run_without_settings_is_known_by_what_it_logged(tmp_path):
    assert RunRecord(tmp_path, healthy_rows()).method == "GRPO"
    assert RunRecord(tmp_path, [{"step": 1, "loss": 0.5}]).method == "SFT"
