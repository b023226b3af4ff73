"""Write a dataset: Parquet files for each split, a manifest and a dataset card, completely or not at all."""

import importlib.metadata
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import is_ignored, replaced_directory, write_json
from .card import BUILD_TAG, BuildReport, Note, Origin, dataset_card
from .format import FEATURES, FORMAT_VERSION, PLAIN_COLUMNS, RowKey, content_of, row_key, row_sha256
from .splits import SPLITS

BUILD_FILES = ("README.md", "data", "manifest.json")
SHARD_BYTES = 500_000_000
ROW_GROUP_ROWS = 100  # as `datasets` writes images: small groups keep random access and streaming cheap
LIBRARIES = ("datasets", "numpy", "pillow", "pyarrow", "pydicom", "pylidc", "scipy")  # that may change a build


class NoRows(UserError):
    """The source has no row to write."""


def write_dataset(
    rows: Iterable[dict], output: str | os.PathLike[str], origin: Origin | str, notes: Sequence[Note] = ()
) -> BuildReport:
    """Write rows as Parquet files by split, with a manifest and a dataset card.

    Rows that no reader annotated are dropped and counted. Rows are sorted by patient, nodule and slice, so the files
    do not depend on the order in which the source yields them. They are spooled to a temporary file, so memory stays
    small.

    Args:
        rows: as returned by `image_row`.
        output: directory to write. An earlier build is replaced; a directory with any other content is refused.
        origin: what the source states about its rows, for the card. A string is the text of an origin without a
            licence.
        notes: what the source left out. They are read after the last row, so the source may append to them.

    Raises:
        NoRows: no reader annotated any row, or there are no rows.
        UserError: `output` has other content or cannot be written, or two rows have the same identity.
    """
    output = Path(output)
    check_output(output)
    report = BuildReport(Origin(origin) if isinstance(origin, str) else origin)
    with replaced_directory(output, BUILD_FILES) as folder:
        spool = folder / "spool.arrow"
        digests = _spool_rows(rows, spool, report)
        report.add_notes(notes)
        if not digests:
            raise NoRows(
                f"{output}: nothing to write, the source has no {report.origin.rows[:-1]} that a reader annotated"
            )
        (folder / "data").mkdir()
        with pa.memory_map(str(spool)) as source:
            table = pa.ipc.open_file(source).read_all()
            positions = sorted((key, position) for position, key in enumerate(digests))
            for split in report.splits:
                order = [position for key, position in positions if report.origin.split_of(key[0]) == split]
                _write_split(table, order, folder / "data", split)
            del table
        spool.unlink()
        write_json(folder / "manifest.json", _manifest(report, digests))
        (folder / "README.md").write_text(f"{dataset_card(report, notes)}\n", encoding="utf-8")
    return report


def check_output(output: Path) -> None:
    """Refuse to replace anything but an earlier build.

    Raises:
        UserError: `output` is a file, or a directory with other content.
    """
    if not output.exists():
        return
    accepted = "accepted: a new or empty directory, or an earlier build"
    if not output.is_dir():
        raise UserError(f"{output}: is a file; {accepted}")
    names = {path.name for path in output.iterdir() if not is_ignored(path)}
    if not names:
        return
    card, data = output / "README.md", output / "data"
    shard = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}-of-\d{{5}}\.parquet")
    is_build = (
        names | {"manifest.json"} == set(BUILD_FILES)
        and card.is_file()
        and f"- {BUILD_TAG}\n" in card.read_text(encoding="utf-8", errors="replace")
        and data.is_dir()
        and all(shard.fullmatch(path.name) for path in data.iterdir())
    )
    if not is_build:
        raise UserError(f"{output}: is not empty and holds other files than a build; {accepted}")


def _spool_rows(rows: Iterable[dict], path: Path, report: BuildReport) -> dict[RowKey, bytes]:
    """Write rows to a file in the order they come; returns the hash of each, in the same order."""
    digests: dict[RowKey, bytes] = {}
    with pa.ipc.new_file(str(path), FEATURES.arrow_schema) as writer:
        for batch in _batched((row for row in rows if report.add(row)), lambda row: len(row["image"]["bytes"])):
            record = pa.RecordBatch.from_pylist(batch, schema=FEATURES.arrow_schema)
            # Hash the columns as they will be read back, so that a written row has the same hash
            for row, columns in zip(batch, record.select(PLAIN_COLUMNS).to_pylist(), strict=True):
                key = row_key(columns)
                if key in digests:
                    place = f"nodule {key[1]} slice {key[2]}" if not key[3] else f"image {key[3]}"
                    raise UserError(f"{key[0]} {place}: two rows with this identity")
                digests[key] = row_sha256(columns, row["pixels_sha256"])
            writer.write_batch(record)
    return digests


def _batched(rows: Iterable[Any], size_of: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Rows in groups of at most `ROW_GROUP_ROWS` and, but for the last row of a group, `SHARD_BYTES`."""
    batch: list[Any] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += size_of(row)
        if len(batch) == ROW_GROUP_ROWS or size >= SHARD_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_split(table: pa.Table, order: list[int], directory: Path, split: str) -> None:
    num_shards = max(1, math.ceil(table.nbytes * len(order) / len(table) / SHARD_BYTES))
    for shard, positions in enumerate(np.array_split(np.array(order), num_shards)):
        path = directory / f"{split}-{shard:05d}-of-{num_shards:05d}.parquet"
        with pq.ParquetWriter(path, table.schema, compression="snappy", write_page_index=True) as writer:
            # Not `take`, which fails for tables of more than 2 GiB, as a single row group would
            for rows in _batched((table.slice(position, 1) for position in positions), lambda row: row.nbytes):
                writer.write_table(pa.concat_tables(rows).combine_chunks())


def _manifest(report: BuildReport, digests: Mapping[RowKey, bytes]) -> dict[str, Any]:
    split_of = report.origin.split_of
    by_split = {split: [item for item in digests.items() if split_of(item[0][0]) == split] for split in report.splits}
    distributions = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    return {
        "format": FORMAT_VERSION,
        "sources": report.sources,
        "truth": report.origin.truth,
        "splits": {split: content_of(rows) for split, rows in by_split.items()},
        **(
            {"rebuilt": {split: dict(sorted(report.rebuilt[split].items())) for split in report.splits}}
            if report.rebuilt
            else {}
        ),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES if name in distributions},
    }
