#!/usr/bin/env bash
# Compares a GPU with the CPU: logits within float32 rounding (no TF32) and greedy tokens equal, for the test models of
# every architecture and, where it is installed, the demo model.  Needs a JAX with GPU support in the environment:
#   .venv/bin/pip install --constraint constraints.txt --editable '.[cuda,test]'
# LLMJAX_VENV names another environment than .venv.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${LLMJAX_VENV:-$ROOT/.venv}/bin/python
[ -x "$python" ] || { echo "error: no $python: run scripts/quickstart.sh first, or set LLMJAX_VENV" >&2; exit 2; }
cd "$ROOT"
exec env JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" "$python" scripts/gpu_check.py "$@"
