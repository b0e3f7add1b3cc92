"""``llmjax bench``."""

import argparse
import json
from pathlib import Path

from llmjax.cli import loading
from llmjax.cli.flags import Verbs, add_verb, id_list, load_flags
from llmjax.cli.progress import report_line


def add(verbs: Verbs) -> None:
    """Registers the verb."""
    # Without the flags of the compilation cache: the time to compile is to be measured, so nothing compiled is kept.
    bench = add_verb(verbs, "bench", _bench, "Measure speed beside what the machine can do.", load_flags())
    bench.add_argument("--max-batch", type=int, default=1, metavar="N", help="decode slots (default 1)")
    bench.add_argument("--in-use", type=id_list, default=[1], metavar="N,N", help="slots that decode (default 1)")
    bench.add_argument("--chunk", type=int, default=128, metavar="N", help="prompt tokens a call takes (default 128)")
    bench.add_argument(
        "--prompt-lengths", type=id_list, default=[128, 512], metavar="N,N", help="tokens (default 128,512)"
    )
    bench.add_argument("--output-length", type=int, default=32, metavar="N", help="tokens to decode (default 32)")
    bench.add_argument(
        "--context", type=id_list, metavar="N,N", help="tokens in the cache before decoding (default: the prompts')"
    )
    bench.add_argument("--cache", type=id_list, metavar="N,N", help="cache positions (default: the fewest that do)")
    bench.add_argument("--repeat", type=int, default=5, metavar="N", help="measurements of each setting (default 5)")
    bench.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="have the profiler trace one more run of each setting, for XProf"
    )
    bench.add_argument("--json", action="store_true", help="machine-readable, to stdout")


def _bench(args: argparse.Namespace) -> int:
    from llmjax.bench import measure
    from llmjax.bench.report import to_text

    options = measure.Options(
        slots=args.max_batch,
        in_use=args.in_use,
        chunk=args.chunk,
        prompt_lengths=args.prompt_lengths,
        output_length=args.output_length,
        contexts=args.context,
        caches=args.cache,
        repeat=args.repeat,
        profile=args.profile,
    )
    report = measure.run(lambda: loading.load_model(args), options, report_line)
    print(json.dumps(report.to_dict(), indent=2) if args.json else to_text(report))
    return 0
