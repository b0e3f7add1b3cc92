#!/usr/bin/env bash
# Runs files of llmjax's converter in MediaPipe's own web runtime, in a headless Chromium without a GPU, and compares
# texts and token ids with llmjax's (numerics mediapipe_gpu).  Needs
#   a Chromium with WebGPU:  apt-get install chromium       (LLMJAX_CHROMIUM names another one)
#   Node.js 18 or newer, whose npm gets @mediapipe/tasks-genai and playwright-core into out/web (LLMJAX_WEB: elsewhere)
# and the environment of scripts/quickstart.sh (LLMJAX_VENV names another one).
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${LLMJAX_VENV:-$ROOT/.venv}/bin/python
web=${LLMJAX_WEB:-$ROOT/out/web}
[ -x "$python" ] || { echo "error: no $python: run scripts/quickstart.sh first, or set LLMJAX_VENV" >&2; exit 2; }
command -v npm >/dev/null || { echo "error: no npm: install Node.js 18 or newer" >&2; exit 2; }
if [ ! -d "$web/node_modules/playwright-core" ] || [ ! -d "$web/node_modules/@mediapipe/tasks-genai" ]; then
  mkdir -p "$web"
  # 0.10.24 runs all model types; from 0.10.27 on, Phi-2 and StableLM fail.
  npm install --prefix "$web" --no-audit --no-fund @mediapipe/tasks-genai@0.10.24 playwright-core@1 >&2
fi
cd "$ROOT"
exec env LLMJAX_WEB="$web" JAX_PLATFORMS=cpu "$python" scripts/web_check.py "$@"
