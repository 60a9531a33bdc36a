"""Run: python -m pytest tests/test_weights.py. Where weights are looked for, and what is told of them."""

import hashlib
from pathlib import Path

import pytest
import torch
from formulas import formula_state, write_formula_file

from runtime import weights

URL = weights.URLS["squeeze"]


def test_names_and_hashes():
    """The four files by name; each name ends in the first digits of the sha256 of what was published."""
    names = {name: (weights.find(url).name, weights.hash_prefix(url)) for name, url in weights.URLS.items()}
    assert names == {
        "vgg": ("vgg16-397923af.pth", "397923af"),
        "alex": ("alexnet-owt-7be5be79.pth", "7be5be79"),
        "squeeze": ("squeezenet1_1-b8a52dc0.pth", "b8a52dc0"),
        "inception": ("pt_inception-2015-12-05-6726825d.pth", "6726825d"),
    }


def test_where_files_are_looked_for(tmp_path, monkeypatch):
    """The path given, else TORCH_HOME, else XDG_CACHE_HOME/torch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    name = "squeezenet1_1-b8a52dc0.pth"
    assert weights.find(URL) == tmp_path / "x/torch/hub/checkpoints" / name
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "t"))
    assert weights.find(URL) == tmp_path / "t/hub/checkpoints" / name
    assert weights.find(URL, "given.pth") == Path("given.pth")


def test_load_tells_path_and_hash(tmp_path, monkeypatch):
    """Convolutions without "features."; the file's own sha256, and whether its name promised it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path, expected = write_formula_file("squeeze", tmp_path), formula_state("squeeze")
    loaded = weights.load("squeeze")
    assert loaded.state.keys() == {key[9:] for key in expected if key.startswith("features.")}
    assert torch.equal(loaded.state["3.squeeze.weight"], expected["features.3.squeeze.weight"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (loaded.path, loaded.sha256, loaded.published) == (str(path), digest, False)
    monkeypatch.setitem(weights.URLS, "squeeze", f"https://host/squeezenet1_1-{digest[:8]}.pth")
    assert weights.load("squeeze", str(path)).published


def test_missing_and_damaged_files_are_one_line(tmp_path, monkeypatch):
    """A given path is never fetched; a failed fetch names the file in the cache; rubbish is refused."""
    def fail(url: str, path: str, hash_prefix: str) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "rubbish.pth").write_bytes(b"<html>404</html>")
    for file, expected in ((tmp_path / "none.pth", "No such file"), (tmp_path / "rubbish.pth", "cannot load"),
                           (None, "no route to host")):
        with pytest.raises(ValueError, match=expected) as error:
            weights.load("inception", file and str(file))
        path = file or weights.find(weights.URLS["inception"])
        assert str(path) in str(error.value) and "\n" not in str(error.value)
