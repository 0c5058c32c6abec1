"""The table of the commands that pages show: the flags with which a test runs each, or the test that has it run.

`tests/test_commands_in_docs.py` reads it, and says of a command on a page that is not in it what there is to do.
"""

from dataclasses import dataclass

# A comment ends in "needs" and one or more of these. It stands at the end of a command, or on a line of its own above
# the commands of a block that it is meant for.
NEEDS = (
    "a TPU",
    "a GPU",
    "a GPU or a TPU",
    "several GPUs",
    "the Hugging Face hub",
    "the network",
    "vLLM",
    "transformers[serving]",
    "a checkout of llama.cpp",
)
WHAT_TO_DO = f"""For each of them, do one of these:
- add it to RUNS in tests/how_commands_are_run.py, with flags that make it small;
- if it takes minutes all the same, name in ELSEWHERE the test that runs it;
- if it can't run here, let its line on the page end with a comment such as `# needs a TPU`, one or more of these joined
  by "and": {"; ".join(NEEDS)}."""
# Programs that every machine has: a page may call them without a word.
EVERYWHERE = {"git", "grep", "kill", "mkdir", "pgrep", "pip", "sleep", "tee"}

# What makes a run small. No flag that a page shows is taken away.
FEW_STEPS = "--max_steps 1 --num_train_rows 16 --num_eval_rows 2 --num_eval_completions 0 --report_to none "
FEW_STEPS += "--per_device_train_batch_size 2 --generation_max_length 8"
FEW_ANSWERS = "--max_samples 2 --max_new_tokens 8"
SHORT = "--max_new_tokens 8"


@dataclass(frozen=True)
class Run:
    """How a command of a page is run here, in a folder like a checkout with a finished run in ./outputs.

    Attributes:
        added: flags that the page does not have; those of a target of make are its ARGS.
        typed: what is written to its standard input.
        prints: words of its output.
        leaves: a file that is there afterwards and was not before.
    """

    added: str = ""
    typed: str = ""
    prints: str = ""
    leaves: str = ""


