"""The part of the trainer that writes the model card and uploads to the hub; a hub that fails does not end a run."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.trainer_utils import HubStrategy

from ..config.files import write_whole
from ..config.saved import CONFIG_FILE, RUN_FILE, WHOLE_CONFIG_FILE
from ..config.services import blamed_on
from ..model.forward import base_model
from ..model.policies import Policy
from .card import CARD_FILE, CURVES_FILE, CardFacts, model_card
from .failing import SavesBeforeFailing
from .files import FINAL_FILES
from .same_run import RunFacts

logger = logging.getLogger(__name__)

# What is uploaded of a run's folder. Checkpoints, earlier runs, kept batches and files of other programs are not.
UPLOADED = (*FINAL_FILES, CARD_FILE, CURVES_FILE, CONFIG_FILE, WHOLE_CONFIG_FILE, RUN_FILE)
UPLOADED += ("metrics.jsonl", "report.html", "runs/**/*")  # the last are TensorBoard's
UPLOADING = "uploading"  # the folder in output_dir where the files of a checkpoint wait until they are uploaded


class PushesToHub(SavesBeforeFailing):
    """A trainer with the model card of its run, which it uploads with what was trained.

    It does what `transformers.Trainer` does, but for three things. What goes to the hub is chosen by name, so that
    neither pickles with the user's token nor earlier runs are among it. An upload that fails during training is a
    warning. The last one comes after everything has been written.
    """

    policy: Policy
    facts: RunFacts
    push_in_progress: Future | None = None  # the upload that goes on beside training

    def init_hf_repo(self, token: str | None = None) -> None:
        hint = "; log in (hf auth login), or leave it out and upload the folder later"
        with blamed_on("push_to_hub", self.args.push_to_hub, hint):
            super().init_hf_repo(token)

    def create_model_card(self, **metadata: Any) -> None:
        """Write `README.md` into the run's folder, see `card.py`. The first process does.

        Args:
            metadata: more of the card's metadata, such as `language` or `tags`, by their names in its head; they win.
        """
        if self.is_world_process_zero():
            self.write_card(self.args.output_dir, **metadata)

    def write_card(self, folder: str | Path, **metadata: Any) -> None:
        """Write the card of what lies in a folder into it. It has the figures that have been logged."""
        write_whole(Path(folder) / CARD_FILE, f"{model_card(folder, self._card_facts(), metadata)}\n")

    def _card_facts(self) -> CardFacts:
        model, sets = base_model(self.model), self.eval_dataset
        sets = sets if isinstance(sets, dict) else {"": sets or []}
        return CardFacts(
            base=model.name_or_path,
            model_type=model.config.model_type,
            is_adapter=self.policy.has_base,
            settings=self.facts.known_settings(),
            reward_funcs=self.facts.reward_funcs,
            log_history=self.state.log_history,
            questions={name: len(rows) for name, rows in sets.items() if len(rows)},
            repo=self.hub_model_id or self.args.hub_model_id,
            are_messages=self.facts.questions_are_messages,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **metadata: Any,
    ) -> "CommitInfo | Future[CommitInfo] | None":
        """Save what was trained with its card, and upload it. See `transformers.Trainer.push_to_hub`.

        Args:
            metadata: see `create_model_card`.

        Returns:
            what the hub says of the commit; in other processes than the first, None.

        Raises:
            OSError: the upload failed; the folder has everything.
        """
        self.save_model(push=False)
        self.create_model_card(**metadata)
        return self.upload(commit_message, blocking, token, revision)

    def upload(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> "CommitInfo | Future[CommitInfo] | None":
        """Upload what lies in the run's folder. Arguments, result and errors are those of `push_to_hub`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        folder, repo = self.args.output_dir, self.hub_model_id
        with _explained(folder, repo):
            return HfApi().upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message,
                token=token or self.args.hub_token,
                run_as_future=not blocking,
                revision=revision or self.args.hub_revision,
                allow_patterns=uploaded_files(folder),
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint's model beside training, and with some strategies all of the checkpoint."""
        args, step = self.args, self.state.global_step
        if self._written_in is not None:  # it is pushed when it has its name
            return
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self._finish_current_push()
        everything = args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        waiting = _linked(Path(checkpoint_folder), Path(args.output_dir) / UPLOADING)
        self.write_card(waiting)  # the checkpoint's own was written when its log was not
        push = partial(HfApi().upload_folder, repo_id=self.hub_model_id, token=args.hub_token)
        push = partial(push, revision=args.hub_revision, folder_path=waiting)
        message = f"Training in progress, step {step}"

        def upload() -> None:
            with _without_bars():
                push(commit_message=message, allow_patterns=uploaded_files(waiting))
                if everything:
                    newest = args.hub_strategy == HubStrategy.CHECKPOINT
                    place = "last-checkpoint" if newest else Path(checkpoint_folder).name
                    push(commit_message=f"{message}, checkpoint", path_in_repo=place)

        self.push_in_progress = HfApi().run_as_future(upload)
        self.push_in_progress.add_done_callback(partial(_note_end, step, waiting))

    def _finish_current_push(self) -> None:
        """Wait for the upload that goes on beside training. How it ended has been said."""
        if self.push_in_progress is not None:
            with contextlib.suppress(Exception):
                self.push_in_progress.result()


def uploaded_files(folder: str | Path) -> list[str]:
    """The files in a run's folder that are uploaded, by their names in it."""
    folder = Path(folder)
    return [path.relative_to(folder).as_posix() for pattern in UPLOADED for path in sorted(folder.glob(pattern))]


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Within this context the hub's library draws no progress bars, which would break the lines of the training."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def _note_end(step: int, waiting: Path, upload: Future) -> None:
    """Say in one line when an upload beside training has failed, and delete the links to what was uploaded."""
    shutil.rmtree(waiting, ignore_errors=True)
    error = None if upload.cancelled() else upload.exception()
    if error is not None:
        hint = "training goes on, and the next upload has all of it"
        logger.warning("push_to_hub: the upload of step %d failed: %s; %s", step, _reason(error), hint)


def _linked(folder: Path, waiting: Path) -> Path:
    """A folder with links to the files of another one, which may then be deleted while they are read."""
    shutil.rmtree(waiting, ignore_errors=True)
    shutil.copytree(folder, waiting, copy_function=_link)
    return waiting


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # this file system has no links
        shutil.copy2(source, target)


@contextlib.contextmanager
def _explained(folder: str, repo: str) -> Iterator[None]:
    """Turn whatever an upload raises into one line that says what is on the disk, and how to try again.

    Raises:
        OSError: the code within this context raised something.
    """
    try:
        yield
    except Exception as error:
        again = f"`hf upload {repo} {folder}` or the same command with --resume_from_checkpoint auto tries again"
        raise OSError(
            f"push_to_hub=True: the upload to {repo} failed: {_reason(error)}; nothing is lost, all of the run is in "
            f"{folder}; {again}"
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
