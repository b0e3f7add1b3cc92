"""Peak memory of a batch job of few rows against one of many: it must not grow with their number.

    python scripts/many_rows.py --rows 1000 100000
    python scripts/many_rows.py --rows 1000 100000 --table parquet

The smallest model of random weights answers each row with one token: it is the rows that are measured.
"""

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.measure_full_size import peak_memory  # noqa: E402
from tests import tiny  # noqa: E402

SMALLEST = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def write(source: Path, rows: int) -> None:
    """The input, as JSONL or a table."""
    made = ({"id": f"row number {i}", "prompt": f"{i} bottles", "max_tokens": 1} for i in range(rows))
    if source.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema(
            [("id", pyarrow.string()), ("prompt", pyarrow.string()), ("max_tokens", pyarrow.int64())]
        )
        with pyarrow.parquet.ParquetWriter(source, schema) as writer:
            while part := list(itertools.islice(made, 10_000)):
                writer.write_table(pyarrow.Table.from_pylist(part, schema))
        return
    with open(source, "w", newline="") as file:
        if source.suffix == ".csv":
            table = csv.DictWriter(file, ("id", "prompt", "max_tokens"))
            table.writeheader()
            table.writerows(made)
        else:
            file.writelines(json.dumps(row) + "\n" for row in made)


def measure(folder: Path, rows: int, resume: bool, kind: str) -> tuple[float, float]:
    """Peak resident memory of the job's process in bytes, and its seconds."""
    source = folder / f"{rows}.{kind}"
    write(source, rows)
    flags = ["--model", str(folder / "model"), "--input", str(source), "--output", str(folder / f"{rows}.out.{kind}")]
    command = [sys.executable, __file__, "--child", *flags, "--ordered", "--max-batch", "32", "--progress-seconds", "0"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    for _ in range(2 if resume else 1):
        began = time.monotonic()
        out = subprocess.run(command, env=env, capture_output=True, text=True)
        if out.returncode:
            raise SystemExit(out.stderr)
    return float(out.stdout), time.monotonic() - began


def main() -> None:
    """Measures and prints."""
    if sys.argv[1:2] == ["--child"]:
        from llmjax.cli.main import main as llmjax_main

        status = llmjax_main(["batch", *sys.argv[2:]])
        print(peak_memory())
        raise SystemExit(status)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--resume", action="store_true", help="start each job again and measure that")
    parser.add_argument(
        "--table", choices=("jsonl", "csv", "parquet"), default="jsonl", help="what rows come and go in"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmjax-rows-") as folder:
        tiny.checkpoint(Path(folder) / "model", **SMALLEST)
        measure(
            Path(folder), 10, False, args.table
        )  # compiling takes more memory than all else: no job measured does it
        for rows in args.rows:
            peak, seconds = measure(Path(folder), rows, args.resume, args.table)
            print(f"{rows:,} rows: peak {peak / 1e6:.0f} MB, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
