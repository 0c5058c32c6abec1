#!/usr/bin/env bash
# What a GPU makes of this library, in under ten minutes: the tests that need one, a GRPO step beside TRL's with the
# shapes of Gemma 3 270M and 1B, and decoding against the bandwidth of the GPU's memory. Nothing is downloaded.
#
#   benchmarks/first_gpu.sh [--device cuda|cpu] [--peers ours,trl] [--presets 270m,1b] [FOLDER]
#
# FOLDER (outputs/first_gpu by default) gets first_gpu.json, first_gpu.png, and what each part printed. A part that fails
# or takes too long is named in the end, the others go on, and the exit code is 1. With --device cpu everything runs with
# tiny models, so that nothing but the GPU is untried.
set -euo pipefail

mistake() {
    echo "error: $1" >&2
    exit 2
}

device=cuda peers=ours,trl presets=270m,1b folder=outputs/first_gpu
while [ $# -gt 0 ]; do
    case "$1" in
    --device | --peers | --presets)
        [ $# -gt 1 ] || mistake "$1: a value is missing"
        declare "${1#--}=$2"
        shift 2
        ;;
    -*) mistake "$1: there are --device, --peers and --presets" ;;
    *)
        folder=$1
        shift
        ;;
    esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ "$device" = cuda ] || [ "$device" = cpu ] || mistake "--device $device: choose cuda or cpu"
mkdir -p "$folder" || mistake "$folder: can't be made"
folder=$(cd "$folder" && pwd)
cd "$root"
python=.venv/bin/python
[ -x "$python" ] || python=$(command -v python3)
export TUNIX_DEVICE=$device
if [ "$device" = cuda ] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
    mistake "PyTorch sees no CUDA device here; --device cpu tries everything else"
fi

failed=() slack=1  # times as long as on a GPU
[ "$device" = cuda ] || slack=10
# part NAME SECONDS COMMAND...: runs a command with a time limit; what it prints is shown and kept in FOLDER/NAME.txt
part() {
    local name=$1 limit=$2 started=$SECONDS status=0
    shift 2
    echo "== $name"
    timeout --kill-after=5 $((limit * slack)) "$@" 2>&1 | tee "$folder/$name.txt" || status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then
        failed+=("$name (exit code $status)")
    fi
    echo "$name $((SECONDS - started)) $status" >>"$folder/parts.txt"
}

# Files of an earlier run must not stand for parts that fail now.
rm -f "$folder"/{environment,270m,1b,decode-270m,decode-1b,first_gpu}.json "$folder/first_gpu.png" "$folder/parts.txt"
few=()
if [ "$device" = cpu ]; then
    few=(--preset small --num_prompts 2 --num_completions 2 --prompt_length 6 --completion_length 8 --threads 1)
fi

part environment 20 "$python" -m benchmarks.first_gpu environment "$folder/environment.json"
part tests 130 "$python" -m pytest -m cuda -rs tests/runtime/test_on_cuda.py
for preset in ${presets//,/ }; do
    part "decode-$preset" 45 "$python" -m benchmarks.first_gpu decode "$preset" "$folder/decode-$preset.json"
    part "$preset" 160 "$python" -m benchmarks.grpo_step --preset "$preset" "${few[@]}" --peers "$peers" --rounds 1 \
        --warmup 1 --steps 2 --json "$folder/$preset.json"
done
part join 20 "$python" -m benchmarks.first_gpu join "$folder"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "$folder/first_gpu.json"
