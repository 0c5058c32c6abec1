"""What the tests of plans share."""

import pytest


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A folder that has only the config of a model of two layers."""
    from tunix_torch.preflight.models import model_config, with_depth

    folder = tmp_path_factory.mktemp("small")
    with_depth(model_config("tiny"), 2).save_pretrained(folder)
    return folder