RUNS = {
    "make train": Run(FEW_STEPS, leaves="outputs/previous/*/config.json"),
    "make evaluate": Run(FEW_ANSWERS, prints="accuracy"),
    "python train.py --use_grpo --output_dir outputs/mine --resume_from_checkpoint auto": Run(
        FEW_STEPS, leaves="outputs/mine/adapter_model.safetensors"
    ),
    "python train.py --use_grpo --loss_type cispo --epsilon_high 5 --entropy_coef 0.001 "
    "--mask_truncated_completions true": Run(FEW_STEPS, leaves="outputs/previous/*/config.json"),
    "python evaluate.py": Run(FEW_ANSWERS, prints="accuracy"),
    "python evaluate.py --preset standard --num_passes 8": Run(FEW_ANSWERS, prints="pass@8"),
    "python evaluate.py --model_path ./outputs/checkpoint-50": Run(FEW_ANSWERS, prints="accuracy"),
    "python inference.py --question 'What is 47 + 38?'": Run(SHORT, prints="Question: What is 47 + 38?"),
    "python inference.py --question 'What is 47 + 38?' --compare_base": Run(SHORT, prints="base model"),
    "python inference.py --questions_file questions.csv --question_column ask --output_file answers.parquet": Run(
        SHORT, leaves="answers.parquet"
    ),
    "python inference.py --chat": Run(SHORT, typed="What is 47 + 38?\nexit\n", prints="Model: outputs"),
    "python inference.py --chat --no_do_sample": Run(
        SHORT, typed="What is 47 + 38?\nAnd 12 more?\n", prints="Model: outputs"
    ),
    "python inference.py --serve": Run(prints="vllm serve "),
    "python inference.py --model_path ./outputs --question 'What is 12 + 30?'": Run(SHORT, prints="Model: ./outputs"),
    "python -m tunix_torch.export ./outputs --merged ./merged": Run(leaves="merged/model.safetensors"),
    "python -m tunix_torch.export ./outputs --merged ./served --dtype bfloat16": Run(leaves="served/model.safetensors"),
    "python report.py ./outputs": Run(leaves="outputs/report.html"),
    "python report.py ./outputs --compare ./outputs/previous/TIME": Run(leaves="outputs/comparison.html"),
    "python -m tunix_torch.diagnose ./outputs": Run(prints="Too early to tell"),
}
# A model of the hub is needed on the page. Here the tiny model stands for it, since of two values the last one counts.
RUNS |= {
    "python train.py --use_grpo --model_name google/gemma-3-270m-it --data_path my.jsonl "
    "--num_completions_per_prompt 8 --max_steps 200 --train_fraction 0.9 --eval_steps 50": Run(
        f"{FEW_STEPS} --model_name tiny", leaves="outputs/previous/*/config.json"
    ),
    "python train.py --use_grpo --model_name google/gemma-3-270m-it --lora_rank 0 --learning_rate 1e-6": Run(
        f"{FEW_STEPS} --model_name tiny", leaves="outputs/model.safetensors"
    ),
    "python train.py --model_name google/gemma-3-270m-it --data_path answers.jsonl --output_dir outputs/sft": Run(
        f"{FEW_STEPS} --model_name tiny", leaves="outputs/sft/adapter_model.safetensors"
    ),
    "python train.py --use_grpo --model_name google/gemma-3-270m-it --teacher google/gemma-3-1b-it "
    "--data_path questions.jsonl --learning_rate 1e-4 --generation_top_k 0 --generation_top_p 1": Run(
        f"{FEW_STEPS} --model_name tiny --teacher tiny", leaves="outputs/previous/*/config.json"
    ),
}
HERE = "tests/test_commands_in_docs.py"
CROSSCHECKED = f"{HERE}::test_a_run_is_recorded_cross_checked_and_reported"
PIPELINE = "tests/run/test_pipeline.py::test_each_stage_goes_on_with_the_adapter_of_the_last"
PREFLIGHT = "tests/preflight/test_preflight.py"
# Commands that take minutes, and the test that runs each of them with less to do, or what CI calls.
ELSEWHERE = {
    "make setup": ".ci/run: test-all",
    "make test": ".ci/run: test-all",
    "make test-all": ".ci/run: test-all",
    "make lint": ".ci/run: lint",
    "make test-slow": "tests/test_jobs.py::test_other_seeds_learn_too",
    "make test-plans": f"{PREFLIGHT}::test_every_recipe_fits_its_slice",
    "make crosscheck": "tests/crosscheck/test_crosscheck.py::test_the_command_prints_a_table_and_writes_it",
    "make bench": "tests/benchmarks/test_benchmarks.py::test_all_three_do_the_same_work",
    "make torture": (
        "tests/benchmarks/test_torture.py::test_jobs_that_are_killed_at_random_moments_end_as_one_that_is_not"
    ),
    "make fuzz": "tests/fuzz/test_settings.py::test_flags_mean_what_they_say_or_are_refused",
    "make config": "tests/scripts/test_defaults.py::test_the_files_of_defaults_are_what_the_generator_writes",
    "make tensorboard": f"{HERE}::test_tensorboard_has_the_curves_of_the_runs",
    "make plan-tpu 'ARGS=--config configs/quick_test.json --topology v5e:1x1'": (
        "tests/tpu_plugin/test_plans.py::test_the_plan_is_that_of_torch_xlas_graphs"
    ),
    "python train.py --use_grpo --save_batches 3 --model_dtype float32 ...": CROSSCHECKED,
    "python -m crosscheck --from-run": CROSSCHECKED,
    "python report.py outputs": CROSSCHECKED,
    "python -m benchmarks.grpo_step": "tests/benchmarks/test_benchmarks.py::test_all_three_do_the_same_work",
    "python -m benchmarks.time_to_accuracy": (
        "tests/benchmarks/test_time_to_accuracy.py::test_both_train_and_are_evaluated"
    ),
    "python -m preflight.beside_tunix": "tests/preflight/test_beside.py::test_a_tiny_model_is_compared",
    "python plan_tpu.py --config": f"{PREFLIGHT}::test_every_recipe_fits_its_slice",
    "python plan_tpu.py --config configs/gemma2_2b_v5e8.json --topology v5e:2x4 --search": (
        f"{PREFLIGHT}::test_a_search_by_arithmetic_names_what_it_leaves_out"
    ),
    "./run_tpu_training.sh --dry-run": (
        "tests/scripts/test_tpu_script.py::test_dry_run_prints_the_command_and_help_the_environment"
    ),
    "python - first_run/recipe": f"{HERE}::test_the_seconds_of_each_step_are_those_of_the_metrics",
    "make help": f"{HERE}::test_targets_of_make_run",
    "make check-device": f"{HERE}::test_targets_of_make_run",
    "python train.py --model_name outputs/sft --preference_loss simpo --data_path pairs.jsonl "
    "--output_dir outputs/simpo": PIPELINE,
    "python train.py --model_name outputs/simpo --use_grpo --data_path questions.jsonl --output_dir outputs/grpo": (
        PIPELINE
    ),
    "python run_training.py +experiment=quick_test": "tests/scripts/test_run_training.py::test_experiment_quick_test",
    "python run_training.py --multirun": "tests/scripts/test_run_training.py::test_multirun_over_learning_rates",
}
