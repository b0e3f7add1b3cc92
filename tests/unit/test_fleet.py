"""Jobs by many workers, without a cluster: what stands for Ray runs them here, and has them die as it is told."""

import dataclasses
import json
import os
import random
import threading
import time

import pytest

from llmjax import LLM
from llmjax.batch import cluster, fleet, job, ray, scoring, worker
from llmjax.batch.cluster import Cluster
from llmjax.errors import CheckpointError, OutputError, RequestError, ResumeError
from tests import tiny

PARAMS = {"max_tokens": 4}
QUIET = job.Options(ordered=True, progress_seconds=0, date="2026-01-31")
ROWS = [{"id": f"r{i}", "prompt": "abcdefghij"[: 1 + i % 9], "max_tokens": 1 + i % 3} for i in range(60)]
ROWS[5] = {"id": "r3", "prompt": "its id is used"}
ROWS[7] = {"id": "bad", "prompt": "x", "temperature": -1}
ROWS[9] = {"custom_id": "o", "method": "POST", "url": "/v1/completions", "body": {"prompt": "abc", "max_tokens": 2}}
ROWS[11] = {"id": 12, "prompt_token_ids": [1, 2], "metadata": {"a": 1}, "logprobs": 1}
ROWS[13] = {"id": "long", "prompt": "x" * 300}


class Died(Exception):
    """Ray's."""


class Actor:
    """A worker in this process.

    Args:
      ray: of which it is.
      made: the worker.
    """

    def __init__(self, ray, made):
        self._ray, self._made = ray, made

    def __getattr__(self, name):
        return Method(self._ray, getattr(self._made, name), name)


class Method:
    def __init__(self, ray, call, name):
        self._ray, self._call, self._name = ray, call, name

    def options(self, num_returns):
        assert num_returns == "streaming"
        return self

    def remote(self, *args):
        value = lambda: self._ray.called(self._name, self._call, args)  # noqa: E731
        return iter(Stream(value)) if self._name == "answer" else Ref(value)


@dataclasses.dataclass(eq=False)
class Ref:
    value: object


class Stream:
    """Of pieces; all are made at once, for the workers share a model."""

    def __init__(self, value):
        self._value, self._pieces = value, None

    def __iter__(self):
        return self

    def __next__(self):
        if self._pieces is None:
            self._pieces = iter(self._value())
        piece = next(self._pieces)
        return Ref(lambda: _raised(piece))


def _raised(piece):
    if isinstance(piece, Died):
        raise piece
    return piece


class Ray:
    """Of Ray, what a fleet uses.

    Args:
      dies: for a method and its arguments, after how many of its pieces the worker dies; None for never.
      nodes: of the cluster.
    """

    class exceptions:
        RayError = Died

    def __init__(self, dies=lambda name, args: None, nodes=({"CPU": 4.0},)):
        self._dies, self._nodes, self.killed, self.tasks, self._rng = dies, nodes, 0, [], random.Random(0)

    def called(self, name, call, args):
        after = self._dies(name, args)
        if name != "answer":
            if after is not None:
                raise Died(f"long account\n\nThe actor is dead because {name} was killed")
            return call(*args)
        self.tasks.append([row.line for row in args[0]])
        pieces = list(call(*args))
        return pieces if after is None else [*pieces[:after], Died("The actor is dead because its row killed it")]

    def nodes(self):
        return [{"Alive": True, "Resources": resources} for resources in self._nodes]

    def remote(self, kind):
        self._kind = kind
        return self

    def options(self, **options):
        self.asked = options
        return self

    def wait(self, pending, num_returns, timeout):
        ready = self._rng.choice(pending)
        return [ready], [ref for ref in pending if ref is not ready]

    def get(self, ref):
        return ref.value()

    def kill(self, actor):
        self.killed += 1


class Remote(Ray):
    """Its ``remote`` is that of the class first, of an actor then."""

    def remote(self, *args):
        if len(args) == 1:
            return super().remote(*args)
        return Actor(self, self._kind(*args))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return tiny.roomy(LLM(tiny.checkpoint(tmp_path_factory.mktemp("tiny")), max_batch=4, chunk=16, block=16))


