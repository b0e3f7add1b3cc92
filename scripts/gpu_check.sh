#!/usr/bin/env bash
# Compares a GPU with the CPU in one process: logits of every architecture and profile within the CPU's tolerances (no
# TF32), greedy tokens, determinism, LoRA and its gradients, a batch that goes on, `llmjax compare`.  Needs a JAX with
# GPU support in the environment:
#   .venv/bin/pip install --constraint constraints.txt --editable '.[cuda,test]'
# LLMJAX_VENV names another environment than .venv.  Without a GPU: --dry-run, the CPU beside itself.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${LLMJAX_VENV:-$ROOT/.venv}/bin/python
[ -x "$python" ] || { echo "error: no $python: run scripts/quickstart.sh first, or set LLMJAX_VENV" >&2; exit 2; }
cd "$ROOT"
case " $* " in
*" --dry-run "*) export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2" ;;
*) export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" ;;
esac
exec "$python" scripts/gpu_check.py "$@"
