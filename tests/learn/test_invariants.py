"""The first ratio is 1: exactly where products have float32's precision, elsewhere for nearly all tokens."""

import pytest
import torch
from trainers import first_batch, make_trainer

from tunix_torch.runtime import once


@pytest.fixture
def rounded_products(monkeypatch):
    """Products of float32 matrices may be rounded, as on CUDA with TF32 or on a TPU by default."""
    monkeypatch.setattr(once, "_said", set())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def update_with_ratio_off_in(rows, trainer):
    batch = first_batch(trainer)
    trainer.create_optimizer_and_scheduler(10)
    batch.old_per_token_logps = batch.sampler_logps.clone()
    batch.old_per_token_logps[rows, 0] -= 1.0
    trainer.update(batch)


def test_in_float32_one_token_whose_first_ratio_is_not_1_ends_the_run(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path)
    with pytest.raises(AssertionError, match="the first ratio is off 1 by 1.72; group 1 has rewards"):
        update_with_ratio_off_in([5], trainer)


def test_where_products_are_rounded_one_such_token_is_no_reason_to_stop(
    model_folder, tmp_path, caplog, rounded_products
):
    update_with_ratio_off_in([5], make_trainer(model_folder, tmp_path))
    assert "first ratio" not in caplog.text


def test_where_products_are_rounded_many_such_rows_are_said_once(model_folder, tmp_path, caplog, rounded_products):
    for name in "ab":
        update_with_ratio_off_in(slice(None), make_trainer(model_folder, tmp_path / name))
    assert caplog.text.count("a token's first ratio is off 1, by rounding") == 1
