"""Reading text: JSONL, CSV or Parquet, plain or gzipped, one record at a time, with file and row in every error.

Limits stand before memory is taken: a row of at most 1 MiB, a file of at most 10 million rows. Errors name the file and the
row and, being shown to the data owner alone, the offending label; they never travel to a peer.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cloister_shared.errors import InputError

MAX_ROW_BYTES = 1 << 20
MAX_ROWS = 10_000_000
_FORMATS = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """Where text lies.

    Attributes:
        path: The file.
        text: Name of the text's field.
        label: Name of the label's field; empty for tasks without.
        unit: Name of the field whose value makes a privacy unit; empty where each record is one.
    """

    path: Path
    text: str
    label: str
    unit: str = ""


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        text: Its text, not empty.
        label: Its label, empty where the task has none.
        extra: The other fields, as text.
        unit: Value of the unit's field, not empty where the source names one.
    """

    text: str
    label: str
    extra: tuple[tuple[str, str], ...] = ()
    unit: str = ""


def _fail(what: str, path: Path, row: int | None, expected: str = "", got: str = "", mend: str = "") -> InputError:
    return InputError(
        what, where=f"{path} row {row}" if row is not None else str(path), expected=expected, got=got, mend=mend
    )


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    for suffix in _FORMATS:
        if name.endswith(suffix):
            return suffix
    raise _fail("unknown kind of file", path, None, ", ".join(f"{s}[.gz]" for s in _FORMATS), path.name)


def _open(path: Path) -> IO[bytes]:
    try:
        # GzipFile closes only a file that it opened by name.
        plain = not path.name.lower().endswith(".gz")
        handle = path.open("rb") if plain else io.BufferedReader(gzip.GzipFile(str(path), "rb"))
    except OSError as error:
        raise _fail("cannot read the file", path, None, got=error.strerror or str(error)) from error
    try:
        handle.peek(1)
    except (OSError, EOFError, zlib.error) as error:
        handle.close()
        raise _fail("cannot read the file", path, None, got=getattr(error, "strerror", None) or str(error)) from error
    return handle


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _open(path) as handle:
        number = 0
        while True:
            try:
                line = handle.readline(MAX_ROW_BYTES + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise _fail("the file breaks off", path, number + 1, "a whole file", str(error)) from error
            if not line:
                return
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise _fail(
                    "row too long",
                    path,
                    number,
                    f"<= {MAX_ROW_BYTES} bytes",
                    f"> {MAX_ROW_BYTES} bytes",
                    "cut or remove the row",
                )
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _fail(
                    "row is not UTF-8",
                    path,
                    number,
                    "UTF-8",
                    f"byte 0x{line[error.start]:02x} at column {error.start + 1}",
                ) from error


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate can be read and is no text
        except (ValueError, RecursionError) as error:
            raise _fail("row is not JSON", path, number, "one JSON object", str(error)) from error
        if not isinstance(value, dict):
            raise _fail("row is not a record", path, number, "one JSON object", type(value).__name__)
        yield number, value


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    at = 0

    def text_lines() -> Iterator[str]:
        nonlocal at
        for at, line in _lines(path):  # noqa: B007
            yield line

    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.DictReader(text_lines(), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise _fail("row has another number of columns", path, at, f"{len(reader.fieldnames or ())} columns")
            yield at, row
    except csv.Error as error:
        raise _fail("row is not CSV", path, at, got=str(error)) from error


def _parquet(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(path) as handle:
            source: Any = io.BytesIO(handle.read()) if path.name.lower().endswith(".gz") else str(path)
        table = pq.ParquetFile(source)
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_dictionary)
        found = table.schema_arrow
        columns = [f.name for f in found if f.name in wanted or any(is_kind(f.type) for is_kind in kinds)]
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except UnicodeDecodeError as error:
        raise _fail("row is not UTF-8", path, number + 1, "UTF-8", f"byte 0x{error.object[error.start]:02x}") from error
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise _fail("not a Parquet file", path, None, got=str(error).splitlines()[0][:120]) from error


def _field(row: dict[str, Any], name: str, what: str, path: Path, number: int) -> str:
    if name not in row or row[name] is None:
        raise _fail(
            f"{what} field {name!r} is missing",
            path,
            number,
            f"field {name!r}",
            f"fields {', '.join(sorted(map(str, row)))[:200] or 'none'}",
        )
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _fail(f"{what} field {name!r} is not text", path, number, "text", type(value).__name__)
    return str(value)


def _record(source: Source, labels: tuple[str, ...] | None, row: dict[str, Any], number: int) -> Record:
    text = _field(row, source.text, "text", source.path, number)
    if not text.strip():
        raise _fail("text is empty", source.path, number, "some text", "none", "remove the row")
    if len(text.encode()) > MAX_ROW_BYTES:
        raise _fail(
            "row too long",
            source.path,
            number,
            f"<= {MAX_ROW_BYTES} bytes",
            f"{len(text.encode())} bytes",
            "cut or remove the row",
        )
    label = _field(row, source.label, "label", source.path, number) if source.label else ""
    if labels is not None and source.label and label not in labels:
        raise _fail("unknown label", source.path, number, f"one of {', '.join(labels)}"[:300], repr(label)[:80])
    unit = _field(row, source.unit, "unit", source.path, number) if source.unit else ""
    if source.unit and not unit.strip():
        raise _fail("unit is empty", source.path, number, f"a value in field {source.unit!r}", "none")
    extra = tuple(
        (str(k), str(v))
        for k, v in row.items()
        if k not in (source.text, source.label, source.unit) and isinstance(v, str | int)
    )
    return Record(text, label, extra, unit)


def read(
    source: Source, labels: tuple[str, ...] | None = None, odd: Callable[[InputError], None] | None = None
) -> Iterator[Record]:
    """Reads every record of ``source``, in order.

    Args:
        source: File and fields.
        labels: The labels that may occur; None for any.
        odd: Called with what is wrong with a row that is no record, which is left out; None to raise it, and where there is no record.

    Raises:
        InputError: The file or a row is not as it must be; a file without records is an error too.
    """
    kind = _kind(source.path)
    rows = (
        {".jsonl": _jsonl, ".csv": _csv}[kind](source.path)
        if kind != ".parquet"
        else _parquet(source.path, (source.text, source.label, source.unit))
    )
    count = 0
    for number, row in rows:
        try:
            record = _record(source, labels, row, number)
        except InputError as error:
            if odd is None:
                raise
            odd(error)
            continue
        count += 1
        if count > MAX_ROWS:
            raise _fail("too many rows", source.path, number, f"<= {MAX_ROWS}")
        yield record
    if not count and odd is None:
        raise _fail("the file holds no records", source.path, None, "at least one record", "none")
