"""Content-addressed blobs: what is read is what was put, or an error."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from cloister_server.blobs import Blobs
from cloister_shared.encoding import digest
from cloister_shared.errors import StateError, VerificationError
from hypothesis import given
from hypothesis import strategies as st

from support.server_calm import calm


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    """An empty folder of blobs."""
    return Blobs(tmp_path / "blobs")


def files(blobs: Blobs) -> list[Path]:
    """Every file below the folder."""
    return sorted(p for p in blobs.root.rglob("*") if not p.is_dir())


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000])
def test_put_then_get(blobs: Blobs, data: bytes) -> None:
    name = blobs.put(data)
    assert name == digest(data)
    assert blobs.get(name) == data
    assert files(blobs) == [blobs.path(name)]
    assert blobs.path(name).stat().st_mode & 0o777 == 0o600


def test_putting_twice_changes_nothing(blobs: Blobs) -> None:
    name = blobs.put(b"same")
    before = blobs.path(name).stat()
    assert blobs.put(b"same") == name
    after = blobs.path(name).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert len(files(blobs)) == 1


@pytest.mark.parametrize("at", [0, 500, 999])
def test_a_flipped_bit_is_found(blobs: Blobs, at: int) -> None:
    name = blobs.put(bytes(1000))
    data = bytearray(blobs.path(name).read_bytes())
    data[at] ^= 1
    blobs.path(name).write_bytes(data)
    with pytest.raises(VerificationError, match="changed"):
        blobs.get(name)


@pytest.mark.parametrize("change", [b"", b"12345678", b"123456789x"])
def test_a_cut_or_longer_blob_is_found(blobs: Blobs, change: bytes) -> None:
    name = blobs.put(b"123456789")
    blobs.path(name).write_bytes(change)
    with pytest.raises(VerificationError, match="changed"):
        blobs.get(name)


def test_a_missing_blob_is_named(blobs: Blobs) -> None:
    name = digest(b"never put")
    with pytest.raises(VerificationError, match="missing") as caught:
        blobs.get(name)
    assert name in caught.value.where


def test_a_link_to_other_content_is_found(blobs: Blobs, tmp_path: Path) -> None:
    name = blobs.put(b"adapter")
    (tmp_path / "other").write_bytes(b"something else")
    blobs.path(name).unlink()
    blobs.path(name).symlink_to(tmp_path / "other")
    with pytest.raises(VerificationError, match="changed"):
        blobs.get(name)
    blobs.path(name).unlink()
    blobs.path(name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(VerificationError, match="missing"):
        blobs.get(name)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "../" * 20 + "etc/passwd",
        "/etc/passwd",
        "",
        "ab",
        "ab" * 31,
        "ab" * 33,
        "AB" * 32,
        "ab" * 31 + "\n",
        "ab" * 32 + "\n",
        "../" + "ab" * 30 + "a",
        "ab" * 31 + "/.",
        "gg" * 32,
        "\x00" * 64,
    ],
)
def test_only_digests_are_names(blobs: Blobs, name: str) -> None:
    for call in (blobs.path, blobs.get):
        with pytest.raises(VerificationError, match="not a digest"):
            call(name)


@given(st.text(max_size=70).filter(lambda s: len(s) != 64))
@calm()
def test_no_other_text_is_a_name(name: str) -> None:
    blobs = Blobs.__new__(Blobs)
    blobs.root = Path("/nowhere")
    with pytest.raises(VerificationError, match="not a digest"):
        blobs.path(name)


def test_a_refused_write_leaves_nothing(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateError, match="cannot write"):
        blobs.put(b"too much")
    assert files(blobs) == []


def test_many_writers_of_one_blob(blobs: Blobs) -> None:
    data, start, names = b"same" * 10000, threading.Barrier(8), list[str]()

    def put() -> None:
        start.wait()
        names.append(blobs.put(data))

    threads = [threading.Thread(target=put) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == [digest(data)] * 8
    assert files(blobs) == [blobs.path(names[0])]
    assert blobs.get(names[0]) == data
