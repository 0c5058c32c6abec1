#!/usr/bin/env bash
# Train on a TPU VM. Settings come from the environment, further arguments go to train.py as they are:
#   MODEL_NAME=google/gemma-3-270m-it USE_GRPO=true ./run_tpu_training.sh --data_path openai/gsm8k --dataset_config main
# Without a TPU it says so and runs the same graphs through XLA on the CPU.
set -euo pipefail
cd "$(dirname "$0")"

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,4s/^# //p' "$0"
    echo "Environment: MODEL_NAME OUTPUT_DIR NUM_EPOCHS BATCH_SIZE LEARNING_RATE MAX_LENGTH NUM_TPU_CORES"
    echo "             USE_GRPO NUM_COMPLETIONS_PER_PROMPT GENERATION_MAX_LENGTH GENERATION_TEMPERATURE KL_PENALTY_COEF"
    echo "All flags: python train.py --help"
    exit 0
fi

if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=${PYTHON:-python3}; fi

args=(--device xla)
add() { # add FLAG VALUE: only when the variable is set, so that train.py's own defaults hold
    if [[ -n "$2" ]]; then args+=("$1" "$2"); fi
}
add --model_name "${MODEL_NAME:-}"
add --output_dir "${OUTPUT_DIR:-}"
add --num_train_epochs "${NUM_EPOCHS:-}"
add --per_device_train_batch_size "${BATCH_SIZE:-}"
add --learning_rate "${LEARNING_RATE:-}"
add --max_length "${MAX_LENGTH:-}"
add --num_tpu_cores "${NUM_TPU_CORES:-}"
if [[ " $* " != *" --config"* ]]; then USE_GRPO=${USE_GRPO:-true}; fi # a config file says it itself
add --use_grpo "${USE_GRPO:-}"
add --num_completions_per_prompt "${NUM_COMPLETIONS_PER_PROMPT:-}"
add --generation_max_length "${GENERATION_MAX_LENGTH:-}"
add --generation_temperature "${GENERATION_TEMPERATURE:-}"
add --kl_penalty_coef "${KL_PENALTY_COEF:-}"

tpu=$(TUNIX_DEVICE=cpu "$PYTHON" -c 'from tunix_torch import device; print(device.tpu_is_present())')
if [[ "$tpu" == False ]]; then
    echo "No TPU was found on this machine: running the same graphs through XLA on the CPU."
fi
exec "$PYTHON" train.py "${args[@]}" "$@"
