#!/usr/bin/env bash
# From a fresh checkout to answers: installs llmjax and a small model, then runs a batch of prompts.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: scripts/quickstart.sh [OUT_FOLDER]

Makes a virtual environment in .venv, installs llmjax and the demo model there, and answers
configs/prompts/quickstart.jsonl into OUT_FOLDER/quickstart.jsonl (default: out/ in the checkout).
Run again, it installs only what changed.

LLMJAX_PYTHON  the Python to use, 3.11 or newer
LLMJAX_VENV    the virtual environment's folder
TEXT
}

case ${1:-} in
  -h | --help) usage; exit 0 ;;
  -*) usage >&2; exit 2 ;;
esac
[ $# -le 1 ] || { usage >&2; exit 2; }
out=${1:-$ROOT/out}
prompts=$ROOT/configs/prompts/quickstart.jsonl

SECONDS=0
ensure_venv
once run pip_install "llmjax and what it needs" --editable "$ROOT"
once model install_demo_model
install_seconds=$SECONDS

mkdir -p "$out" || die "cannot write to $out: name another folder"
# An earlier answer file would be resumed, not run again.
rm -f "$out/quickstart.jsonl" "$out/quickstart.jsonl".*
say "answering $(wc -l <"$prompts" | tr -d ' ') prompts"
# A slot a row; without --max-batch a job has up to 32, for thousands of rows.
"$VENV/bin/llmjax" batch --model smollm2 --max-batch 8 --input "$prompts" --output "$out/quickstart.jsonl" ||
  die "llmjax batch failed (status $?); what it wrote is in $out"

"$PY" - "$prompts" "$out/quickstart.jsonl" <<'PYTHON'
import json, shutil, sys, textwrap

def rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]

def show(mark, text):
    width = min(100, shutil.get_terminal_size().columns)
    for line in text.strip().splitlines() or ["(nothing)"]:
        blank = " " * (len(line) - len(line.lstrip()))
        print(textwrap.fill(line.strip(), width, initial_indent=mark + blank,
                            subsequent_indent="   " + blank))
        mark = "   "

sys.stdout.reconfigure(encoding="utf-8", errors="replace")
questions, answers = sys.argv[1:]
answers = {row["id"]: row for row in rows(answers)}
for question in rows(questions):
    answer = answers.get(question["id"], {"error": "no answer was written"})
    print()
    show("Q  ", question["messages"][-1]["content"])
    show("A  ", answer.get("text") or f"error: {answer.get('error')}")
PYTHON

cat <<TEXT

The rows are in $out/quickstart.jsonl
Time: installation $install_seconds s, everything $SECONDS s (the rest: see the summary line above)

Next:
  source $(printf %q "$VENV/bin/activate")
  llmjax chat --model smollm2
  llmjax generate --model smollm2 --prompt "Write a short poem about the sea."
  llmjax batch --model MODEL_FOLDER_OR_GGUF --input IN.jsonl --output OUT.jsonl
TEXT
