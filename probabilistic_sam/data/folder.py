"""Source `folder`: your own images or scans with the masks of several readers, as files in folders.

    DIR/images/ID.EXT           PNG, TIFF, JPEG or DICOM; grey (8 or 16 bit) or RGB (8 bit); up to 64 million pixels;
                                or NIfTI with one slice
    DIR/masks/READER/ID.png     or ID.tif: one folder per reader; 1 bit, or values 0/1 or 0/255; NIfTI of a NIfTI image
    DIR/table.csv               optional: columns id and any of group, spacing_mm, split

or, with scans in place of images, of which each annotated axial slice becomes a row:

    DIR/scans/ID.nii.gz         or ID.nii, or a DICOM series as ID.zip or folder ID, or a multi-frame ID.dcm
    DIR/masks/READER/ID.nii.gz  or ID.nii, with the voxels of the scan; values 0/1 or 0/255
    DIR/table.csv               optional: columns id and any of group, split

ID is a file's name without its suffix. A reader without a file for an image is absent: they did not look at it. A
mask without pixels is that of a reader who looked and annotated nothing. Hidden files are ignored.
"""

import csv
import importlib.util
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import scipy.ndimage

from ..dicom_slice import read_dicom
from ..errors import UserError
from ..images import NIFTI, is_nifti
from ..processing_image_files import MAX_PIXELS, open_image
from .card import Note, Origin
from .format import ACCEPTED_MASK, HU_OFFSET, binary_mask, encode_png, image_row
from .splits import SPLITS

LAYOUT = (
    "accepted: images/ID.EXT and masks/READER/ID.png (or .tif; .nii.gz of NIfTI), or scans/ID.nii.gz and "
    "masks/READER/ID.nii.gz, and optionally table.csv"
)
NIFTI_VALUES = (
    "Grey values are those of the file, plus 1024 or more where some are negative, or stretched to 16 bits where they "
    "have fractions."
)
DICOM_SUFFIXES = (".dcm", ".dicom")
MASK_SUFFIXES = (".png", ".tif", ".tiff")
IMAGE_SUFFIXES = (*MASK_SUFFIXES, ".jpg", ".jpeg", *DICOM_SUFFIXES, *NIFTI)
SCAN_SUFFIXES = (*NIFTI, ".zip", *DICOM_SUFFIXES)
TABLE_COLUMNS = ("id", "group", "spacing_mm", "split")
OBJECTS = ("image", "components")
NEEDED_SPLITS = ("train", "validation")
MAX_COMPONENTS = 1000  # per image or scan; more are specks rather than objects
MAX_SPACING_MM = 1000.0
CROP_STEP = 32  # px; suggested crop sizes are multiples of it where the images are large enough
PROMPT_SHARE = 0.75  # of a window's side; the processor enlarges the window of a prompt that takes more


class TableLine(NamedTuple):
    """One line of `table.csv`. Empty fields are None."""

    group: str | None
    spacing_mm: float | None
    split: str | None


