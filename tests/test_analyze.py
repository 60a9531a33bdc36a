"""Run: python -m pytest tests/test_analyze.py. The script from outside."""

import pytest
from conftest import call, train_in


def test_table(tmp_path, capsys):
    """A row per layer of a checkpoint's decoder; raw and averaged weights differ."""
    run = train_in(tmp_path, "--lr 1e-3")
    tables = []
    for flags in ("", "--raw"):
        capsys.readouterr()
        call("analyze", tmp_path, f"{run.folder}/ckpt.pt --data synthetic --res 32 --count 2 {flags}")
        tables.append(capsys.readouterr().out)
    assert [len(text.splitlines()) for text in tables] == [16, 16] and tables[0] != tables[1]
    assert tables[0].split()[:4] == ["name", "feature", "largest", "branch"]


@pytest.mark.parametrize("flags, line", [
    ("nowhere.pt --data synthetic", "no checkpoint at nowhere.pt"),
    ("--data nowhere", "'nowhere' not found"),
    ("--data synthetic --count 0", "must be at least 1, got 0"),
    ("--data synthetic --preset tiny", "invalid choice: 'tiny'"),
])
def test_wrong_input(refused, flags, line):
    """One line with the value received."""
    assert line in refused("analyze", flags)
