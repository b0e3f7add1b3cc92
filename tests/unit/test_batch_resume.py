"""A job that is killed, interrupted, starved of disk or given other rows goes on, and ends as if nothing had been."""

import dataclasses
import datetime
import errno
import gzip
import hashlib
import json
import os
import resource
import signal
import threading
import time
import types

import jax
import numpy as np
import pytest

from llmjax import LLM, SamplingParams
from llmjax.batch import dryrun, job, progress
from llmjax.batch.files import locked
from llmjax.batch.job import Options
from llmjax.batch.journal import Journal
from llmjax.batch.rows import InputRow
from llmjax.errors import CheckpointError, RequestError, ResumeError
from llmjax.outside.interrupts import Interrupts
from llmjax.text import dates
from tests import tiny

QUIET = {"progress_seconds": 0}
PARAMS = SamplingParams(max_tokens=3)
ROWS = [{"id": f"r{i}", "prompt": "abcdefgh"[: 1 + i % 7], "max_tokens": 1 + i % 5} for i in range(12)]
ROWS[4] = {"id": "bad", "prompt": "x", "temperature": -1}
ROWS[6] = {"custom_id": "o", "method": "POST", "url": "/v1/completions", "body": {"prompt": "abc"}}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tiny.checkpoint(tmp_path_factory.mktemp("tiny"))
    (path / "chat_template.jinja").write_text("{{ strftime_now('%d %B %H:%M') }} {{ messages[0].content }}")
    return tiny.roomy(LLM(path, max_batch=4, chunk=16, block=16))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, ROWS)
    return tmp_path


