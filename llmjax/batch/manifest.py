"""``OUT.manifest.json``: what made an output, what is in it, and how long that took."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.readers.jsonfile import unique_keys
from llmjax.batch.identity import without_path
from llmjax.checkpoint.identity import differences
from llmjax.errors import RequestError, ResumeError
from llmjax.outside.whole import write_whole
from llmjax.text.dates import Date, settled

FORMAT, VERSION = "llmjax-batch", 1


@dataclasses.dataclass
class Manifest:
    """The file beside an output.

    Attributes:
      job: everything that fixes the answers (``identity``); a job goes on only where it is the same.
      status: ``running`` (also of a job that was killed), ``interrupted``, ``failed`` or ``complete``.
      about: what is good to know and may change: paths, options, ...
      counts: of the output: rows, failed, prompt_tokens, completion_tokens.
      summary: of all rows of a finished output together, where there is one: the perplexity of texts, say.
      runs: each with ``began``, ``seconds``, ... of one start of the job.
    """

    job: dict[str, Any]
    status: str = "running"
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, output: Path) -> None:
        """Writes the manifest of ``output`` in one go.

        Raises:
          OSError: the earlier one is still there.
        """
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        write_whole(_path(output), [json.dumps(values, indent=2, ensure_ascii=False).encode("utf-8", "replace"), b"\n"])


def _path(output: Path) -> Path:
    return output.with_name(f"{output.name}.manifest.json")


def read(output: Path) -> Manifest | None:
    """The manifest of ``output``; None where there is none.

    Raises:
      ResumeError: it cannot be read.
    """
    path = _path(output)
    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
        if values.pop("format") != FORMAT or values.pop("version") != VERSION:
            raise ValueError(f"expected format {FORMAT} version {VERSION}")
        manifest = Manifest(**values)
        if not isinstance(manifest.job, Mapping) or not isinstance(manifest.runs, list):
            raise ValueError("job or runs is missing")
        settled(manifest.job.get("date"))
        return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, RequestError) as error:
        raise ResumeError(f"{path}: not a manifest this llmjax can read: {error}; --force starts over") from None


def job_date(asked: Date | None, found: Manifest | None) -> str:
    """What a job's chat templates take for the present: the date asked for, the one it began with, or now.

    Raises:
      RequestError: it is no date.
    """
    begun: str | None = None if found is None else found.job.get("date")
    return settled(begun if asked is None else asked).isoformat(timespec="seconds")


def going_on(output: Path, job: dict[str, Any], found: Manifest | None) -> Manifest:
    """The manifest of a job that begins or goes on.

    Args:
      output: of the job.
      job: its identity.
      found: the manifest that is there.

    Raises:
      ResumeError: ``output`` was made by another job, or by none that is known.
    """
    if found is None:
        rows = next((path for path in (output, output.with_name(f"{output.name}.partial")) if _has_bytes(path)), None)
        if rows is not None:
            raise ResumeError(
                f"{rows}: holds something already, and no {_path(output).name} says how it was made; name another "
                "output, or start over with --force"
            )
        return Manifest(job)
    changed = list(differences(without_path(found.job), without_path(job)))
    if changed:
        raise ResumeError(
            "\n  ".join(
                [
                    f"{output}: was begun with other settings; use those again, name another output, or start over "
                    "with --force:",
                    *changed,
                ]
            )
        )
    return found


def _has_bytes(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