class FolderSource:
    """Rows of a folder.

    File names and the table are checked on construction, and pixels while the rows are read.

    Args:
        root: the folder.
        objects: `image` for one row per image; `components` for one row per connected component of the union of the
            readers' masks, with the masks restricted to it. The rows of a scan are its annotated slices, or those of
            each component in 3D.
        name: name of the data on the card (default: the folder's name).
        license: licence on the card.
        notes: gets a note for each scan without any mask.

    Raises:
        UserError: files that do not follow the layout, or a table that does not fit the images. Reading the rows also
            raises it, for files that do not decode or fit, and if the training or validation split would be empty.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        objects: str = "image",
        name: str | None = None,
        license: str | None = None,
        notes: list[Note] | None = None,
    ) -> None:
        self.root, self.objects = Path(root), objects
        self.notes = [] if notes is None else notes
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such directory; {LAYOUT}")
        self.holds_scans = (self.root / "scans").is_dir()
        if self.holds_scans and (self.root / "images").exists():
            raise UserError(f"{self.root}: has both images and scans; {LAYOUT}")
        kinds = SCAN_SUFFIXES if self.holds_scans else IMAGE_SUFFIXES
        folder = self.root / ("scans" if self.holds_scans else "images")
        self.images = _list_files(folder, kinds, folders=self.holds_scans)
        mask_kinds = NIFTI if self.holds_scans else (*MASK_SUFFIXES, *NIFTI)
        self.masks = _list_masks(self.root / "masks", self.images, mask_kinds)
        self.table = _read_table(self.root / "table.csv", self.images)
        needs_scan = self.holds_scans or any(map(is_nifti, self.images.values()))
        if needs_scan and not all(map(importlib.util.find_spec, ("highdicom", "nibabel"))):
            raise UserError(
                "scans and NIfTI need highdicom and nibabel; accepted: pip install 'probabilistic-sam[scan]'"
            )
        if self.holds_scans and any(line.spacing_mm for line in self.table.values()):
            raise UserError(
                f"{self.root / 'table.csv'}: has a spacing_mm, which scans state; accepted: no such column"
            )
        self.sizes: list[int] = []  # larger side of the box around the union of the masks, for each row
        self.shorter_sides: list[int] = []  # of the images
        self._check_groups()
        if self.holds_scans:
            kind = "scan" if objects == "image" else "connected component of the union of the masks"
            text = (
                f"Scans and readers' masks from a folder; one row per annotated axial slice of each {kind}. "
                f"`nodule_id` is the number of the {kind}. Slices are stored as PNG of 16 bits. {NIFTI_VALUES}"
            )
        else:
            kind = "image" if objects == "image" else "connected component of the union of the masks"
            text = f"Images and readers' masks from a folder; one row per {kind}. Images are stored as PNG."
            text += f" {NIFTI_VALUES}" * needs_scan
        self.origin = Origin(
            text,
            " ".join((name or self.root.resolve().name).split()) or "Images with readers' masks",
            is_scan=self.holds_scans,
            license=license,
            splits=self._splits_of_table(),
        )

    def __iter__(self) -> Iterator[dict]:
        """Yield the rows in the order of the images' names, including those that no reader annotated."""
        self._check_splits(set(map(self._group, self.images)), "groups")  # before the images are decoded
        annotated: set[str] = set()
        num_objects: Counter[str] = Counter()  # in the scans of each group
        for image_id, path in self.images.items():
            for row in self._slices(image_id, path, num_objects) if self.holds_scans else self._rows(image_id, path):
                if row["num_nonempty"]:
                    annotated.add(row["patient_id"])
                yield row
        if annotated:
            self._check_splits(annotated, "groups with masks")

    def _check_splits(self, names: set[str], what: str) -> None:
        """Refuse names of groups that leave a split empty; `what` the names are."""
        groups = {split: [name for name in names if self.origin.split_of(name) == split] for split in SPLITS}
        for split in NEEDED_SPLITS:
            if not groups[split]:
                found = ", ".join(f"{name} {len(groups[name])}" for name in SPLITS)
                raise UserError(
                    f"{self.root}: the split {split} would be empty ({what}: {found}); accepted: more groups, smaller "
                    f"groups, or a column split in table.csv"
                )

    def _check_groups(self) -> None:
        """Refuse a table with the groups of some images only, whose others could be in another split than theirs."""
        named = {image_id for image_id, line in self.table.items() if line.group}
        without = [image_id for image_id in self.images if image_id not in named]
        if named and without:
            raise UserError(
                f"{self.root / 'table.csv'}: no group for {without[0]!r}, one of {len(without)} such images; "
                "accepted: a group for every image, or for none"
            )

    def size_line(self) -> str:
        """Sizes of the objects, and the crop size that they suggest, with what it means for their windows."""
        median, high = np.percentile(self.sizes, [50, 90])
        crop_size = suggested_crop_size(self.sizes, self.shorter_sides)
        share = np.mean(np.array(self.sizes) <= PROMPT_SHARE * crop_size)
        return (
            f"larger side of the objects: median {median:.0f}, 90th percentile {high:.0f} pixels; suggested "
            f"crop_size: {crop_size} (the median object takes {median / crop_size:.0%} of a window's side; "
            f"{share:.0%} of the windows have this side, those of larger objects grow with them)"
        )

    def _group(self, image_id: str) -> str:
        line = self.table.get(image_id)
        return (line and line.group) or image_id

    def _splits_of_table(self) -> dict[str, str] | None:
        """Split of each group by the table; None if it names no split."""
        path = self.root / "table.csv"
        if not any(line.split for line in self.table.values()):
            return None
        splits: dict[str, str] = {}
        for image_id in self.images:
            split = self.table[image_id].split if image_id in self.table else None
            if split is None:
                raise UserError(f"{path}: no split for {image_id!r}; accepted: a split for every image, or for none")
            group = self._group(image_id)
            if splits.setdefault(group, split) != split:
                raise UserError(
                    f"{path}: group {group!r} is in {splits[group]} and, with {image_id!r}, in {split}; accepted: one "
                    f"split per group"
                )
        return splits

    def _rows(self, image_id: str, path: Path) -> Iterator[dict]:
        pixels, spacing_mm = _read_image(path)
        self.shorter_sides.append(min(pixels.shape[:2]))
        line = self.table.get(image_id)
        if line is not None and line.spacing_mm is not None:
            spacing_mm = line.spacing_mm
        paths = self._mask_paths(image_id, path)
        for mask_path in paths.values():
            if is_nifti(mask_path) != is_nifti(path):  # whose first axis runs along the rows
                raise UserError(
                    f"{mask_path}: of {path.name}; accepted: NIfTI masks of NIfTI images, PNG or TIFF of others"
                )
        masks = np.stack([_read_mask(mask_path, pixels.shape[:2]) for mask_path in paths.values()])
        png = encode_png(pixels)
        for suffix, one in self._objects_of(masks, path):
            if one.any():
                self.sizes.append(_larger_side(one))
            yield image_row(
                png,
                [encode_png(mask) for mask in one],
                str(path),
                [str(mask_path) for mask_path in paths.values()],
                MAX_PIXELS,
                patient_id=self._group(image_id),
                image_id=image_id + suffix,
                reader_ids=list(paths),
                pixel_spacing_mm=spacing_mm,
                source="folder",
            )

    def _mask_paths(self, image_id: str, path: Path) -> dict[str, Path]:
        """Mask files of an image or scan by reader."""
        paths = {reader: masks[image_id] for reader, masks in self.masks.items() if image_id in masks}
        if not paths:
            raise UserError(
                f"{path}: no reader has a mask of it; accepted: at least one mask, without pixels if the reader "
                f"annotated nothing"
            )
        return paths

    def _slices(self, image_id: str, path: Path, num_objects: Counter[str]) -> Iterator[dict]:
        """Rows of a scan. Numbers of objects are unique within a group, as those of nodules are."""
        from .folder_scans import annotated_slices

        paths, group = self._mask_paths(image_id, path), self._group(image_id)
        before, last = num_objects[group], 0
        for one in annotated_slices(path, paths, self.objects == "components", MAX_COMPONENTS):
            if not last:
                self.shorter_sides.append(min(one.pixels.shape))
            png = encode_png(one.pixels)
            for number, masks in one.objects.items():
                last = max(last, number)
                self.sizes.append(_larger_side(masks))
                yield image_row(
                    png,
                    [encode_png(mask) for mask in masks],
                    f"{path} slice {one.slice_index}",
                    [str(mask_path) for mask_path in paths.values()],
                    MAX_PIXELS,
                    patient_id=group,
                    scan_id=list(self.images).index(image_id) + 1,
                    nodule_id=before + number,
                    slice_index=one.slice_index,
                    image_id=image_id,
                    reader_ids=list(paths),
                    z_mm=one.z_mm,
                    slice_thickness_mm=one.step_mm,
                    pixel_spacing_mm=one.spacing_mm,
                    crop_row=0,
                    crop_col=0,
                    source="folder",
                )
        if not last:
            self.notes.append(Note("scans without any mask left out", 1, f"{path}: no reader annotated a voxel of it"))
        num_objects[group] += last

    def _objects_of(self, masks: np.ndarray, path: Path) -> Iterator[tuple[str, np.ndarray]]:
        """Suffix of the image's id, and masks (R, H, W), for each object."""
        union = masks.any(axis=0)
        if self.objects == "image" or not union.any():
            yield "", masks
            return
        labels, count = scipy.ndimage.label(union)
        if count > MAX_COMPONENTS:
            raise UserError(f"{path}: its masks have {count:,} components; accepted: at most {MAX_COMPONENTS:,}")
        for number in range(1, count + 1):
            yield f":{number}", masks & (labels == number)


