#!/usr/bin/env bash
# What is to be known of a GPU, in one call of less than ten minutes, a file a part in a folder:
#   scripts/gpu_measure.sh FOLDER [SECONDS]             all of it (default 560 seconds)
#   scripts/gpu_measure.sh --dry-run FOLDER [SECONDS]   a small model on the CPU, which tries the script
# Whether it is right (gpu_check.json), then how fast: Gemma 2B with random weights in bfloat16, int8 and int4, one
# stream and 64, and a prompt of 2,048 tokens, beside the card's copies and products of the same minutes
# (`llmjax bench`).  At the end the same the other way: with many rows of int8 and int4 in products as they are defined
# instead of their kernel, with attention folded instead of its own, with kernels that race for their place (a job's bits
# may then differ), with the loop over tokens decided on the card, and with one row of int4 in the kernel of many instead
# of sums.  What is compiled, `scripts/gpu_programs.py` says without a card.  A part that fails or finds no time left
# leaves its log, and the others run.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
dry=
[ "${1:-}" = --dry-run ] && { dry=--dry-run; shift; }
out=${1:?folder for the results} && mkdir -p "$out" && out=$(cd "$out" && pwd -P)
ends=$((SECONDS + ${2:-560}))
python=${LLMJAX_VENV:-$ROOT/.venv}/bin/python
[ -x "$python" ] || { echo "error: no $python: run scripts/quickstart.sh first, or set LLMJAX_VENV" >&2; exit 2; }
cd "$ROOT" || exit 2
if [ -n "$dry" ]; then
  export JAX_PLATFORMS=cpu
  model=config:smollm2-135m-instruct long=64 many=4 new=4 repeat=1
else
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
  model=config:gemma-2b long=2048 many=64 new=64 repeat=3
fi

part() { # name, most seconds, command
  local name=$1 most=$2 left=$((ends - SECONDS)) began=$SECONDS code=0
  shift 2
  if [ "$left" -lt 15 ]; then
    echo "$name: no time left"
    return
  fi
  timeout "$((left < most ? left : most))" "$@" > "$out/$name.txt" 2> "$out/$name.log" || code=$?
  echo "$name: exit code $code, $((SECONDS - began)) s"
}

bench() { # name, most seconds, flags of llmjax bench; $OPTIONS: Python to run before
  local name=$1 most=$2
  shift 2
  part "$name" "$most" "$python" -c "${OPTIONS:-}
import sys
from llmjax.cli.main import main
sys.exit(main())" bench --model "$model" --random-weights --numerics fast --repeat "$repeat" --json "$@"
}

part facts 20 bash -c "nvidia-smi; '$python' -c 'import jax; print(jax.__version__, jax.devices())'"
part check 200 scripts/gpu_check.sh $dry --seconds 150 --output "$out"
one=(--max-batch 1 --prompt-lengths "128,$long" --chunk "$long" --context 128 --output-length "$new")
slots=(--max-batch "$many" --in-use "$many" --prompt-lengths 128 --output-length "$new")
bench bf16 120 --dtype bfloat16 "${one[@]}"
bench int8 120 --quantize int8 "${one[@]}"
bench int4 120 --quantize int4 "${one[@]}"
bench "bf16-$many" 120 --dtype bfloat16 "${slots[@]}"
bench "int4-$many" 120 --quantize int4 "${slots[@]}"
# The other way, what is most in doubt first.
plain="from llmjax.products import kernel; kernel.can_serve = lambda q: False"
OPTIONS=$plain bench int8-plain 90 --quantize int8 "${one[@]}"
OPTIONS=$plain bench "int4-$many-plain" 90 --quantize int4 "${slots[@]}"
OPTIONS="from llmjax import device; device.knows_cuda = lambda: False" bench bf16-folded 90 --dtype bfloat16 "${one[@]}"
OPTIONS="from llmjax import numerics as n; n.GPU_OPTIONS.clear(); n.GPU_LIBRARY.clear()" bench bf16-raced 90 --dtype bfloat16 "${one[@]}"
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=+WHILE" bench int4-buffered 90 --quantize int4 "${one[@]}"
OPTIONS="from llmjax.products import defined; defined.FEW = 0" bench int4-products 90 --quantize int4 "${one[@]}"
"$python" - "$out" <<'EOF' | tee "$out/table.txt" # a second, of which there is always one
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.txt")):
    try:
        found = json.loads(path.read_text())
    except ValueError:
        continue
    peaks = {name: f"{rate['median'] / 1e12:.1f} TFLOP/s" for name, rate in found["matmul_flops_per_second"].items()}
    print(path.stem, f"copies {found['read_bytes_per_second']['median'] / 1e9:.0f} GB/s", peaks)
    for s in found["settings"]:
        print(f"  {s['phase']:8} {s['tokens']:5} tokens, {s['in_use']:3} rows: {s['tokens_per_second']['median']:10.1f} tok/s"
              f"  {s['bytes_per_second'] / 1e9:8.1f} GB/s  {s['flops_per_second'] / 1e12:7.2f} TFLOP/s"
              f"  {s['of_limit']:5.0%} of the limit ({s['bound']})")
EOF
