"""The floors of the house: who may import whom."""

import ast
import graphlib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
# From the ground up.  A file imports from its own room and from lower floors.
FLOORS = (
    "llmjax.errors",
    "llmjax.configs llmjax.device llmjax.numerics llmjax.outside",
    "llmjax.quant",
    "converters.readers llmjax.products",
    "llmjax.models llmjax.text",
    "llmjax.model",
    "llmjax.lora llmjax.litert",
    "llmjax.checkpoint llmjax.runtime",
    "llmjax.llm",
    "llmjax.llm_inference llmjax.batch llmjax.oracle llmjax.training converters.mediapipe",
    "converters.litert",
    "llmjax.bench llmjax.genai llmjax.writing",
    "llmjax.cli",
    "llmjax.__main__",
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}


def room(module: str) -> str:
    """The folder below the root, or the file in it."""
    return ".".join(module.split(".")[:2])


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """By file, what it imports anywhere but for type checkers; the packages' own faces are left out."""
    graph = grimp.build_graph("llmjax", "converters", exclude_type_checking_imports=True, cache_dir=None)
    files = graph.modules - {"llmjax", "converters"}
    return {file: graph.find_modules_directly_imported_by(file) & files for file in files}


def test_every_room_has_a_floor(imports):
    assert {room(file) for file in imports} == set(FLOOR)


def test_no_circle(imports):
    list(graphlib.TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle


def test_none_imports_from_above_or_beside(imports):
    wrong = [
        f"{file} imports {other}"
        for file, others in imports.items()
        for other in others
        if room(other) != room(file) and FLOOR[room(other)] >= FLOOR[room(file)]
    ]
    assert not wrong


def test_readers_know_errors_and_packed_values_alone(imports):
    allowed = {"converters.readers", "llmjax.errors", "llmjax.quant"}
    for file in imports:
        if room(file) == "converters.readers":
            assert {room(other) for other in imports[file]} <= allowed, file


def test_faces_alone_in_the_root_and_no_long_files():
    assert len(list((ROOT / "llmjax").glob("*.py"))) <= 10
    files = [f for folder in ("llmjax", "converters", "scripts") for f in (ROOT / folder).rglob("*.py")]
    assert not [f.name for f in files if len(f.read_text(encoding="utf-8").splitlines()) > 400]


def test_every_package_says_what_belongs_in_it():
    for folder in {f.parent for top in ("llmjax", "converters") for f in (ROOT / top).rglob("*.py")}:
        assert (folder / "__init__.py").read_text(encoding="utf-8").startswith('"""'), folder


def test_a_test_that_needs_an_extra_skips_without_it():
    """An import at a file's head would fail where ``scripts/test.sh --no-parity`` collects it."""
    extras = {"accelerate", "ai_edge_litert", "litert_lm", "peft", "ray", "torch", "transformers"}
    for file in (ROOT / "tests").rglob("test_*.py"):
        found = {name for node in ast.parse(file.read_text(encoding="utf-8")).body for name in imported(node)}
        assert not {n for n in found if n.split(".")[0] in extras or n == "tests.parity.reference"}, file


def imported(node: ast.stmt) -> list[str]:
    """What a statement imports, by its full names."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return []
    within = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    return [within + alias.name for alias in node.names]
