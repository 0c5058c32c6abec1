"""The card of a plain model that was made of what a run has trained: the run's own, as far as it still holds."""

from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from ..config.files import load_config
from ..config.saved import config_file, saved_settings
from .card import (
    ABOUT,
    ADAPTER,
    CARD_FILE,
    LOADING,
    MERGED,
    SETTINGS,
    TAG,
    CardFacts,
    loading_text,
    model_card,
    versions,
)


def card_of_merged(run: Path, folder: Path, facts: CardFacts, whole: bool) -> ModelCard:
    """The card of a plain model that was made of what a run has trained.

    It is the run's own card, as far as that holds for this model too; where the run has none, a new one.

    Args:
        run: the run's folder.
        folder: where the model lies.
        facts: of the model. Those that only the run's card says are not needed.
        whole: the run trained all weights; else an adapter was merged.

    Raises:
        ValueError: the run's card can't be read.
    """
    card = _read_card(run / CARD_FILE)
    if card is None or TAG not in (card.data.tags or []):
        return model_card(folder, facts)
    parts = card.text.split("\n## ")
    sections = {heading: text for heading, _, text in (part.partition("\n\n") for part in parts[1:])}
    config = load_config(config_file(run)) if config_file(run).is_file() else saved_settings(run) or {}
    if not whole:
        sections[ABOUT] = sections.get(ABOUT, "").replace(ADAPTER, MERGED)
    sections[LOADING] = f"{loading_text(replace(facts, settings=config), folder)}\n"
    sections[SETTINGS] = sections.get(SETTINGS, "").partition("\nAll are in `")[0]  # its config.json is the model's
    sections["Versions"] = f"{versions(facts.is_adapter)}\n"
    data = card.data
    data["library_name"], data["base_model_relation"] = "transformers", "finetune" if data.base_model else None
    if data.model_name is not None:
        data["model_name"] = facts.repo
    body = "".join(f"\n## {heading}\n\n{text.rstrip()}\n" for heading, text in sections.items())
    return ModelCard(f"---\n{data}\n---\n\n# {facts.repo}\n{body}")


def _read_card(path: Path) -> ModelCard | None:
    """The card in a file; None: there is no such file."""
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path}: its head can't be read: {' '.join(str(error).split())}; mend or delete it"
        ) from error
