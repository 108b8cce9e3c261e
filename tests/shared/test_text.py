"""Reading text: every form gives the same records, and every fault is told with file and row."""

from __future__ import annotations

import csv
import gc
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cloister_model.text import MAX_ROW_BYTES, Record, Source, read
from cloister_shared.errors import InputError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROWS = [
    {"text": "The parcel has not arrived", "label": "late", "shop": "north"},
    {"text": 'a "quoted", é 文 🙂 text\nwith two lines', "label": "damage", "shop": ""},
    {"text": " padded ", "label": "late", "shop": "x,y"},
]
RECORDS = [Record(r["text"], r["label"], (("shop", r["shop"]),)) for r in ROWS]
SUFFIXES = [".jsonl", ".csv", ".parquet", ".jsonl.gz", ".csv.gz", ".parquet.gz"]


def _bytes(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    if kind == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def _write(folder: Path, suffix: str, data: bytes) -> Path:
    path = folder / f"data{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    return path


def _make(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    return _write(folder, suffix, _bytes(suffix.removesuffix(".gz"), rows))


def _read(path: Path, label: str = "label", labels: tuple[str, ...] | None = None) -> list[Record]:
    return list(read(Source(path, "text", label), labels))


def _refused(path: Path, row: int | None, label: str = "label", labels: tuple[str, ...] | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        _read(path, label, labels)
    assert caught.value.where == (str(path) if row is None else f"{path} row {row}")
    assert caught.value.exit_code == 2
    return caught.value


# Reading a gzipped file leaves it open, which `test_gzipped_files_are_closed` shows; elsewhere the warning is not the point.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _collect(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lets a file that was left open be warned of in the test that left it."""
    yield
    if "gz" in request.node.name:
        gc.collect()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_form_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    path = _make(tmp_path, suffix, ROWS)
    assert _read(path, labels=("late", "damage")) == RECORDS
    assert [r.label for r in _read(path, label="")] == ["", "", ""]
    upper = path.rename(tmp_path / f"DATA{suffix.upper()}")
    assert _read(upper) == RECORDS


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r\n"), min_size=1).filter(str.strip),
        min_size=1,
        max_size=5,
    )
)
def test_any_text_is_read_back(tmp_path: Path, texts: list[str]) -> None:
    rows = [{"text": text, "label": "a"} for text in texts]
    for suffix in (".jsonl", ".csv", ".parquet"):
        assert [r.text for r in _read(_make(tmp_path, suffix, rows))] == texts


@pytest.mark.parametrize("whole", [True, False])
def test_gzipped_files_are_closed(tmp_path: Path, whole: bool) -> None:
    path = (
        _make(tmp_path, ".jsonl.gz", ROWS) if whole else _write(tmp_path, ".jsonl", b"").rename(tmp_path / "x.jsonl.gz")
    )
    script = """
import contextlib, sys
from pathlib import Path
from cloister_model.text import Source, read
from cloister_shared.errors import InputError
with contextlib.suppress(InputError):
    print(len(list(read(Source(Path(sys.argv[1]), "text", "")))))
"""
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", script, str(path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == ("3\n" if whole else "")
    assert "ResourceWarning" not in done.stderr


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("what", ["text", "label"])
def test_missing_field(tmp_path: Path, suffix: str, what: str) -> None:
    rows = [{"text": "a", "label": "x", "shop": "s"}]
    path = _make(tmp_path, suffix, [{k: v for k, v in rows[0].items() if k != what}])
    error = _refused(path, 2 if ".csv" in suffix else 1)
    assert f"{what} field '{what}' is missing" in error.what
    assert "shop" in error.got


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unknown_label_and_empty_text(tmp_path: Path, suffix: str) -> None:
    first = 2 if ".csv" in suffix else 1
    path = _make(tmp_path, suffix, [{"text": "a", "label": "x"}, {"text": "b", "label": "odd"}])
    error = _refused(path, first + 1, labels=("x", "y"))
    assert (error.expected, error.got) == ("one of x, y", "'odd'")
    assert len(_read(path)) == 2
    path = _make(tmp_path, suffix, [{"text": "a", "label": "x"}, {"text": " \t", "label": "x"}])
    assert "empty" in _refused(path, first + 1).what


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path, suffix, b"")
    _refused(path, None)
    if ".parquet" not in suffix:
        path = _write(tmp_path, suffix, b"text,label\n" if ".csv" in suffix else b"\n \n")
    else:
        sink = io.BytesIO()
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), sink)
        path = _write(tmp_path, suffix, sink.getvalue())
    assert "no records" in _refused(path, None).what


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_row_of_10_mb(tmp_path: Path, suffix: str) -> None:
    path = _make(tmp_path, suffix, [{"text": "short", "label": "x"}, {"text": "x" * 10_000_000, "label": "x"}])
    error = _refused(path, 3 if ".csv" in suffix else 2)
    assert "too long" in error.what
    assert len(str(error)) < 500


def test_row_limit_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    frame = len(b'{"text": "", "label": "x"}\n')
    for extra, good in ((0, True), (1, False)):
        path.write_bytes(b'{"text": "' + b"x" * (MAX_ROW_BYTES - frame + extra) + b'", "label": "x"}\n')
        if good:
            assert len(_read(path)) == 1
        else:
            _refused(path, 1)


def test_csv_takes_rows_up_to_the_limit_too(tmp_path: Path) -> None:
    path = _make(tmp_path, ".csv", [{"text": "x" * 200_000, "label": "x"}])
    assert len(_read(path)[0].text) == 200_000


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".jsonl.gz", ".csv.gz"])
def test_invalid_utf8(tmp_path: Path, suffix: str) -> None:
    csv_file = ".csv" in suffix
    data = b"text,label\ngood,x\nb\xffd,x\n" if csv_file else b'{"text":"good","label":"x"}\n{"text":"b\xffd"}\n'
    error = _refused(_write(tmp_path, suffix, data), 3 if csv_file else 2)
    assert "UTF-8" in error.what
    assert error.got == f"byte 0xff at column {2 if csv_file else 11}"


