#!/usr/bin/env bash
# Lints, type checks and tests in the virtual environment, which it makes and fills as needed.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: scripts/test.sh [--no-parity] [PYTEST_ARGUMENT...]

Runs ruff, mypy and pytest in .venv, which it makes and fills first. Arguments go to pytest:
  scripts/test.sh --runslow          the slow tests, too
  scripts/test.sh -k gguf -x         some of them, up to the first failure
--no-parity   do without torch and transformers: the tests that compare with them are skipped.
              (For a build of torch without CUDA, install that into the environment beforehand.)

LLMJAX_PYTHON  the Python to use, 3.11 or newer
LLMJAX_VENV    the virtual environment's folder
TEXT
}

parity=yes
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  --no-parity) parity=no; shift ;;
esac

# torch by itself: the constraints choose its build before transformers and peft ask for any.
install_parity() {
  pip_install "torch" torch
  pip_install "llmjax with its test and parity tools" --editable "${ROOT}[test,parity]"
}

SECONDS=0
ensure_venv
if [ "$parity" = yes ]; then
  once parity install_parity
else
  once test pip_install "llmjax with its test tools" --editable "${ROOT}[test]"
fi
once model install_demo_model
say "installed in $SECONDS s"

failed=
check() {
  say "$*"
  "$PY" -m "$@" || failed="$failed${failed:+, }$*"
}

cd "$ROOT"
check ruff check .
check ruff format --check .
check mypy
# Most of the time goes into compiling, which one process does on one core; a file's tests share what they compiled.
check pytest -n auto --maxprocesses 4 --dist loadfile "$@"
[ -z "$failed" ] || die "failed: $failed"