def suggested_crop_size(object_sides: Sequence[int], shorter_sides: Sequence[int]) -> int:
    """Side of the windows in pixels that suits most objects.

    It is the smallest multiple of `CROP_STEP` in which the median object takes at most half of the side, and in which
    90 % of the objects fit without a larger window, so that most windows have one scale. For the nodules of LIDC-IDRI
    (median 11, 90th percentile 27 pixels) it gives 64. It is never larger than the shorter side of the median image,
    because the rest of a window would be padding.

    Args:
        object_sides: larger side of the box around each object.
        shorter_sides: of the images.
    """
    median, high = np.percentile(object_sides, [50, 90])
    needed = max(2 * median, high / PROMPT_SHARE)
    return min(CROP_STEP * math.ceil(needed / CROP_STEP), int(np.median(shorter_sides)))


def _list_files(folder: Path, suffixes: tuple[str, ...], folders: bool = False) -> dict[str, Path]:
    """Files of a folder by id, sorted; with `folders` its folders, too."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; {LAYOUT}")
    files: dict[str, Path] = {}
    for path in _entries(folder):
        suffix = next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), None)
        if folders and path.is_dir():
            suffix = ""
        elif not path.is_file() or suffix is None:
            found = "a folder, which is not read" if path.is_dir() else "unexpected"
            found = "a link to nothing" if path.is_symlink() and not path.exists() else found
            raise UserError(f"{path}: {found}; accepted: files of the kinds {', '.join(suffixes)}")
        image_id = _same_spelling(path.name[: len(path.name) - len(suffix)])
        if image_id in files:
            raise UserError(f"{path}: same id as {files[image_id].name}; accepted: one file per id")
        files[image_id] = path
    if not files:
        raise UserError(f"{folder}: holds no file; {LAYOUT}")
    return files


def _list_masks(folder: Path, images: dict[str, Path], suffixes: tuple[str, ...]) -> dict[str, dict[str, Path]]:
    """Mask files by reader and id."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; {LAYOUT}")
    masks = {}
    for reader in _entries(folder):
        if not reader.is_dir():
            raise UserError(f"{reader}: is not in the folder of a reader; {LAYOUT}")
        files = _list_files(reader, suffixes)
        unknown = [(image_id, path) for image_id, path in files.items() if image_id not in images]
        if len(unknown) == len(files):
            raise UserError(f"{reader}: none of its {len(files)} files has the id of an image; {LAYOUT}")
        if unknown:
            image_id, path = unknown[0]
            raise UserError(f"{path}: no image has the id {image_id!r}; {LAYOUT}")
        masks[reader.name] = files
    if not masks:
        raise UserError(f"{folder}: holds no folder of a reader; {LAYOUT}")
    return masks


