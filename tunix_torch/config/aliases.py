"""Names under which other libraries know a setting of ours; every command and constructor takes them too."""

# Each name that others use, with our name for the same setting.
ALIASES = {
    "num_generations": "num_completions_per_prompt",
    "num_generations_eval": "num_eval_completions",
    "beta": "kl_penalty_coef",
    "kl_coef": "kl_penalty_coef",
    "clip_range": "epsilon",
    "temperature": "generation_temperature",
    "top_p": "generation_top_p",
    "top_k": "generation_top_k",
    "max_completion_length": "generation_max_length",
    "max_generation_steps": "generation_max_length",
    "max_response_length": "generation_max_length",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "num_training_steps": "max_steps",
    "dataset_name": "data_path",
    "num_train_samples": "num_train_rows",
    "num_test_samples": "num_eval_rows",
    "dtype": "model_dtype",
    "profile": "profile_step",
    "teacher_model_name_or_path": "teacher",
}
