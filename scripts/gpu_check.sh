#!/usr/bin/env bash
# Compares a GPU with the CPU: logits within float32 rounding (no TF32) and greedy tokens equal, for tiny models of every
# architecture and, where it is installed, the demo model.  Needs the cuda extra: pip install 'llmjax[cuda]'.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
PYTHON=${LLMJAX_PYTHON:-python3}
for candidate in "${LLMJAX_VENV:-$ROOT/.venv}/bin/python"; do
  [ -x "$candidate" ] && PYTHON=${LLMJAX_PYTHON:-$candidate}
done
cd "$ROOT"
exec env JAX_PLATFORMS=cuda,cpu "$PYTHON" scripts/gpu_check.py "$@"