def _same_spelling(name: str) -> str:
    """A name with its accents in one form: macOS and archives made there write `u` and its dots as two characters."""
    return unicodedata.normalize("NFC", name)


def _entries(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in paths:
        if not path.name.isprintable():  # would break messages, or cannot be encoded
            raise UserError(f"{folder}: holds the name {ascii(path.name)}; accepted: printable names in UTF-8")
    return paths


def _read_table(path: Path, images: dict[str, Path]) -> dict[str, TableLine]:
    """Lines of the table by id; none if there is no table."""
    if not path.exists():
        return {}
    table: dict[str, TableLine] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file, restval="", strict=True)
            names = list(lines.fieldnames or [])
            if "id" not in names or len(set(names)) < len(names) or not set(names) <= set(TABLE_COLUMNS):
                found = ", ".join(names) or "(none)"
                raise UserError(f"{path}: columns {found}; accepted: id, and any of {', '.join(TABLE_COLUMNS[1:])}")
            for line in lines:
                place, image_id = f"{path}: line {lines.line_num}", _same_spelling(line["id"])
                if None in line:
                    raise UserError(f"{place}: more fields than columns; accepted: {len(names)} fields")
                if image_id not in images:
                    raise UserError(f"{place}: no image has the id {image_id!r}; accepted: ids of files in images/")
                if image_id in table:
                    raise UserError(f"{place}: id {image_id!r} is repeated; accepted: one line per image")
                table[image_id] = _table_line(line, place)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: does not open as CSV in UTF-8: {error}") from error
    return table


