"""Writing a build: rows to Parquet by split, with manifest and card, whole or not at all."""

import glob
import importlib.metadata
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from .card import BUILD_TAG, BuildReport, Note, Origin, dataset_card
from .format import _PLAIN_COLUMNS, FEATURES, FORMAT_VERSION, RowKey, _content, _row_key, _row_sha256
from .splits import SPLITS, split_of

SHARD_BYTES = 500_000_000
ROW_GROUP_ROWS = 100  # as `datasets` writes images: small groups keep random access and streaming cheap
LIBRARIES = ("datasets", "numpy", "pillow", "pyarrow", "pydicom", "pylidc", "scipy")  # that may change a build


class NoRows(UserError):
    """A build without a single row."""


def write_dataset(
    rows: Iterable[dict], output: str | os.PathLike[str], origin: Origin | str, notes: Sequence[Note] = ()
) -> BuildReport:
    """Write rows as Parquet by split with a manifest and a dataset card, all or nothing.

    Rows in which no reader drew are dropped and counted. The files depend on the set of rows only, not on their
    order: rows are sorted by patient, nodule and slice. Rows go through a temporary file, so memory stays small.

    Args:
        rows: as `image_row` makes them.
        output: directory to make. An earlier build in it is replaced; any other content is refused.
        origin: what the source states about its rows, for the card. A paragraph of Markdown alone says where the
            pixels come from and nothing else: the card then gives no licence.
        notes: what the source left out; read after the last row, so a source may append to it as it goes.

    Raises:
        NoRows: no row at all.
        UserError: `output` holds something else, two rows with the same identity.
    """
    output = Path(output).resolve()
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    report = BuildReport()
    with _temporary_sibling(output) as temporary:
        spool = temporary / "spool.arrow"
        digests = _spool_rows(rows, spool, report)
        report.add_notes(notes)
        if not digests:
            raise NoRows(f"{output}: nothing to write, the source has no slice that a reader drew on")
        (temporary / "data").mkdir()
        with pa.memory_map(str(spool)) as source:
            table = pa.ipc.open_file(source).read_all()
            positions = sorted((key, position) for position, key in enumerate(digests))
            for split in report.splits:
                order = [position for key, position in positions if split_of(key[0]) == split]
                _write_split(table, order, temporary / "data", split)
            del table
        spool.unlink()
        manifest = json.dumps(_manifest(report, digests), indent=1) + "\n"
        (temporary / "manifest.json").write_text(manifest, encoding="utf-8")
        card = dataset_card(report, Origin(origin) if isinstance(origin, str) else origin, notes)
        (temporary / "README.md").write_text(str(card), encoding="utf-8")
        _replace_directory(temporary, output)
    return report


def _manifest(report: BuildReport, digests: Mapping[RowKey, bytes]) -> dict[str, Any]:
    by_split = {
        split: {key: digest for key, digest in digests.items() if split_of(key[0]) == split} for split in report.splits
    }
    distributions = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    return {
        "format": FORMAT_VERSION,
        "sources": report.sources,
        "splits": {split: _content(rows) for split, rows in by_split.items()},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES if name in distributions},
    }


def _spool_rows(rows: Iterable[dict], path: Path, report: BuildReport) -> dict[RowKey, bytes]:
    """Write rows in the order they come and return the hash of each in this order."""
    digests: dict[RowKey, bytes] = {}
    with pa.ipc.new_file(str(path), FEATURES.arrow_schema) as writer:
        for batch in _batched((row for row in rows if report.add(row)), ROW_GROUP_ROWS):
            record = pa.RecordBatch.from_pylist(batch, schema=FEATURES.arrow_schema)
            # Columns as they will be read, so that a row has the same hash before and after
            for row, columns in zip(batch, record.select(_PLAIN_COLUMNS).to_pylist(), strict=True):
                key = _row_key(columns)
                if key in digests:
                    raise UserError(f"{key[0]} nodule {key[1]} slice {key[2]}: two rows with this identity")
                digests[key] = _row_sha256(columns, row["pixels_sha256"])
            writer.write_batch(record)
    return digests


def _batched(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    batch: list[dict] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_split(table: pa.Table, order: list[int], directory: Path, split: str) -> None:
    num_shards = max(1, math.ceil(table.nbytes * len(order) / len(table) / SHARD_BYTES))
    for shard, positions in enumerate(np.array_split(np.array(order), num_shards)):
        path = directory / f"{split}-{shard:05d}-of-{num_shards:05d}.parquet"
        with pq.ParquetWriter(path, table.schema, compression="snappy", write_page_index=True) as writer:
            for start in range(0, len(positions), ROW_GROUP_ROWS):
                writer.write_table(table.take(pa.array(positions[start : start + ROW_GROUP_ROWS])))


def check_output(output: Path) -> None:
    """Refuse to replace anything that is not a build of ours.

    Raises:
        UserError: `output` is a file, or a directory with other content.
    """
    if not output.exists():
        return
    accepted = "accepted: a new or empty directory, or an earlier build"
    if not output.is_dir():
        raise UserError(f"{output}: is a file; {accepted}")
    names = sorted(path.name for path in output.iterdir())
    if not names:
        return
    card, data = output / "README.md", output / "data"
    ours = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}-of-\d{{5}}\.parquet")
    is_build = (
        [name for name in names if name != "manifest.json"] == ["README.md", "data"]
        and card.is_file()
        and f"- {BUILD_TAG}\n" in card.read_text(encoding="utf-8", errors="replace")
        and data.is_dir()
        and all(ours.fullmatch(path.name) for path in data.iterdir())
    )
    if not is_build:
        raise UserError(f"{output}: is not empty and holds other files than a build; {accepted}")


@contextmanager
def _temporary_sibling(output: Path) -> Iterator[Path]:
    prefix = f".{output.name}.build-"
    for path in output.parent.glob(f"{glob.escape(prefix)}*"):  # of builds of this output that were killed
        shutil.rmtree(path, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_directory(new: Path, output: Path) -> None:
    """Move `new` to `output`; an earlier build leaves only when the new one is complete."""
    if output.exists() and any(output.iterdir()):
        old = new.with_name(new.name + "-old")
        os.replace(output, old)
        os.replace(new, output)
        shutil.rmtree(old)
    else:
        os.replace(new, output)
