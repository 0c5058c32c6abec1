"""A job that cannot run fails early with one line, before anything of an earlier run is moved."""

import json
import re
import shutil

import pytest
import torch
from runs import SMALL, files, run
from trainers import digits_reward
from transformers import TrainerCallback, TrainingArguments

from tunix_torch import GRPOConfig, TunixTrainer, load_model, load_tokenizer
from tunix_torch.config import services
from tunix_torch.config.best_metric import evaluation_metrics
from tunix_torch.model import tiny
from tunix_torch.rewarding.workers import RewardWorkers
from tunix_torch.trainer import TunixTrainer as Trainer


@pytest.fixture(scope="module")
def earlier_run(finished_run, tmp_path_factory):
    """Return a run's folder that none of these tests may change."""
    folder = tmp_path_factory.mktemp("earlier") / "out"
    shutil.copytree(finished_run, folder)
    return folder


@pytest.fixture
def service(monkeypatch):
    """Make a callback that `report_to="wandb"` names; tests set `set_up`, which stands for its login and network."""

    class Service(TrainerCallback):
        set_up = None

        def setup(self, args, state, model):
            Service.set_up()

    monkeypatch.setitem(services.INTEGRATION_TO_CALLBACK, "wandb", Service)
    monkeypatch.setattr(services, "get_available_reporting_integrations", lambda: ["tensorboard", "wandb"])
    return Service


PROMISED = {
    "an optimizer whose package is missing": ({"optim": "adamw_8bit"}, "optim='adamw_8bit': .*bitsandbytes"),
    "another one": ({"optim": "lomo"}, "optim='lomo': .*lomo"),
    "an optimizer's argument": ({"optim_args": "colour"}, "optim='adamw_torch'"),
    "a schedule without what it needs": (
        {"lr_scheduler_type": "warmup_stable_decay"},
        "lr_scheduler_type='warmup_stable_decay': .*num_decay_steps.*lr_scheduler_kwargs=None",
    ),
    "a metric of rewards": (
        {"metric_for_best_model": "eval_rewards/nosuch/mean"},
        "metric_for_best_model='eval_rewards/nosuch/mean': an evaluation gives .* rewards/correctness_reward/mean, ",
    ),
    "a schedule by a metric, without evaluations": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no", "eval_steps": None},
        "lr_scheduler_type='reduce_lr_on_plateau': evaluations decide this: set eval_strategy",
    ),
    "a service that is not installed": ({"report_to": "mlflow"}, "report_to='mlflow': .*to be installed"),
    "another service": ({"report_to": ["tensorboard", "flyte"]}, "report_to='flyte': .*flytekit"),
    "a service that does not exist": ({"report_to": "paper"}, "report_to='paper': choose among azure_ml"),
    "the hub without a network": ({"push_to_hub": True}, "push_to_hub=True: .*[Oo]ffline.*log in"),
}


@pytest.mark.parametrize("case", PROMISED)
def test_nothing_is_moved_for_a_job_that_cannot_run(case, model_folder, earlier_run, tmp_path, monkeypatch):
    settings, message = PROMISED[case]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = files(earlier_run)
    with pytest.raises(ValueError, match=message):
        run(model_folder, earlier_run, **settings)
    assert files(earlier_run) == before
    new = tmp_path / "a" / "b"
    with pytest.raises(ValueError, match=message):
        run(model_folder, new, **settings)
    assert not list(tmp_path.iterdir()), "nor is an empty folder left"


def test_a_service_that_cannot_be_reached_is_named_before_anything_is_moved(model_folder, earlier_run, service):
    """Regression: wandb without a login failed only after the earlier run had been moved."""
    before = files(earlier_run)

    def refuse():
        assert files(earlier_run) == before, "too late"
        raise RuntimeError("no API key configured")

    service.set_up = staticmethod(refuse)
    with pytest.raises(ValueError, match="report_to='wandb': no API key configured; log in, let it work offline"):
        run(model_folder, earlier_run, report_to="wandb")
    assert files(earlier_run) == before


@pytest.mark.parametrize(
    "place",
    [(Trainer, "create_scheduler"), (Trainer, "_load_optimizer_and_scheduler"), (RewardWorkers, "__init__")],
    ids=lambda place: place[1],
)
def test_whatever_fails_before_the_first_step_moves_nothing(
    place, model_folder, finished_run, earlier_run, monkeypatch
):
    def fail(*args, **kwargs):
        raise OSError("as it happens")

    monkeypatch.setattr(*place, fail)
    before = files(earlier_run)
    with pytest.raises(OSError, match="as it happens"):
        resume = str(finished_run / "checkpoint-2")
        run(model_folder, earlier_run, reward_processes=1, resume_from_checkpoint=resume)
    assert files(earlier_run) == before


def test_plain_training_arguments_are_refused(model_folder, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="args: expected a GRPOConfig, which takes the same fields"):
        TunixTrainer(load_model(model_folder), digits_reward, args, processing_class=load_tokenizer(model_folder))


