"""Run: python -m pytest tests/runtime/test_files.py. A file is the old or the new one, never half of it."""

import pytest

from runtime.files import whole


def test_whole(tmp_path):
    """The file has its old content until the block ends, and after an error; nothing else is left."""
    path = tmp_path / "some.txt"
    path.write_bytes(b"old")
    with whole(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyError), whole(path) as file:
        file.write(b"half")
        raise KeyError
    with pytest.raises(OSError, match=rf"^cannot write {path}: \[Errno 28\] No space left$"), whole(path):
        raise OSError(28, "No space left")
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]
    with pytest.raises(OSError, match="cannot write .*nowhere/x"), whole(tmp_path / "nowhere/x"):
        pass
