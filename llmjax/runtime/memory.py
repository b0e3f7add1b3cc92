"""What an engine may take of the machine's memory, and what becomes of it."""

import contextlib
import ctypes
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import jax

from llmjax.errors import RequestError

# Of what is free beside the weights: compiled programs, their temporaries and Python want some, too.
_SHARE = 3 / 4
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
# Where there is less than a device says, or a program takes more.
LOWER = (
    "give a smaller budget (memory, --memory), have fewer slots (max_batch, --max-batch), or store the weights in "
    "fewer bits (quantize, --quantize)"
)
# Of a cache: what is nobody's, and two.
FEWEST_PAGES = 3


@dataclasses.dataclass(frozen=True)
class Memory:
    """How a budget is spent.

    Attributes:
      budget: bytes for everything below.
      weights: bytes of the model's parameters.
      slots: bytes of what each slot has beside its tokens: logits, what is changed in them, ...
      page: bytes of a page of the cache.
      buffer: bytes of a page in the largest of the cache's buffers, which growing holds twice.
      tokens: positions in a page.
    """

    budget: int
    weights: int
    slots: int
    page: int
    buffer: int
    tokens: int

    def __post_init__(self) -> None:
        least = self.weights + self.slots + FEWEST_PAGES * self.page
        if self.budget < least:
            raise RequestError(
                f"memory: the budget is {size(self.budget)}, and this model needs {size(least)} at least (weights "
                f"{size(self.weights)}, slots {size(self.slots)}, a cache of {2 * self.tokens} tokens); give more "
                "(memory, --memory), have fewer slots (max_batch, --max-batch), or store the weights in fewer bits"
            )

    @property
    def pages(self) -> int:
        """The most there may be, page 0 included."""
        return (self.budget - self.weights - self.slots) // self.page

    def pages_from(self, pages: int) -> int:
        """The most that ``pages`` can grow to while they are copied."""
        return (self.budget - self.weights - self.slots - pages * self.buffer) // self.page

    @property
    def most_tokens(self) -> int:
        """What the cache may hold of all rows together."""
        return (self.pages - 1) * self.tokens

    def describe(self) -> str:
        """One line."""
        return (
            f"weights {size(self.weights)}, slots {size(self.slots)}, cache up to {size(self.pages * self.page)} "
            f"as rows fill it ({self.most_tokens:,} tokens of {self.page / self.tokens / 1000:,.1f} kB); budget "
            f"{size(self.budget)}"
        )


def size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def parse(value: float | str) -> int:
    """Bytes, from a number or from a text such as ``6GB``, ``500M`` or ``1.5GiB``.

    Raises:
      RequestError: it is neither, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(value).strip().upper())
    found = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if isinstance(value, bool) or found < 1:
        raise RequestError(f"memory: expected bytes, or a size such as 6GB or 500MB, found {value!r}")
    return found


def default_budget(weights: int, device: jax.Device, devices: int = 1) -> int:
    """The weights, which are on the device already, and three quarters of what is free beside them; where several
    devices are one machine's, of each device's part."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        unused = available()
        # Weights that are only mapped count as available until they are read, and after that as well.
        mapped = max(0, weights - _status("/proc/self/status").get("RssAnon", weights))
        free = max(unused - mapped, unused // 4) // devices
    return weights + int(_SHARE * free)


def give_back_free() -> None:
    """Returns free memory to the system: after a compilation glibc keeps hundreds of MB of it, which count as the
    process's.  Nothing where the C library has no such function."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def available() -> int:
    """Bytes of the machine's memory, or of this container's, that can still be had."""
    found = _status("/proc/meminfo").get("MemAvailable", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, now = (int(Path(folder, name).read_text()) for name in (limit, used))
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", Path(folder, "memory.stat").read_text(), re.M)
        except (OSError, ValueError):  # there is none, or its limit is "max"
            continue
        found = min(found, most - now + (int(cached[1]) if cached else 0))
    return max(0, found)


def _status(path: str) -> dict[str, int]:
    """Bytes by name, from lines like ``MemAvailable:  12 kB``; empty where there is no such file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    return {m[1]: 1024 * int(m[2]) for line in lines if (m := re.match(r"(\w+):\s+(\d+) kB", line))}


def weight_bytes(*trees: Any) -> int:
    """Of all arrays in them, each counted once; of those that are spread over devices, what one device has."""

    def one(x: Any) -> int:
        whole = not isinstance(x, jax.Array) or x.is_fully_replicated
        return int(x.nbytes if whole else math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize)

    return sum({id(x): one(x) for x in jax.tree.leaves(trees)}.values())
