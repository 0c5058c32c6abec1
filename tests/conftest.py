"""What must be settled before anything heavy is imported: the tests run on the CPU unless told otherwise."""

import gc
import os

import pytest

os.environ.setdefault("TUNIX_DEVICE", "cpu")
# The models here are too small for several threads, which slow each other down where other work shares the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Importing makes many objects and no garbage; searching them for it over and over takes a quarter of collecting.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The tiny model without its warm start, as a Hugging Face folder."""
    from tunix_torch.model import tiny

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tiny.make_tokenizer()
    tiny.make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def cache(tmp_path_factory, model_folder):
    """A cache folder in which the tiny model lies already, without its warm start, so that no test waits for that."""
    from tunix_torch.model import tiny

    folder = tmp_path_factory.mktemp("cache")
    os.symlink(model_folder, folder / tiny.folder_name())
    return str(folder)