def test_invalid_utf8_in_parquet(tmp_path: Path) -> None:
    buffers = [None, pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"\xff\xfe")]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, buffers)}), path)
    with pytest.raises(InputError):
        _read(path, label="")


def test_parquet_column_that_python_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["a"], "when": pa.array([1], pa.timestamp("ns"))}), path)
    assert [r.text for r in _read(path, label="")] == ["a"]


def test_lone_surrogate(tmp_path: Path) -> None:
    path = _write(tmp_path, ".jsonl", b'{"text":"half a smile \\ud83d"}\n')
    _refused(path, 1, label="")


@pytest.mark.parametrize(
    "row",
    [
        b'{"text":"a","label":NaN}',
        b'{"text":"a","label":1.5}',
        b'{"text":"a","label":true}',
        b'{"text":"a","label":null}',
        b'{"text":"a","label":["x"]}',
        b'{"text":["a"],"label":"x"}',
        b'{"text":NaN,"label":"x"}',
        b'{"text":"a" "label":"x"}',
        b"not json",
        b"[1]",
        b'"text"',
        b"3",
        b"NaN",
        b"[" * 100_000,
        b'{"text":' + b"9" * 5000 + b"}",
        b'{"text":"a","label":"x"} {}',
    ],
)
def test_jsonl_row_of_another_form(tmp_path: Path, row: bytes) -> None:
    path = _write(tmp_path, ".jsonl", b'\n{"text":"good","label":"x"}\n' + row + b"\n")
    _refused(path, 3)


def test_parquet_label_of_another_type(tmp_path: Path) -> None:
    path = _make(tmp_path, ".parquet", [{"text": "a", "label": 1.0}, {"text": "b", "label": float("nan")}])
    assert "float" in _refused(path, 1).got
    path = _make(tmp_path, ".parquet", [{"text": "a", "label": "x"}, {"text": "b", "label": None}])
    assert "missing" in _refused(path, 2).what
    path = _make(tmp_path, ".parquet", [{"text": b"a", "label": "x"}])
    assert "bytes" in _refused(path, 1).got


def test_integer_labels_are_read_as_text(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".csv", ".parquet"):
        path = _make(tmp_path, suffix, [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
        assert [r.label for r in _read(path, labels=("0", "1"))] == ["1", "0"]


@pytest.mark.parametrize(
    ("data", "row"),
    [
        (b"text,label\na,x\nb\n", 3),
        (b"text,label\na,x\nb,x,y\n", 3),
        (b'text,label\na,x\n"b,x\n', 3),
        (b'text,label\na,x\n"b"c,x\n', 3),
        (b'text,label\n"a\nb",x\nc\n', 4),
    ],
)
def test_csv_row_of_another_form(tmp_path: Path, data: bytes, row: int) -> None:
    _refused(_write(tmp_path, ".csv", data), row)


@pytest.mark.parametrize("row", [b"b,x", b"b,x,y,z"])
def test_csv_row_with_another_number_of_columns(tmp_path: Path, row: bytes) -> None:
    """Even where only a column that nobody uses is missing: the columns may have shifted."""
    path = _write(tmp_path, ".csv", b"text,label,shop\na,x,s\n" + row + b"\n")
    assert "number of columns" in _refused(path, 3).what


def _cut(data: bytes) -> bytes:
    return gzip.compress(data)[:-9]


def _flipped(data: bytes) -> bytes:
    packed = bytearray(gzip.compress(data))
    packed[-6] ^= 1  # the CRC
    return bytes(packed)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_broken_gz(tmp_path: Path, kind: str) -> None:
    data, path = _bytes(kind, ROWS), tmp_path / f"data{kind}.gz"
    for broken in (data, gzip.compress(data)[:5], b"\x1f\x8b" + b"\xff" * 30, _cut(data), _flipped(data)):
        path.write_bytes(broken)
        with pytest.raises(InputError) as caught:
            _read(path)
        assert caught.value.where.startswith(str(path))
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_gz_that_breaks_off_says_the_row(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"row {i} {i * 7919 % 10007}", "label": "x"} for i in range(20_000)]
    path = tmp_path / f"data{kind}.gz"
    path.write_bytes(_cut(_bytes(kind, rows)))
    with pytest.raises(InputError, match="breaks off") as caught:
        _read(path)
    assert caught.value.where.startswith(f"{path} row ")


@pytest.mark.parametrize("data", [b"PAR1", b"x" * 100, b"PAR1" + b"x" * 100 + b"PAR1"])
def test_not_parquet(tmp_path: Path, data: bytes) -> None:
    assert "Parquet" in _refused(_write(tmp_path, ".parquet", data), None).what


@pytest.mark.parametrize("name", ["data.txt", "data", "data.gz", "data.jsonl.zip", "data.pkl", "jsonl"])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(_bytes(".jsonl", ROWS))
    assert "unknown kind" in _refused(tmp_path / name, None).what


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_that_cannot_be_read(tmp_path: Path, suffix: str) -> None:
    _refused(tmp_path / f"none{suffix}", None)
    (tmp_path / f"folder{suffix}").mkdir()
    _refused(tmp_path / f"folder{suffix}", None)


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = _write(tmp_path, ".jsonl", b'{"text":"a"}\nnot json\n')
    records = read(Source(path, "text", ""))
    assert next(records) == Record("a", "")
    with pytest.raises(InputError):
        next(records)
