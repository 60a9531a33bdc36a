"""Run: python -m pytest tests/test_imports.py. The import graph against a written table."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import model

ROOT = Path(__file__).parents[1]
GRAPH = {
    "wavelets": set(),
    "synthetic": set(),
    "spectral_norm": set(),
    "stylegan": {"wavelets"},
    "gigagan": {"spectral_norm", "stylegan", "wavelets"},
    "discriminators": {"gigagan", "spectral_norm", "stylegan"},
    "regularisers": {"wavelets"},
    "distributed": set(),
    "cli": {"distributed"},
    "data": {"synthetic"},
    "blocks": set(),
    "ablations": {"wavelets"},
    "quantize": {"wavelets"},
    "openlitevae": {"blocks", "wavelets"},
    "model": {"ablations", "blocks", "openlitevae", "quantize", "wavelets"},
    "weights": set(),
    "losses": {"wavelets", "weights"},
    "optional_losses": {"losses", "weights"},
    "fid": {"distributed"},
    "metrics": {"distributed", "fid"},
    "report": set(),
    "optimizers": {"distributed"},
    "checkpoint": {"model"},
    "foreign": {"model"},
    "train": {"checkpoint", "cli", "data", "discriminators", "distributed", "losses", "metrics", "model",
              "optimizers", "optional_losses", "quantize", "regularisers", "wavelets"},
    "eval": {"checkpoint", "cli", "data", "distributed", "fid", "foreign", "metrics", "model", "report",
             "weights"},
}


def imports(path: Path) -> set[str]:
    """Modules of this repository that a file imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return names & {file.stem for file in ROOT.glob("*.py")}


def test_import_graph():
    """Every top-level file imports what the table says and no more, in no circle; scripts are leaves."""
    graph = {path.stem: imports(path) for path in ROOT.glob("*.py")}
    assert graph == GRAPH
    assert len(list(TopologicalSorter(graph).static_order())) == len(GRAPH)   # raises CycleError on a circle
    assert not {"train", "eval"} & set().union(*graph.values())


def test_every_fault_of_the_peers_has_a_test():
    """The 21 faults found by reading other trainers; each has one or more tests test_fault_<number>_..."""
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    numbers = {int(n) for name in re.findall(r"^def test_fault((?:_\d\d)+)_", text, re.M)
               for n in name.split("_")[1:]}
    assert numbers == set(range(1, 22))


def test_readme_is_true():
    """The file map has every file, every link leads somewhere, and the table is what model.py prints."""
    readme = (ROOT / "README.md").read_text()
    links = set(re.findall(r"\]\(([\w./-]+)\)", readme))
    assert {path.name for path in ROOT.glob("*.py")} <= links
    assert all((ROOT / link).exists() for link in links)
    assert model.table() in readme
    assert all(f"`{path.stem}`" in readme for path in ROOT.glob("recipes/*.args"))