def write(folder, rows, name="in.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(llm, folder, output="out.jsonl", params=PARAMS, source="in.jsonl", **options):
    return job.run(lambda: llm, str(folder / source), str(folder / output), params, Options(**QUIET | options))


def counted(monkeypatch, llm):
    """Ids of the requests that run from here on."""
    fill, started = llm.engine._fill, []
    monkeypatch.setattr(llm.engine, "_fill", lambda r, *rest: started.append(r.request.request_id) or fill(r, *rest))
    return started


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_cut_anywhere_it_ends_the_same(llm, folder):
    run(llm, folder, ordered=True)
    out, manifest = folder / "out.jsonl", folder / "out.jsonl.manifest.json"
    whole, made = out.read_bytes(), manifest.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    last = ends[-3]
    for cut in sorted({0, *range(last, len(whole), 23), *(e + d for e in ends[-3:] for d in (-2, -1, 0, 1))}):
        out.write_bytes(whole[:cut])
        summary = run(llm, folder, ordered=True)
        assert out.read_bytes() == whole, cut
        assert summary.kept == sum(end <= cut for end in ends)
    assert names(folder) == ["in.jsonl", "out.jsonl", "out.jsonl.manifest.json"]
    assert json.loads(manifest.read_bytes())["job"] == json.loads(made)["job"]


def test_a_finished_job_does_nothing_and_keeps_its_bytes(llm, folder, monkeypatch):
    first = run(llm, folder)
    before = (folder / "out.jsonl").read_bytes()
    started = counted(monkeypatch, llm)
    again = run(llm, folder)
    assert started == [] and again.kept == 12 and again.totals == first.totals and again.totals.failed == 1
    assert (folder / "out.jsonl").read_bytes() == before
    run(llm, folder, ordered=True)
    assert [json.loads(line).get("id") for line in (folder / "out.jsonl").read_text().splitlines()][:4] == [
        "r0",
        "r1",
        "r2",
        "r3",
    ]


def test_damaged_lines_are_run_again(llm, folder):
    run(llm, folder, ordered=True)
    out = folder / "out.jsonl"
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    lines[3] = b"\0" * (len(lines[3]) - 1) + b"\n"
    lines[7] = b'{"id": "r7"}\n'
    out.write_bytes(b"".join(lines))
    assert run(llm, folder, ordered=True).kept == 10
    assert out.read_bytes() == whole


def test_only_changed_rows_run_again(llm, folder, monkeypatch):
    run(llm, folder, ordered=True)
    before = (folder / "out.jsonl").read_bytes()
    changed = [row for row in ROWS if row.get("id") != "r8"]
    changed[0] = changed[0] | {"prompt": "new"}
    changed[1] = changed[1] | {"temperature": 0.5}
    changed[4] = changed[4] | {"temperature": 1}
    changed.append({"id": "more", "prompt": "x"})
    write(folder, changed)
    started = counted(monkeypatch, llm)
    summary = run(llm, folder, ordered=True)
    assert sorted(started) == ["bad", "more", "r0", "r1"] and summary.kept == 8 and summary.removed
    assert (folder / "out.jsonl.previous").read_bytes().startswith(before)
    resumed = (folder / "out.jsonl").read_bytes()
    run(llm, folder, "other.jsonl", ordered=True)
    assert (folder / "other.jsonl").read_bytes() == resumed


def test_rows_of_another_input_are_not_thrown_away(llm, folder):
    run(llm, folder)
    before = (folder / "out.jsonl").read_bytes()
    (folder / "in.jsonl").write_text("")
    with pytest.raises(ResumeError, match="none of its 12 rows is in the input"):
        run(llm, folder)
    assert (folder / "out.jsonl").read_bytes() == before


def test_other_settings_are_refused_by_name(llm, folder):
    run(llm, folder)
    before = (folder / "out.jsonl").read_bytes()
    with pytest.raises(ResumeError, match=r"params.max_tokens: was 3, now 4"):
        run(llm, folder, params=SamplingParams(max_tokens=4))
    with pytest.raises(ResumeError, match=r'shard: was "1/1", now "1/2"'):
        run(llm, folder, shard=job.Shard(1, 2))
    other = LLM(tiny.random_model("fast"), max_batch=8, chunk=16, block=16, seed=3)
    with pytest.raises(ResumeError) as refused:
        run(other, folder)
    for field in ("model.weights_sha256", "model.eos_ids", "model.tokenizer_sha256", "slots: was 4", "seed: was"):
        assert field in str(refused.value)
    assert (folder / "out.jsonl").read_bytes() == before
    run(llm, folder, params=SamplingParams(max_tokens=4), force=True)
    assert (folder / "out.jsonl").read_bytes() != before


def test_an_output_of_unknown_origin_is_refused(llm, folder):
    (folder / "out.jsonl").write_text("precious\n")
    with pytest.raises(ResumeError, match="holds something already"):
        run(llm, folder)
    (folder / "out.jsonl.manifest.json").write_text('{"format": "llmjax-batch"}')
    with pytest.raises(ResumeError, match="not a manifest"):
        run(llm, folder)
    assert (folder / "out.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize("output", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("in_a_terminal")
def test_interrupted_it_goes_on(llm, folder, monkeypatch, output, number):
    run(llm, folder, f"whole-{output}", ordered=True)
    append, written = Journal.append, []

    def appending(self, *args):
        append(self, *args)
        written.append(args)
        if len(written) == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Journal, "append", appending)
    first = run(llm, folder, output, ordered=True)
    assert first.status == "interrupted" and 5 <= first.totals.rows < 12
    assert json.loads((folder / f"{output}.manifest.json").read_text())["status"] == "interrupted"
    second = run(llm, folder, output, ordered=True)
    assert second.status == "complete" and second.kept == first.totals.rows
    assert (folder / output).read_bytes() == (folder / f"whole-{output}").read_bytes()
    manifest = json.loads((folder / f"{output}.manifest.json").read_text())
    assert manifest["counts"]["rows"] == 12 == sum(r["rows"] for r in manifest["runs"])
    assert not [name for name in names(folder) if name.endswith((".lock", ".partial", ".tmp"))]


def test_a_second_interrupt_does_not_wait(llm, folder, monkeypatch):
    append = Journal.append

    def appending(self, *args):
        append(self, *args)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Journal, "append", appending)
    with pytest.raises(KeyboardInterrupt):
        run(llm, folder)
    assert json.loads((folder / "out.jsonl.manifest.json").read_text())["status"] == "interrupted"
    monkeypatch.undo()
    assert run(llm, folder).kept == 1


def test_a_row_that_makes_the_model_fail_is_told_apart(llm, folder, monkeypatch):
    """The embedding of "z" is NaN."""
    params = jax.tree.map(lambda x: x, llm.model.params)
    z = llm.tokenizer.encode("z")[0]
    params["embed"]["weight"] = params["embed"]["weight"].at[z].set(np.nan)
    ill = LLM(dataclasses.replace(llm.model, params=params), max_batch=4, chunk=16, block=16)
    rows = [{"id": i, "prompt": "abz" if i in (2, 9) else "abc"} for i in range(12)]
    write(folder, rows)
    summary = run(ill, folder, ordered=True)
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found if "error" in row] == [2, 9] and summary.totals.failed == 2
    assert "the model computes NaN" in found[2]["error"] and "line" not in found[2]
    started = counted(monkeypatch, ill)
    assert run(ill, folder, ordered=True).kept == 12 and not started
    assert run(ill, folder, ordered=True, retry_errors=True).kept == 10
    assert set(started) == {"2", "9", "probe"}
    write(folder, [row | {"prompt": "z"} for row in rows])
    assert run(ill, folder, "none.jsonl").totals.failed == 12


