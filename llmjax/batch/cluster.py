"""A Ray cluster: reached in bounded time, quietly, and what it has room for."""

import contextlib
import dataclasses
import os
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

from llmjax.errors import OutputError, RequestError

# For a cluster to answer at all, and for Ray to be a part of it.
_REACH_SECONDS, _JOIN_SECONDS = 5.0, 120.0
# Of shared memory, for what a cluster of this process's own passes on; more of it goes to the disk.
_STORE_BYTES = 256 << 20
# How it is given.
_TOKEN = ", which is used with RAY_AUTH_MODE=token"
# A reason, in the warnings of Ray's own libraries.
_WARNED = re.compile(r"RPC error: (?:\w+: )?(.+)")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where workers are to run, and what each may have.

    Attributes:
      address: ``local`` for one of this process's own, on this machine, that ends with it; ``auto`` for the one that
        this machine is part of; ``HOST:PORT`` of another's head.
      actors: workers; None for as many as there are GPUs, or else machines.
      cpus: that Ray counts for each; how many threads XLA uses does not hang on it.
      gpus: for each; None for one where the cluster has any.
    """

    address: str = "local"
    actors: int | None = None
    cpus: float = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("actors", self.actors, 1), ("cpus", self.cpus, 0), ("gpus", self.gpus, 0)):
            if value is not None and not value >= least:
                raise RequestError(f"--ray: {name}: expected a number from {least}, found {value}")


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, as a part of the cluster.

    Raises:
      RequestError: Ray is not installed, or the address is none.
      OutputError: no cluster answers there, or one of another version.
    """
    # Before Ray is imported: it reports nothing to anyone, and leaves the GPUs that it does not count alone.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise RequestError("--ray: needs Ray: pip install 'llmjax[ray]', here and on every machine") from None
    address = cluster.address
    if "://" in address:
        raise RequestError(
            f"--ray {address}: expected local, auto or HOST:PORT; a job belongs on a machine of the cluster: start it "
            "there, or with ray job submit, with --ray auto"
        )
    if address not in ("local", "auto"):
        _reach(address)
    mine = {"include_dashboard": False, "object_store_memory": _STORE_BYTES} if address == "local" else {}
    if mine:  # whose workers are what this process is for: they do not stand back behind others
        os.environ.setdefault("RAY_worker_niceness", "0")
    problem: list[BaseException] = []
    warnings: list[str] = []

    def join() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="critical", **mine)
        except BaseException as error:
            problem.append(error)

    if mine:  # its processes end with the thread that began them
        join()
        late = False
    else:  # Ray waits long for some that answer and are no cluster
        thread = threading.Thread(target=join, daemon=True)
        with _set_aside() as told:
            thread.start()
            thread.join(_JOIN_SECONDS)
            late = thread.is_alive()
            warnings = _WARNED.findall(told())
    if late or problem:
        reason = last_line(problem[0]) if problem else f"no answer in {_JOIN_SECONDS:.0f} s"
        if warnings:
            reason += f" ({warnings[-1]}{_TOKEN if 'token' in warnings[-1] else ''})"
        raise OutputError(f"--ray {address}: no cluster that can be joined: {reason}; nothing was run")
    # On stdout Ray tells, in many words, what a fleet tells in few; rows may go there.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            yield ray
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _set_aside() -> Iterator[Callable[[], str]]:
    """What goes to stderr meanwhile does not: Ray's own warnings go there past Python, again and again."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)

        def told() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield told
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _reach(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise RequestError(f"--ray {address}: expected local, auto or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise OutputError(
            f"--ray {address}: cannot be reached: {error.strerror or error}; is this the head's address (ray status "
            "tells), and the port open? Nothing was run"
        ) from None


def room(ray: Any, cluster: Cluster) -> tuple[int, dict[str, float]]:
    """How many workers to ask for, and what each is to have.

    Raises:
      RequestError: no machine of the cluster has that.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = sum(node.get("GPU", 0) for node in nodes)
    wanted = {"CPU": cluster.cpus, "GPU": (1 if found else 0) if cluster.gpus is None else cluster.gpus}
    if not any(all(node.get(name, 0) >= count for name, count in wanted.items()) for node in nodes):
        asked = ", ".join(f"{count:g} {name}" for name, count in wanted.items() if count)
        have = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes[:5])
        raise RequestError(f"--ray: no machine of the cluster has {asked} for a worker; they have: {have}")
    return cluster.actors or max(1, int(found / wanted["GPU"]) if wanted["GPU"] else len(nodes)), wanted


def last_line(error: BaseException) -> str:
    """What went wrong, of Ray's long accounts of it."""
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) else error)
    lines = [line.strip().partition(" Some common causes")[0] for line in text.splitlines() if line.strip()]
    marks = "The actor is dead because", "Task was killed", "Memory on the node"
    reasons = [line for line in lines if any(mark in line for mark in marks)]
    return (reasons or lines or [type(error).__name__])[-1]
