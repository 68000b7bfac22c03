import errno

import pytest

from fastvae.files import replace_atomically


def test_replace_writes_the_content(tmp_path):
    replace_atomically(tmp_path / "a", lambda file: file.write(b"old"))
    replace_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos")])
def test_full_disk_leaves_the_previous_file(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")

    def fill_disk(file):
        file.write(b"half of the n")
        raise error

    with pytest.raises(OSError, match="previous file, if any, is intact"):
        replace_atomically(tmp_path / "a", fill_disk)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_new_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    import fastvae.files as module

    calls = []
    real = {"fsync": module.os.fsync, "replace": module.os.replace}
    for name, function in real.items():
        monkeypatch.setattr(module.os, name, lambda *args, n=name, f=function: (calls.append(n), f(*args)))
    replace_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert calls[:2] == ["fsync", "replace"]
