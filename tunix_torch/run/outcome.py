"""What follows the last step of a job: an evaluation, the adapter, curves, the report, and answers before and after."""

from pathlib import Path

from ..checkpoints.files import final_files
from ..checkpoints.manifest import mark_unfinished, write_manifest
from ..checkpoints.whole import rotate
from ..data.rows import answer_text, question_of
from ..data.visible import visible
from ..report.page import write_report_of_ended_run
from ..runtime import together
from ..trainer import TunixTrainer
from .curves import plot_training_curves

NUM_SHOWN = 3  # answers that are printed, each before and after training


def write_final_files(trainer: TunixTrainer) -> bool:
    """Evaluate once more where the last step has not been evaluated, then write adapter, state, curves and report.

    Returns:
        whether this process has written the report.
    """
    args, state = trainer.args, trainer.state
    best = state.best_global_step if args.load_best_model_at_end else None
    if best is not None and together.is_first():
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        print(f"The best model, with {name} {state.best_metric:.4g}, is that of step {best}")
    last = evaluations(trainer)[-1]["step"]
    if trainer.eval_dataset is not None and (last != state.global_step or best not in (None, last)):
        trainer.evaluate()  # the last step was not one of eval_steps, or the best model is an earlier one
    if together.is_first():
        rotate(Path(args.output_dir), args.save_total_limit, state.best_model_checkpoint)  # if it was killed before
        mark_unfinished(args.output_dir)
    together.wait()
    trainer.save_model(push=False)  # the job does that when everything is written
    trainer.save_state()
    together.wait()
    if not together.is_first():
        return False
    plot_training_curves(args.output_dir)
    trainer.create_model_card()
    write_manifest(args.output_dir, final_files(args.output_dir))  # from here on the run is finished
    is_reported = write_report_of_ended_run(args.output_dir)
    print_answers(trainer)
    return is_reported


def evaluations(trainer: TunixTrainer) -> list[dict[str, float]]:
    """The logged evaluations, oldest first. Where there was none, one entry that only has a step, -1."""
    return [row for row in trainer.state.log_history if "eval_runtime" in row] or [{"step": -1}]


def print_answers(trainer: TunixTrainer) -> None:
    """Print a few answers to evaluation questions before and after training, those first that came right or wrong."""
    first, last = trainer.first_answers, trainer.last_answers
    if last is None:  # there is no judge or no question, or another process has evaluated a run that was finished
        return
    changed = [i for i in range(len(last.right)) if first.right[i] != last.right[i]]
    for i in (changed or list(range(len(last.right))))[:NUM_SHOWN]:
        row = trainer.questions.evaluation[i]
        print(visible(f"\n{question_of(row)}  (answer: {answer_text(row)})"))
        # a resumed run has not seen what was answered before training
        earlier = "before" if first.step == 0 else f"step {first.step}"
        for label, answers in [(earlier, first)] * (first is not last) + [("after", last)]:
            verdict = "right" if answers.right[i][0] else "wrong"
            text = answers.completions[i][0].replace("\n", " \u23ce ")
            print(f"  {label:<{max(6, len(earlier))}} {verdict:<7}{visible(text)}")
