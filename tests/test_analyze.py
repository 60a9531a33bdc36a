"""Run: python -m pytest tests/test_analyze.py. The script from outside."""

import pytest
from conftest import call, train_in, write_images


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


def test_broken_images_are_left_out(tmp_path, capsys, refused):
    """A file that is cut short is left out; if no file can be read, the first is named. Grey models work."""
    run = train_in(tmp_path, "--in-channels 1 --steps 1")
    folder = write_images(tmp_path / "some", ["0.png", "1.png"], side=32)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:500])
    capsys.readouterr()
    call("analyze", tmp_path, f"{run.folder}/ckpt.pt --data {folder} --res 32")
    assert len(capsys.readouterr().out.splitlines()) == 16
    assert "some/1.png" in refused("analyze", f"--data {folder}/1.png")


@pytest.mark.parametrize("flags, line", [
    ("nowhere.pt --data synthetic", "no checkpoint at nowhere.pt"),
    ("--data nowhere", "'nowhere' not found"),
    ("--data synthetic --count 0", "must be at least 1, got 0"),
    ("--data synthetic --preset tiny", "invalid choice: 'tiny'"),
])
def test_wrong_input(refused, flags, line):
    """One line with the value received."""
    assert line in refused("analyze", flags)