def test_a_model_that_answers_nothing_ends_the_job(llm, folder, monkeypatch):
    monkeypatch.setattr(llm.engine, "_params", jax.tree.map(lambda x: x * np.nan, llm.engine._params))
    monkeypatch.setattr(llm.engine, "store", llm.engine.new_store())
    with pytest.raises(CheckpointError, match="NaN"):
        run(llm, folder)
    # Rows that could not run say so, those that could are left for a model that is sound.
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] in ([], ["bad"])
    assert json.loads((folder / "out.jsonl.manifest.json").read_text())["status"] == "failed"


def test_gzip_in_and_out(llm, folder):
    (folder / "in.jsonl.gz").write_bytes(gzip.compress((folder / "in.jsonl").read_bytes()))
    run(llm, folder, "plain.jsonl", ordered=True)
    run(llm, folder, "out.jsonl.gz", source="in.jsonl.gz", ordered=True)
    once = (folder / "out.jsonl.gz").read_bytes()
    assert gzip.decompress(once) == (folder / "plain.jsonl").read_bytes()
    assert run(llm, folder, "out.jsonl.gz", source="in.jsonl.gz", ordered=True).kept == 12
    assert (folder / "out.jsonl.gz").read_bytes() == once
    (folder / "in.jsonl.gz").write_bytes((folder / "in.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(RequestError, match="damaged or was cut short"):
        run(llm, folder, "out2.jsonl.gz", source="in.jsonl.gz")


def test_a_full_disk_loses_nothing(llm, folder):
    """The system itself refuses to write on, in the middle of a row."""
    run(llm, folder, "whole.jsonl", ordered=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        summary = run(llm, folder, ordered=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert summary.status == "failed" and "writing the output failed: File too large" in summary.problem
    rows = (folder / "out.jsonl").read_bytes()
    assert 0 < summary.totals.rows < 12 and rows.endswith(b"\n") and rows.count(b"\n") == summary.totals.rows
    assert run(llm, folder, ordered=True).kept == summary.totals.rows
    assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_one_job_at_a_time(llm, folder):
    with locked(folder / "out.jsonl"), pytest.raises(ResumeError, match=f"another job .*process {os.getpid()}"):
        run(llm, folder)
    run(llm, folder)
    assert not (folder / "out.jsonl.lock").exists()


def test_the_folder_is_made_before_the_model_is_loaded(folder):
    """And goes again where the model cannot be."""

    def load():
        assert (folder / "new").is_dir()
        raise CheckpointError("no model")

    with pytest.raises(CheckpointError, match="no model"):
        job.run(load, str(folder / "in.jsonl"), str(folder / "new" / "out.jsonl"), PARAMS)
    assert not (folder / "new").exists()
    with pytest.raises(RequestError, match="cannot write the output: Not a directory"):
        job.run(load, str(folder / "in.jsonl"), str(folder / "in.jsonl" / "out.jsonl"), PARAMS)


@pytest.mark.parametrize(
    "error", [ValueError("boom"), MemoryError(), type("PanicException", (BaseException,), {})("boom")]
)
def test_a_row_that_fails_in_any_way_says_so(llm, folder, monkeypatch, error):
    """The engine is as good as new: the other rows, those that were under way among them, are answered as ever."""
    run(llm, folder, "whole.jsonl", ordered=True)
    whole = (folder / "whole.jsonl").read_bytes().splitlines()
    fill = llm.engine._fill

    def failing(row, *rest):
        if row.request.request_id in ("r0", "r8"):
            raise error
        return fill(row, *rest)

    monkeypatch.setattr(llm.engine, "_fill", failing)
    assert run(llm, folder, ordered=True).status == "complete"
    rows = (folder / "out.jsonl").read_bytes().splitlines()
    for i, (before, now) in enumerate(zip(whole, rows, strict=True)):
        if i in (0, 8):
            message = f"{type(error).__name__}: {error}"
            assert json.loads(now) == {"id": f"r{i}", "error": message, "hash": json.loads(before)["hash"]}
        else:
            assert now == before
    monkeypatch.undo()
    assert run(llm, folder, ordered=True).kept == 12
    assert run(llm, folder, ordered=True, retry_errors=True).kept == 10
    assert (folder / "out.jsonl").read_bytes().splitlines() == whole


def test_a_step_that_fails_once_costs_nothing(llm, folder, monkeypatch):
    """It has taken the buffers with it."""
    run(llm, folder, "whole.jsonl", ordered=True)
    decode, calls = llm.engine._decode, []

    def failing(*args):
        result = decode(*args)
        calls.append(0)
        if len(calls) == 4:
            raise RuntimeError("lost")
        return result

    monkeypatch.setattr(llm.engine, "_decode", failing)
    assert run(llm, folder, ordered=True).status == "complete"
    assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_an_answer_that_cannot_be_told_is_its_rows_error(llm, folder, monkeypatch):
    answer = InputRow.answer
    monkeypatch.setattr(InputRow, "answer", lambda row, *args: 1 / (row.row_id != "r5") and answer(row, *args))
    run(llm, folder, ordered=True)
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert rows[5]["error"] == "ZeroDivisionError: division by zero"
    assert [i for i, row in enumerate(rows) if row.get("error")] == [4, 5]


def test_an_input_cut_short_is_used_to_its_end(llm, folder):
    """Rows under way are not lost.  A pipe tells of its damage when most is read."""
    data = gzip.compress(b"".join(json.dumps({"id": i, "prompt": "abc"}).encode() + b"\n" for i in range(9)))
    os.mkfifo(folder / "fifo")
    threading.Thread(target=lambda: (folder / "fifo").write_bytes(data[:-8]), daemon=True).start()
    with pytest.raises(RequestError, match="fifo: cannot read on, the file is damaged or was cut short"):
        run(llm, folder, source="fifo")
    assert {json.loads(line)["id"] for line in (folder / "out.jsonl").read_text().splitlines()} == {*range(9)}


def failing_fsync(monkeypatch, when):
    """Once, as the system reports a lost page: to whoever asks first, and then never again."""
    fsync, failed = os.fsync, []

    def failing(file):
        if not failed and when(os.readlink(f"/proc/self/fd/{file}")):
            failed.append(file)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(file)

    monkeypatch.setattr(os, "fsync", failing)
    return failed


def test_a_failed_sync_in_the_background_is_told(llm, folder, monkeypatch):
    run(llm, folder, "whole.jsonl", ordered=True)
    append = Journal.append
    monkeypatch.setattr(Journal, "append", lambda *args: (append(*args), time.sleep(0.1)))
    monkeypatch.setattr(job, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", 0.01)
    main = threading.main_thread()
    failed = failing_fsync(monkeypatch, lambda path: threading.current_thread() is not main and count(folder) > 3)
    summary = run(llm, folder, ordered=True)
    assert failed and summary.status == "failed" and "writing the output failed: Input/output error" in summary.problem
    manifest = json.loads((folder / "out.jsonl.manifest.json").read_text())
    assert manifest["status"] == "failed"
    # What is claimed are the rows that were on the disk before.
    assert count(folder) == summary.totals.rows == manifest["counts"]["rows"] == manifest["runs"][0]["rows"] < 4
    assert run(llm, folder, ordered=True).kept == summary.totals.rows
    assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def count(folder):
    return (folder / "out.jsonl").read_bytes().count(b"\n")


@pytest.mark.parametrize("nth", [1, 2])
def test_a_manifest_that_cannot_be_written_is_told(llm, folder, monkeypatch, nth):
    seen = []
    failing_fsync(monkeypatch, lambda path: path.endswith(".manifest.json") and (seen.append(path) or len(seen) == nth))
    summary = run(llm, folder, ordered=True)
    assert summary.status == "failed" and "writing the output failed: Input/output error" in summary.problem
    assert summary.totals.rows == count(folder) == (0, 12)[nth - 1]
    assert run(llm, folder, ordered=True).kept == summary.totals.rows


def test_a_file_that_cannot_be_closed_is_told(llm, folder, monkeypatch):
    close = os.close

    def failing(file):
        path = os.readlink(f"/proc/self/fd/{file}")
        close(file)
        if path.endswith("out.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "close", failing)
    summary = run(llm, folder)
    assert summary.status == "failed" and "writing the output failed: No space left" in summary.problem


def test_a_job_keeps_its_date(llm, folder, monkeypatch):
    """The template asks for it; the answers are those under the date given."""
    talk = [{"role": "user", "content": "hi"}]
    body = {"messages": talk, "max_tokens": 3}
    rows = [
        {"id": "a", "messages": talk},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": body},
    ]
    write(folder, rows)
    run(llm, folder, ordered=True)
    made = json.loads((folder / "out.jsonl.manifest.json").read_text())["job"]["date"]
    whole = (folder / "out.jsonl").read_bytes()
    a, b = map(json.loads, whole.splitlines())
    prompt = len(llm.chat_request(talk, date=made).ids)
    assert a["usage"]["prompt_tokens"] == b["response"]["body"]["usage"]["prompt_tokens"] == prompt
    later = datetime.datetime.fromisoformat(made) + datetime.timedelta(days=200)
    now = type("Later", (datetime.datetime,), {"now": lambda: later})
    monkeypatch.setattr(dates, "datetime", types.SimpleNamespace(datetime=now))
    assert llm.chat_request(talk).prompt == f"{later:%d %B %H:%M} hi"
    started = counted(monkeypatch, llm)
    summary = run(llm, folder, ordered=True)
    assert summary.kept == 2 and not started and not summary.removed and (folder / "out.jsonl").read_bytes() == whole
    with pytest.raises(ResumeError, match=f'date: was "{made}", now "2026-01-31T00:00:00"'):
        run(llm, folder, date="2026-01-31")
    run(llm, folder, "other.jsonl", date="2026-01-31T09:30", ordered=True)
    assert json.loads((folder / "other.jsonl").read_text().splitlines()[0])["hash"] != a["hash"]
    report = dryrun.run(lambda: llm, str(folder / "in.jsonl"), str(folder / "other.jsonl"), PARAMS)
    assert report.prompt_tokens == 2 * len("31 January 09:30 hi") and "from the 2 that took" in report.estimate
    report = dryrun.run(lambda: llm, str(folder / "in.jsonl"), "-", PARAMS, date="2026-05-31")
    assert report.prompt_tokens == 2 * len("31 May 00:00 hi")


@pytest.mark.usefixtures("in_a_terminal")
def test_the_first_interrupt_is_heard_at_once(capsys):
    """While a program runs, that is, in which Python handles no signal."""
    heard = []
    with Interrupts(lambda: heard.append(time.monotonic())) as interrupts:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)
        ended = time.monotonic()
    assert interrupts.asked and heard[0] < ended - 0.1
    assert capsys.readouterr().err.startswith("llmjax: stopping after the step under way")
    with pytest.raises(KeyboardInterrupt), Interrupts(lambda: None):
        for wait in (0.1, 0.2):
            threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_is_heeded_between_the_chunks_of_a_prompt(llm, folder, monkeypatch):
    rows = [{"id": i, "prompt": "ab" * (70 + i)} for i in range(4)]
    write(folder, rows)
    run(llm, folder, "whole.jsonl", ordered=True)
    prefill, calls = llm.engine._prefill, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return prefill(*args)

    monkeypatch.setattr(llm.engine, "store", llm.engine.new_store())
    monkeypatch.setattr(llm.engine, "_prefill", interrupted)
    before = llm.engine.progress.prefill_tokens
    summary = run(llm, folder, ordered=True)
    assert summary.status == "interrupted" and summary.totals.rows == 0 and len(calls) == 3
    assert llm.engine.progress.prefill_tokens - before == 3 * 16 == summary.run["prefill_tokens"]
    reused = llm.engine.progress.reused_tokens
    run(llm, folder, ordered=True)
    assert llm.engine.progress.reused_tokens - reused >= 3 * 16
    assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_an_output_that_is_a_link_is_still_one_at_the_end(llm, folder, name):
    """Rows are put in order, and superseded ones removed, where the link leads: on another disk, say."""
    (folder / "big").mkdir()
    (folder / name).symlink_to(folder / "big" / name)
    run(llm, folder, name, ordered=True)
    run(llm, folder, f"whole-{name}", ordered=True)
    assert (folder / name).is_symlink()
    assert (folder / "big" / name).read_bytes() == (folder / f"whole-{name}").read_bytes()
    write(folder, ROWS[:3])
    assert run(llm, folder, name, ordered=True).removed
    first = (gzip.decompress if name.endswith(".gz") else bytes)((folder / "big" / name).read_bytes())
    assert (folder / name).is_symlink() and len(first.splitlines()) == 3
    assert len((folder / f"{name}.previous").read_bytes().splitlines()) == len(ROWS)
