"""Run: python -m pytest tests/test_imports.py. The import graph, six floors high, and what the docs say."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

from variants import sizes

ROOT = Path(__file__).parents[1]
FLOORS = [  # a file imports from floors below its own, and within its floor in no circle
    {"wavelets", "synthetic", "discriminators", "optimizers", "runtime"},
    {"model", "losses", "data", "evaluation"},
    {"variants"},
    {"checkpoint", "plan", "evaluation.models"},
    {"downstream"},
    {"train", "eval", "analyze", "export", "latents", "examples",
     "experiments"},
    {"bench"},
]
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
         for folder in (".", "runtime", "evaluation", "variants", "downstream", "examples")
         for path in (ROOT / folder).glob("*.py")}
MODULES = {name for name in FILES if not name.endswith("__init__")}


def statements(path: Path) -> list[ast.stmt]:
    return [node for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))]


def imports(path: Path) -> set[str]:
    """Modules of this repository that a file imports."""
    names = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES


def floor(module: str) -> int:
    """The floor of the file if it is named, else that of its folder."""
    floors = {name: i for i, names in enumerate(FLOORS) for name in names}
    return floors.get(module, floors.get(module.split(".")[0]))


def test_floors():
    """Imports lead down or stay on a floor, in no circle; the core never imports variants."""
    graph = {name: imports(FILES[name]) for name in MODULES}
    for name, others in graph.items():
        assert all(floor(other) <= floor(name) for other in others), (name, others)
        assert floor(name) > 5 or not any(floor(other) >= 5 for other in others), "only bench may"
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)    # CycleError on a circle


def test_no_import_is_deferred():
    """All imports stand at the top of a file, those of an optional package in a try statement."""
    for name, path in FILES.items():
        body = ast.parse(path.read_text()).body
        body += [node for tried in body if isinstance(tried, ast.Try)
                 if ast.unparse(tried.handlers[0].type) == "ImportError" for node in tried.body]
        top = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert len(top) == len(statements(path)), name


def test_every_file_has_a_docstring():
    """The first line says what a file holds; a folder's __init__ has its definition and nothing else."""
    for name, path in FILES.items():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), name
        assert not name.endswith("__init__") or len(tree.body) == 1, name


def test_every_fault_of_the_peers_has_a_test():
    """Each of the 21 faults of docs/faults.md has one or more tests test_fault_<number>_..."""
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    numbers = {int(n) for name in re.findall(r"^def test_fault((?:_\d\d)+)_", text, re.M)
               for n in name.split("_")[1:]}
    assert numbers == set(range(1, 22))


def test_docs_are_true():
    """The file map is whole, links lead somewhere, recipes are described, the sizes are those printed."""
    docs = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    for path, text in docs.items():
        for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
            assert (path.parent / link).exists(), (path, link)
    readme = docs[ROOT / "README.md"]
    assert {path.name for path in ROOT.glob("*.py")} <= set(re.findall(r"\]\(([\w./-]+)\)", readme))
    assert sizes.table() in docs[ROOT / "docs/sizes.md"]
    for path in ROOT.glob("recipes/**/*.args"):
        name = path.relative_to(ROOT / "recipes").with_suffix("")
        assert f"`{name}`" in docs[ROOT / "docs/recipes.md"], name
