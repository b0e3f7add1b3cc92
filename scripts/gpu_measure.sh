#!/usr/bin/env bash
# What is to be known of a GPU, in one call of less than ten minutes:
#   scripts/gpu_measure.sh FOLDER [SECONDS] [--only GLOB,GLOB]   all of it, or some parts (default 560 seconds)
#   scripts/gpu_measure.sh --dry-run FOLDER [SECONDS]       a small model on the CPU, which tries the script
# See scripts/gpu_measure.py, which does it.  LLMJAX_VENV names another environment than .venv.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${LLMJAX_VENV:-$ROOT/.venv}/bin/python
[ -x "$python" ] || { echo "error: no $python: run scripts/quickstart.sh first, or set LLMJAX_VENV" >&2; exit 2; }
exec "$python" "$ROOT/scripts/gpu_measure.py" "$@"
