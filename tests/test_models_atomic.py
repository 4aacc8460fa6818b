import os
import stat

import pytest

from cnngru_edge.models.atomic import write_file


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "model.bin"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_stops_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    write_file(path, b"old")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_was_written(tmp_path):
    mask = os.umask(0o022)
    try:
        write_file(tmp_path / "model.bin", b"")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "model.bin").stat().st_mode) == 0o644