@pytest.fixture(scope="module")
def whole(llm, tmp_path_factory):
    """What one process makes of the rows."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{no json\n")
    job.run(lambda: llm, str(folder / "in.jsonl"), str(folder / "out.jsonl"), PARAMS, QUIET)
    return folder


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_bytes((whole / "in.jsonl").read_bytes())
    monkeypatch.setattr(worker, "_SECONDS", 0.0)  # a piece for every row
    monkeypatch.setattr(fleet, "_ROWS", 3)
    return tmp_path


@pytest.fixture
def run(llm, folder, monkeypatch):
    def run(of, actors=2, options=QUIET, load=lambda: llm, **more):
        monkeypatch.setattr(ray, "connected", lambda _: tiny_context(of))
        files = str(folder / "in.jsonl"), str(folder / "out.jsonl")
        return ray.run(load, *files, more.pop("params", PARAMS), options, cluster=Cluster(actors=actors), **more)

    return run


class tiny_context:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("actors", tiny.some([2], [1, 2, 4]))
def test_any_number_of_workers_writes_what_one_process_does(run, folder, whole, actors):
    cluster = Remote()
    summary = run(cluster, actors)
    assert (folder / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    assert (summary.status, summary.totals.rows, summary.totals.failed) == ("complete", 61, 4)
    lines = [line for task in cluster.tasks for line in task]
    assert len(lines) == len(set(lines)) == 59  # of the row without JSON and the one whose id is used no worker hears
    mine, theirs = (json.loads((f / "out.jsonl.manifest.json").read_text()) for f in (folder, whole))
    assert mine["job"] == theirs["job"] and mine["counts"] == theirs["counts"]
    for name in ("decode_tokens", "rows"):
        assert mine["runs"][0][name] == theirs["runs"][0][name]


def test_rows_of_the_dead_are_run_again_and_none_twice(run, folder, whole):
    rng = random.Random(3)
    cluster = Remote(lambda name, args: rng.randrange(4) if rng.random() < 0.4 else None)
    summary = run(cluster, actors=3)
    assert cluster.killed > 5
    assert (folder / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    assert summary.totals.rows == 61 and not summary.removed


def test_a_job_goes_on_and_runs_what_is_missing(run, folder, whole, llm, capsys):
    stop = Remote(lambda name, args: 1 if len(stop.tasks) > 1 else None)
    with pytest.raises(
        OutputError, match="workers died 10 times with no row done in between, the last one so: The actor"
    ):
        run(stop, actors=1)
    assert "a worker on" in capsys.readouterr().err
    manifest = json.loads((folder / "out.jsonl.manifest.json").read_text())
    assert manifest["status"] == "failed"
    written = (folder / "out.jsonl").read_bytes().count(b"\n")
    assert 10 < written < 40
    summary = run(cluster := Remote())
    assert summary.kept == written and (folder / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    # And what one process began, as what it began.
    assert job.run(lambda: llm, str(folder / "in.jsonl"), str(folder / "out.jsonl"), PARAMS, QUIET).kept == 61
    assert run(Remote()).kept == 61
    assert cluster.tasks
    with pytest.raises(ResumeError, match="params.max_tokens: was 4, now 5"):
        run(Remote(), params={"max_tokens": 5})
    assert (folder / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()


def test_a_row_that_kills_its_worker_fails_alone(run, folder, whole):
    def dies(name, args):
        return 0 if name == "answer" and 31 in [row.line for row in args[0]] else None

    cluster = Remote(dies)
    assert run(cluster).totals.failed == 5
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (whole / "out.jsonl").read_text().splitlines()]
    assert "the worker died each of 4 times: The actor is dead because its row killed it" in rows[30]["error"]
    assert rows[30]["id"] == "r30" and rows[:30] + rows[31:] == expected[:30] + expected[31:]
    # Where it can run, it does.
    assert run(Remote(), options=dataclasses.replace(QUIET, retry_errors=True)).totals.failed == 4
    assert (folder / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()


def test_workers_that_cannot_begin(run, folder, monkeypatch, llm):
    def missing():
        raise CheckpointError("model.gguf: no such file")

    with pytest.raises(RequestError, match="^the worker on .* cannot begin: model.gguf: no such file$"):
        run(Remote(), load=missing)
    with pytest.raises(OutputError, match="workers died 10 times .* The actor is dead because greet was killed"):
        run(Remote(lambda name, args: 0 if name == "greet" else None), actors=1)
    assert not (folder / "out.jsonl").exists()
    with pytest.raises(
        RequestError, match="no machine of the cluster has 1 CPU, 1 GPU for a worker; they have: 0 CPU, 2"
    ):
        run(Remote(nodes=[{"GPU": 2.0}, {"CPU": 2.0}]))


def test_workers_that_differ(run, folder, llm):
    versions = ["0.10.2", "0.10.3"]

    class Differing(Remote):
        def called(self, name, call, args):
            found = super().called(name, call, args)
            if name == "greet":
                found.identity["versions"]["jax"] = versions.pop()
                found.identity["runtime_version"] = versions[0] if len(versions) == 3 else "0.1.0"
            return found

    with pytest.raises(RequestError, match='same bits:\n  versions.jax: was "0.10.3", now "0.10.2"$'):
        run(Differing())
    versions += ["0.10.2", "", "", ""]
    with pytest.raises(RequestError, match="has llmjax 0.10.2, and this process 0.1.0"):
        run(Differing())


@pytest.mark.slow  # what scoring compiles
def test_texts_are_scored_by_workers(run, folder, llm):
    (folder / "in.jsonl").write_text("".join(json.dumps({"id": i, "text": "ab" * (i + 1)}) + "\n" for i in range(20)))
    run(Remote(), params=None, work=scoring.Scoring)
    job.run(lambda: llm, str(folder / "in.jsonl"), str(folder / "one.jsonl"), None, QUIET, work=scoring.Scoring)
    assert (folder / "out.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()
    summaries = [json.loads((folder / f"{n}.jsonl.manifest.json").read_text())["summary"] for n in ("out", "one")]
    assert summaries[0] == summaries[1] and summaries[0]["rows"] == 20


def test_a_pipe_that_stays_open_is_answered_line_by_line(llm, folder, monkeypatch):
    monkeypatch.setattr(ray, "connected", lambda _: tiny_context(Remote()))
    os.mkfifo(folder / "fifo")
    output, seen = folder / "out.jsonl", []

    def write():
        with open(folder / "fifo", "w") as pipe:
            for i in range(4):
                pipe.write(json.dumps({"id": f"r{i}", "prompt": "ab"}) + "\n")
                pipe.flush()
                until = time.monotonic() + 20
                while time.monotonic() < until and (not output.exists() or output.read_bytes().count(b"\n") <= i):
                    time.sleep(0.01)
                seen.append(output.read_bytes().count(b"\n"))

    writer = threading.Thread(target=write)
    writer.start()
    summary = ray.run(lambda: llm, str(folder / "fifo"), str(output), PARAMS, QUIET, cluster=Cluster(actors=2))
    writer.join()
    assert seen == [1, 2, 3, 4] and summary.totals.rows == 4


def test_how_many_workers():
    asked = lambda nodes, **of: cluster.room(Ray(nodes=nodes), Cluster(**of))  # noqa: E731
    assert asked([{"CPU": 8.0}] * 3) == (3, {"CPU": 1, "GPU": 0})
    assert asked([{"CPU": 8.0, "GPU": 4.0}] * 2) == (8, {"CPU": 1, "GPU": 1})
    assert asked([{"CPU": 8.0, "GPU": 4.0}], gpus=2) == (2, {"CPU": 1, "GPU": 2})
    assert asked([{"CPU": 8.0}], actors=4, cpus=0.5) == (4, {"CPU": 0.5, "GPU": 0})
    for wrong in ({"actors": 0}, {"cpus": -1.0}, {"gpus": -1.0}):
        with pytest.raises(RequestError, match="--ray: .*: expected a number from"):
            Cluster(**wrong)


NO_MEMORY = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.1) was 6GB used"
)
NO_PROCESS = "The actor is dead because its worker process has died. Worker exit detail: EOF."


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (f"{NO_MEMORY}\nOOM kill reason: ...\nTop 10 memory users: ...\nRefer to the documentation on how", NO_MEMORY),
        (f"The actor died unexpectedly.\n\tclass_name: Worker\n{NO_PROCESS} Some common causes are\nM.", NO_PROCESS),
    ],
)
def test_why_a_worker_died_is_a_line(told, reason):
    assert cluster.last_line(Died(told)) == reason


def test_what_ray_warns_of_while_it_joins_is_set_aside(capfd):
    with cluster._set_aside() as told:
        os.write(2, b"W 1] gcs.cc:210: RPC error: InvalidAuthToken: Authentication token is missing\n")
        assert cluster._WARNED.findall(told()) == ["Authentication token is missing"]
    os.write(2, b"seen\n")
    assert capfd.readouterr().err == "seen\n"