def _table_line(line: dict[str, str], place: str) -> TableLine:
    split, spacing_mm = line.get("split") or None, None
    if split is not None and split not in SPLITS:
        raise UserError(f"{place}: split is {split!r}; accepted: {', '.join(SPLITS)}")
    text = line.get("spacing_mm")
    if text:
        try:
            spacing_mm = float(text)
        except ValueError:
            spacing_mm = math.nan
        if not 0 < spacing_mm <= MAX_SPACING_MM:
            raise UserError(f"{place}: spacing_mm is {text!r}; accepted: a number of mm, up to {MAX_SPACING_MM:g}")
    return TableLine(line.get("group", "").strip() or None, spacing_mm, split)


def _read_image(path: Path) -> tuple[np.ndarray, float | None]:
    """Pixels (H, W), uint8 or uint16, or (H, W, 3), uint8; and the side of a pixel in mm where the file states it."""
    spacing_mm = None
    if is_nifti(path):
        from ..nifti_slice import read_nifti_slice
        from .folder_scans import fit_16_bits

        values, spacing_mm = read_nifti_slice(path, MAX_PIXELS)
        return fit_16_bits(values), spacing_mm
    try:
        if path.suffix.lower() in DICOM_SUFFIXES:
            values, spacing_mm = read_dicom(path, MAX_PIXELS)
            if values.min() < 0:
                values = np.maximum(values + HU_OFFSET, 0)
        else:
            values = np.asarray(open_image(path, "the image"))
        if min(values.shape[:2]) < 2:
            raise ValueError(f"image of {values.shape[1]}x{values.shape[0]} pixels; accepted: at least 2x2")
        return values if values.dtype == np.uint8 else _sixteen_bits(values), spacing_mm
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _sixteen_bits(values: np.ndarray) -> np.ndarray:
    """Grey values as uint16."""
    accepted = "accepted: whole numbers, 0 to 65535"
    if not np.isfinite(values).all():
        raise ValueError(f"NaN or infinite grey values; {accepted}")
    if (values != np.round(values)).any():
        raise ValueError(f"grey values with fractions; {accepted}")
    low, high = values.min(), values.max()
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise ValueError(f"grey values from {low:g} to {high:g}; {accepted}")
    return values.astype(np.uint16)


def _read_mask(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Boolean mask (H, W) of an image of this shape."""
    image: Any = None
    if is_nifti(path):
        from ..nifti_slice import read_nifti_slice

        image, _ = read_nifti_slice(path, MAX_PIXELS)
    try:
        if image is None:
            image = open_image(path, "the mask")
            with PIL.Image.open(path) as file:
                if file.mode == "LA":  # `open_image` drops the transparency, which may be the mask
                    raise UserError(f"mask with transparency; {ACCEPTED_MASK}")
        mask = binary_mask(image)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if mask.shape != shape:
        raise UserError(
            f"{path}: mask is {mask.shape[1]}x{mask.shape[0]} pixels; accepted: {shape[1]}x{shape[0]}, the size of "
            f"its image"
        )
    return mask


def _larger_side(masks: np.ndarray) -> int:
    """Larger side of the box around the union of masks (R, H, W), in pixels."""
    union = np.asarray(masks.any(axis=0))
    return int(max(np.ptp(np.flatnonzero(union.any(axis=axis))) for axis in (0, 1))) + 1