def test_the_metric_is_one_that_this_trainer_gives(model_folder, tmp_path):
    """Regression: supervised fine-tuning without a judge has no accuracy, so its first evaluation raised KeyError."""
    data = tiny.arithmetic_rows("train", 8), tiny.arithmetic_rows("test", 4)
    settings = SMALL | {"use_grpo": False, "generation_max_length": 64, "early_stopping_patience": 1}
    args = GRPOConfig(output_dir=str(tmp_path), **settings)
    with pytest.raises(ValueError, match="metric_for_best_model='accuracy': an evaluation gives loss, runtime$"):
        TunixTrainer(model_folder, None, args, *data)
    args = GRPOConfig(output_dir=str(tmp_path), **settings, metric_for_best_model="eval_loss")
    TunixTrainer(model_folder, None, args, *data).train()


def test_evaluations_give_the_metrics_that_are_promised(model_folder, tmp_path):
    data = tiny.arithmetic_rows("train", 8), tiny.arithmetic_rows("test", 4)
    for use_grpo, reward_funcs in ((True, digits_reward), (False, digits_reward), (False, None)):
        settings = SMALL | {"use_grpo": use_grpo, "generation_max_length": 64, "num_eval_completions": 2}
        args = GRPOConfig(output_dir=str(tmp_path), **settings)
        given = TunixTrainer(model_folder, reward_funcs, args, *data).evaluate()
        names = [] if reward_funcs is None else ["digits_reward"]
        promised = evaluation_metrics(args, judged=reward_funcs is not None, rewards=names)
        assert set(given) - {"epoch"} == {f"eval_{name}" for name in promised}


def test_a_learning_rate_that_follows_a_metric_takes_accuracy_and_its_direction(model_folder, tmp_path, monkeypatch):
    """Regression: the metric was taken for a loss: eval_loss, which GRPO lacks, or an accuracy that should fall."""
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": 1, "max_steps": 4}
    (tmp_path / "judges_of_plateau.py").write_text(
        "import itertools\nnumbers = itertools.count(1)\n\n"
        "def rising(completions, **columns):\n    right = next(numbers)\n"
        "    return [float(i < right) for i in range(len(completions))]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    kwargs = {"lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}
    trainer = run(model_folder, tmp_path / "out", judge="judges_of_plateau.rising", **plateau, **kwargs)
    assert trainer.args.metric_for_best_model == "accuracy"
    assert isinstance(trainer.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["eval_accuracy"] for row in rows if "eval_accuracy" in row] == [0.25, 0.5, 0.75, 1.0]
    assert [row["learning_rate"] for row in rows if "loss" in row] == [1e-2] * 4
    down = GRPOConfig(**(SMALL | plateau | {"metric_for_best_model": "mean_length", "greater_is_better": False}))
    assert down.lr_scheduler_kwargs == {"mode": "min"}


NAN, INF = float("nan"), float("inf")


def test_numbers_that_cannot_be_are_refused(subtests):
    for settings, message in [
        ({"reward_weights": [NAN, 1.0]}, "reward_weights=[nan, 1.0]: must be finite"),
        ({"learning_rate": INF}, "learning_rate=inf: must be finite"),
        ({"weight_decay": NAN}, "weight_decay=nan: must be finite"),
        ({"adam_epsilon": NAN}, "adam_epsilon=nan: must be finite"),
        ({"max_grad_norm": INF}, "max_grad_norm=inf: must be finite"),
        ({"eval_delay": NAN}, "eval_delay=nan: must be finite"),
        ({"lr_scheduler_kwargs": {"num_cycles": NAN}}, "lr_scheduler_kwargs={'num_cycles': nan}: must be finite"),
        ({"lr_scheduler_kwargs": '{"num_cycles": Infinity}'}, "lr_scheduler_kwargs={'num_cycles': inf}: must be"),
        ({"lr_scheduler_kwargs": '{"num_cycles"}'}, "lr_scheduler_kwargs='{\"num_cycles\"}': not valid JSON"),
        ({"lr_scheduler_kwargs": "fast"}, "lr_scheduler_kwargs='fast': expected names and values"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: must not be negative"),
        ({"adam_beta1": 1.5}, "adam_beta1=1.5: must be in [0, 1)"),
        ({"max_steps": 0}, "max_steps=0: must be at least 1, or -1"),
        ({"max_steps": -2}, "max_steps=-2: must be at least 1, or -1"),
        ({"num_train_epochs": -2}, "num_train_epochs=-2: must be above 0"),
        ({"num_train_epochs": 0}, "num_train_epochs=0: must be above 0"),
        ({"save_steps": 0}, "save_steps=0: must be a whole number above 0"),
        ({"save_steps": 2.5}, "save_steps=2.5: must be a whole number above 0"),
        ({"eval_steps": 0}, "eval_steps=0: must be a whole number above 0"),
        ({"logging_steps": -1}, "logging_steps=-1: must be a whole number above 0"),
        ({"seed": 2**32}, "seed=4294967296: must be below"),
        ({"optim": "adamm"}, "optim='adamm': choose one of adamw_torch"),
    ]:
        with subtests.test(settings=settings, message=message):
            with pytest.raises(ValueError, match=re.escape(message)):
                GRPOConfig(**settings)
