#!/usr/bin/env bash
# Train on a TPU VM. Settings come from the environment, further arguments go to train.py as they are:
#   MODEL_NAME=google/gemma-3-270m-it USE_GRPO=true ./run_tpu_training.sh --data_path openai/gsm8k --dataset_config main
# Checks the host first, and takes torch_tpu where it is installed, else torch-xla. Without a TPU, torch-xla runs the same
# graphs on the CPU.
# A run that was cut short goes on from its newest checkpoint; SIGTERM saves one before the run ends.
set -euo pipefail
cd "$(dirname "$0")"

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,6s/^# //p' "$0"
    cat <<'EOF'

--dry-run: check, print the command, and stop.

Environment: MODEL_NAME OUTPUT_DIR NUM_EPOCHS BATCH_SIZE LEARNING_RATE MAX_LENGTH NUM_TPU_CORES
             USE_GRPO NUM_COMPLETIONS_PER_PROMPT GENERATION_MAX_LENGTH GENERATION_TEMPERATURE KL_PENALTY_COEF
             TOPOLOGY             the slice, such as v5e:2x4; found by itself on one host
             SKIP_PREFLIGHT=1     don't estimate first whether the job fits (plan_tpu.py --quick)
             PYTHON               default .venv/bin/python (make setup), else .venv-tpu/bin/python (make setup-tpu)
             TUNIX_COMPILE_CACHE  folder of compiled graphs; default ~/.cache/tunix_torch/xla, or tpu
All flags: python train.py --help

On a slice of several hosts, one command starts the script on all of them, here of a v5e-16:
  gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
      --command="cd tunix-torch && TOPOLOGY=v5e:4x4 ./run_tpu_training.sh --config FILE --mesh_shape 4,4"
The mesh has all chips of the slice; code, settings and model must be the same on all hosts. Worker 0 alone writes, to its
output_dir. To resume, all must read the same checkpoint: put output_dir on a disk that they share (NFS, gcsfuse), or copy
worker 0's checkpoint folder to the others. They meet at port 12355 of worker 0 (MASTER_PORT is another one), and
then talk on ports of their own; GLOO_SOCKET_IFNAME names the network interface where the host name does not lead to it.
This has never run on real hosts: see docs/tpu.md.
EOF
    exit 0
fi

dry_run=false
given=()
for argument in "$@"; do
    if [[ "$argument" == "--dry-run" ]]; then dry_run=true; else given+=("$argument"); fi
done
set -- "${given[@]}"
for python in .venv/bin/python .venv-tpu/bin/python python3; do
    if [[ -z "${PYTHON:-}" && -n "$(command -v "$python")" ]]; then PYTHON=$python; fi
done

args=()
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
args+=("$@")

found=$(TUNIX_DEVICE=cpu "$PYTHON" -c \
    'import sys, utils as u; u.run_script(lambda: print(u.tpu_backend(), u.check_tpu_host(sys.argv[1:]) or ""))' "${args[@]}")
read -r backend topology <<<"$found" || true
chips=$((${topology:+$(tr x '*' <<<"${topology#*:}")} + 0)) # of this host, by the slice that it is: 2x4 are 8
backend=${backend:-xla}
args=(--device "$backend" "${args[@]}")
topology=${TOPOLOGY:-$topology}
if [[ "$backend" == tpu ]]; then
    echo "plan     the plan is left out: through torch_tpu it would take the chip; see plan_tpu.py --help" >&2
elif [[ -n "$topology" && -f plan_tpu.py && "${SKIP_PREFLIGHT:-0}" != 1 ]]; then
    planned=0 # what it says is advice: a job that can't be planned, or that may not fit, is started all the same
    "$PYTHON" plan_tpu.py --quick --topology "$topology" "${args[@]}" || planned=$?
    case $planned in
    0) ;;
    1) echo "plan_tpu.py ended with 1, as for a job that may not fit: going on all the same" >&2 ;;
    130 | 143) exit "$planned" ;; # Ctrl-C, SIGTERM
    *) echo "The job could not be planned, see above: going on without a plan" >&2 ;;
    esac
fi

if [[ " $* " != *" --resume_from_checkpoint"* ]]; then args+=(--resume_from_checkpoint auto); fi
export TUNIX_COMPILE_CACHE=${TUNIX_COMPILE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tunix_torch/$backend}
export PYTHONHASHSEED=${PYTHONHASHSEED:-0} # hosts must order sets alike
start=("$PYTHON")
if [[ "$backend" == tpu && $chips -gt 1 ]]; then # torch_tpu has a process for each chip, which it must know beforehand
    set -a && eval "$("$PYTHON" -m torch.tpu.distributed)" && set +a
    start+=(-m torch.distributed.run --nproc_per_node "$chips")
fi
if $dry_run; then
    printf 'TUNIX_COMPILE_CACHE=%q PYTHONHASHSEED=%q' "$TUNIX_COMPILE_CACHE" "$PYTHONHASHSEED"
    printf ' %q' "${start[@]}" train.py "${args[@]}"
    echo
    exit 0
fi
exec "${start[@]}" train.py "${args[@]}"
