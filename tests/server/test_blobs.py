"""Content-addressed blobs: what is read is what was put, or an error."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from cloister_server.blobs import Blobs, checked_place
from cloister_shared.encoding import digest
from cloister_shared.errors import InputError, StateError, VerificationError
from fsspec.core import url_to_fs
from hypothesis import given
from hypothesis import strategies as st

from support.server_calm import calm


class Place:
    """A place for blobs, seen from behind.

    Args:
        url: Where it is.
    """

    def __init__(self, url: str) -> None:
        self.blobs = Blobs(url)
        self.files, self.root = url_to_fs(url)

    def all(self) -> list[str]:
        """Addresses of everything that is there."""
        return sorted(self.files.find(self.root)) if self.files.exists(self.root) else []

    def write(self, name: str, data: bytes) -> None:
        """Puts other bytes under a blob's name."""
        self.files.pipe_file(self.blobs.address(name), data)


@pytest.fixture
def folder(tmp_path: Path) -> Blobs:
    """An empty folder of blobs."""
    return Blobs(f"file://{tmp_path / 'blobs'}")


# A real object store, for example s3://bucket/prefix with its driver's own settings in the environment.
GIVEN = os.environ.get("CLOISTER_TEST_OBJECT_STORE", "")


@pytest.fixture(params=["file", "memory", *(["given"] if GIVEN else [])])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place for blobs: a folder, or an object store (fsspec's own, in memory; the one that is given)."""
    if request.param == "given":
        return Place(f"{GIVEN}/{os.urandom(8).hex()}")
    return Place(f"{request.param}://{tmp_path / 'blobs'}")


def files(blobs: Blobs) -> list[Path]:
    """Every file below the folder."""
    return sorted(p for p in Path(blobs.place.removeprefix("file://")).rglob("*") if not p.is_dir())


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000])
def test_put_then_get(place: Place, data: bytes) -> None:
    name = place.blobs.put(data)
    assert name == digest(data)
    assert place.blobs.get(name) == data
    assert place.blobs.size(name) == len(data)
    assert place.all() == [place.blobs.address(name)]
    assert [(b.name, b.bytes) for b in place.blobs.stored()] == [(name, len(data))]


def test_only_its_owner_reads_a_blob(folder: Blobs) -> None:
    assert Path(folder.address(folder.put(b"adapter"))).stat().st_mode & 0o777 == 0o600


def test_putting_twice_writes_once_and_makes_young_again(folder: Blobs) -> None:
    path = Path(folder.address(folder.put(b"same")))
    before = path.stat()
    os.utime(path, (1.0, 1.0))
    folder.put(b"same")
    after = path.stat()
    assert before.st_ino == after.st_ino
    assert after.st_mtime > 1.0
    assert len(files(folder)) == 1


def test_putting_mends_a_blob_that_was_damaged(place: Place) -> None:
    name = place.blobs.put(b"whole")
    place.write(name, b"hole")
    assert place.blobs.put(b"whole") == name
    assert place.blobs.get(name) == b"whole"


def test_what_is_deleted_is_gone_and_deleting_it_again_is_no_error(place: Place) -> None:
    name, other = place.blobs.put(b"one"), place.blobs.put(b"other")
    for _ in range(2):
        place.blobs.delete(name)
    assert place.blobs.size(name) is None
    with pytest.raises(VerificationError, match="missing"):
        place.blobs.get(name)
    assert [b.name for b in place.blobs.stored()] == [other]


def test_ages_are_told_and_other_files_are_not_blobs(place: Place) -> None:
    name = place.blobs.put(b"one")
    place.files.pipe_file(f"{place.root}/{name[:2]}/.{name}.tmp", b"half")
    (found,) = place.blobs.stored()
    assert found.modified is not None
    assert abs(found.modified - time.time()) < 3600


@pytest.mark.parametrize("at", [0, 500, 999])
def test_a_flipped_bit_is_found(place: Place, at: int) -> None:
    name = place.blobs.put(bytes(1000))
    data = bytearray(1000)
    data[at] ^= 1
    place.write(name, bytes(data))
    with pytest.raises(VerificationError, match="changed"):
        place.blobs.get(name)


@pytest.mark.parametrize("change", [b"", b"12345678", b"123456789x"])
def test_a_cut_or_longer_blob_is_found(place: Place, change: bytes) -> None:
    name = place.blobs.put(b"123456789")
    place.write(name, change)
    with pytest.raises(VerificationError, match="changed"):
        place.blobs.get(name)


def test_a_missing_blob_is_named(place: Place) -> None:
    name = digest(b"never put")
    with pytest.raises(VerificationError, match="missing") as caught:
        place.blobs.get(name)
    assert name in caught.value.where


def test_a_link_to_other_content_is_found(folder: Blobs, tmp_path: Path) -> None:
    name = folder.put(b"adapter")
    (tmp_path / "other").write_bytes(b"something else")
    Path(folder.address(name)).unlink()
    Path(folder.address(name)).symlink_to(tmp_path / "other")
    with pytest.raises(VerificationError, match="changed"):
        folder.get(name)
    Path(folder.address(name)).unlink()
    Path(folder.address(name)).symlink_to(tmp_path / "nowhere")
    with pytest.raises(VerificationError, match="missing"):
        folder.get(name)


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
def test_only_digests_are_names(folder: Blobs, name: str) -> None:
    for call in (folder.address, folder.get):
        with pytest.raises(VerificationError, match="not a digest"):
            call(name)


@given(st.text(max_size=70).filter(lambda s: len(s) != 64))
@calm()
def test_no_other_text_is_a_name(name: str) -> None:
    with pytest.raises(VerificationError, match="not a digest"):
        Blobs("memory://nowhere").address(name)


@pytest.mark.parametrize(
    "url",
    [
        "/a/folder",
        "http://host/blobs",
        "ftp://host/blobs",
        "simplecache::s3://bucket",
        "s3://key:secret@bucket/blobs",
        "s3://bucket/blobs?secret=x",
        "s3://user%3Asecret@bucket/blobs",
        "s3://AKIASECRET@bucket/blobs",
        "s3://bucket/blobs#secret=1",
        "s3://[bad",
    ],
)
def test_plain_transport_and_credentials_are_no_place_for_blobs(url: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_place(url, "test")
    assert "secret" not in str(caught.value)


def test_a_place_without_its_driver_says_so() -> None:
    with pytest.raises(InputError, match="needs a driver"):
        Blobs("gs://bucket/blobs")


def test_a_refused_write_leaves_nothing(folder: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateError, match="cannot write"):
        folder.put(b"too much")
    assert files(folder) == []


def test_many_writers_of_one_blob(folder: Blobs) -> None:
    data, start, names = b"same" * 10000, threading.Barrier(8), list[str]()

    def put() -> None:
        start.wait()
        names.append(folder.put(data))

    threads = [threading.Thread(target=put) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == [digest(data)] * 8
    assert files(folder) == [Path(folder.address(names[0]))]
    assert folder.get(names[0]) == data


def test_a_place_is_one_federations(place: Place) -> None:
    """Of two that share one, each would collect what only the other names."""
    name = place.blobs.put(b"adapter")
    for _ in range(2):
        place.blobs.claim("cloister/federation/one")
    with pytest.raises(StateError, match="another federation") as caught:
        place.blobs.claim("cloister/federation/two")
    assert caught.value.got == "cloister/federation/one"
    assert [blob.name for blob in place.blobs.stored()] == [name]
