"""Grey values of one DICOM file: every step by hand-computed values, and one-line errors."""

import json
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import write_slice
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from probabilistic_sam import cli, dicom_slice, images
from probabilistic_sam.dicom_slice import read_dicom, read_header
from probabilistic_sam.errors import UserError

STORED = np.array([[0, 1, 2], [3, 10, 99]])
MAX_PIXELS = 10_000
RESCALE = ("RescaleSlope", "RescaleIntercept")


def write(folder: Path, stored=STORED, without=(), dtype="<u2", **tags) -> Path:
    """Write a file with these stored values, without rescaling unless given in `tags`."""
    tags = {"PixelData": np.asarray(stored).astype(dtype).tobytes(), **tags}
    without = [*without, *(name for name in RESCALE if name not in tags)]
    return write_slice(folder / "IM1", np.asarray(stored), "1.2", 0.0, "1.3", without=without, **tags)


def read(*args, **kwargs):
    return read_dicom(write(*args, **kwargs), MAX_PIXELS)[0]


def sequence(**tags) -> list[Dataset]:
    item = Dataset()
    for name, value in tags.items():
        setattr(item, name, value)
    return [item]


def table(descriptor, entries, vr="OW") -> list[Dataset]:
    """A ModalityLUTSequence with its entries as words or as numbers."""
    item = sequence(LUTDescriptor=descriptor, ModalityLUTType="OD")[0]
    item.add_new("LUTData", vr, np.array(entries, "<u2").tobytes() if vr == "OW" else list(entries))
    return [item]


TABLE = table([2, 1, 16], [5, 6])


def change(path: Path, old: bytes, new: bytes) -> Path:
    """Replace bytes of a file, for content that pydicom would not write."""
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    return path


@pytest.fixture(autouse=True)
def silent(capfd):
    """No warning or log message of pydicom may reach stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert not capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- rescaling and table


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, STORED),
        ({"RescaleSlope": 2, "RescaleIntercept": -10}, [[-10, -8, -6], [-4, 10, 188]]),
        ({"RescaleSlope": None, "RescaleIntercept": -10}, STORED - 10),  # an empty slope is 1
        ({"RescaleSlope": 2, "RescaleIntercept": None}, STORED * 2),
        ({"RescaleSlope": 2}, STORED * 2),  # pydicom rescales only if both are given
        ({"RescaleIntercept": -10}, STORED - 10),
        ({"RescaleSlope": -0.5, "RescaleIntercept": 0}, STORED * -0.5),
    ],
)
def test_rescaling(tmp_path, tags, expected):
    values = read(tmp_path, **tags)
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    ("stored", "dtype", "descriptor", "entries", "expected"),
    [
        # Values below the first mapped one get the first entry, values above the table the last
        ([9, 10, 12, 99], "<u2", [4, 10, 16], [100, 300, 200, 7], [100, 100, 200, 7]),
        ([-3, -2, -1, 5], "<i2", [3, -2, 16], [5, 6, 8], [5, 5, 6, 8]),
        # Differences that overflow the type of the pixels
        ([-32768, 32767, 32766, 0], "<i2", [2, -32768, 16], [5, 6], [5, 6, 6, 6]),
        ([0, 1, 254, 255], "u1", [300, 0, 16], range(1000, 1300), [1000, 1001, 1254, 1255]),
        ([0, 1, 2, 3], "<u2", [4, 0, 8], [255, 3, 2, 1], [255, 3, 2, 1]),
    ],
)
@pytest.mark.parametrize(("vr", "implicit"), [("OW", False), ("US", False), ("OW", True)])
def test_modality_table(tmp_path, stored, dtype, descriptor, entries, expected, vr, implicit):
    bits = np.dtype(dtype).itemsize * 8
    path = write(
        tmp_path, np.reshape(stored, (2, 2)), dtype=dtype, BitsAllocated=bits, BitsStored=bits, HighBit=bits - 1,
        PixelRepresentation=int(np.dtype(dtype).kind == "i"), ModalityLUTSequence=table(descriptor, entries, vr),
    )  # fmt: skip
    if implicit:  # the reader must infer whether the descriptor is signed
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        data.save_as(path, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(read_dicom(path, MAX_PIXELS)[0], np.reshape(expected, (2, 2)))


def test_empty_table_is_ignored_and_a_table_allows_an_identity_rescaling(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, ModalityLUTSequence=[], RescaleSlope=2), STORED * 2)
    values = read(tmp_path, ModalityLUTSequence=TABLE, RescaleSlope=1, RescaleIntercept=0)
    np.testing.assert_array_equal(values, [[5, 5, 6], [6, 6, 6]])


# ---------------------------------------------------------------------------------------------------- enhanced objects


def macros(spacing=(0.5, 0.5), **rescale) -> list[Dataset]:
    """Functional groups as in an Enhanced CT, whose header itself has neither rescaling nor spacing."""
    return sequence(
        PixelValueTransformationSequence=sequence(**rescale),
        PixelMeasuresSequence=sequence(PixelSpacing=list(spacing)),
    )


CT = {"RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "HU"}


@pytest.mark.parametrize("groups", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_enhanced_ct_of_one_frame(tmp_path, groups):
    path = write(tmp_path, NumberOfFrames=1, **{groups: macros(**CT)})
    values, side = read_dicom(path, MAX_PIXELS)
    np.testing.assert_array_equal(values, STORED - 1024)
    assert side == 0.5


def test_values_in_two_places_of_an_enhanced_ct_must_agree(tmp_path):
    groups = {name: macros(**CT) for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")}
    np.testing.assert_array_equal(read(tmp_path, RescaleIntercept=-1024, **groups), STORED - 1024)
    with pytest.raises(ValueError, match="^RescaleIntercept is -1024 and 0; accepted: one of them"):
        read(tmp_path, RescaleIntercept=0, **groups)
    with pytest.raises(ValueError, match="^PerFrameFunctionalGroupsSequence has 2 items"):
        read(tmp_path, PerFrameFunctionalGroupsSequence=macros(**CT) * 2)
    with pytest.raises(ValueError, match="3 x 2 pixels, 2 frames"):
        read(tmp_path, NumberOfFrames=2, **groups)


# ----------------------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize(
    ("photometric", "shape", "inverse"),
    [
        ("MONOCHROME2", None, False),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "INVERSE", True),  # a single inversion, stated twice as required for radiographs
    ],
)
def test_direction(tmp_path, photometric, shape, inverse):
    path = write(tmp_path, PhotometricInterpretation=photometric, PresentationLUTShape=shape, RescaleIntercept=-10)
    inverted = [[89, 88, 87], [86, 79, -10]]  # 89 - 10 - value
    np.testing.assert_array_equal(read_dicom(path, MAX_PIXELS)[0], inverted if inverse else STORED - 10)
    np.testing.assert_array_equal(read_dicom(path, MAX_PIXELS, invert=False)[0], STORED - 10)


def test_tags_for_display_and_additional_scales_are_ignored(tmp_path):
    mapping = sequence(
        RealWorldValueSlope=7.0, RealWorldValueIntercept=1.0, RealWorldValueFirstValueMapped=0,
        RealWorldValueLastValueMapped=100, LUTLabel="x",
    )  # fmt: skip
    window = {"WindowCenter": 5, "WindowWidth": 2, "VOILUTFunction": "SIGMOID"}
    values = read(tmp_path, RealWorldValueMappingSequence=mapping, PixelPaddingValue=99, RescaleType="US", **window)
    np.testing.assert_array_equal(values, STORED)


# ---------------------------------------------------------------------------------------------------------------- bits


TWELVE = {"BitsStored": 12, "HighBit": 11}


@pytest.mark.parametrize(
    ("stored", "tags", "expected"),
    [
        ([0x8005, 0x0FFF, 0xF000], TWELVE, [5, 4095, 0]),  # an overlay in the unused bits
        ([0x0FFF, 0x0800, 0x07FF], {**TWELVE, "PixelRepresentation": 1}, [-1, -2048, 2047]),
        ([0xFFFF, 0x8000, 0x7FFF], {"PixelRepresentation": 1}, [-1, -32768, 32767]),
        ([0xFFFF, 0x8000, 0x7FFF], {}, [65535, 32768, 32767]),
    ],
)
def test_bits(tmp_path, stored, tags, expected):
    np.testing.assert_array_equal(read(tmp_path, [stored], **tags), [expected])


def test_numbers_of_8_32_and_1_bits(tmp_path):
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    np.testing.assert_array_equal(read(tmp_path, [[200, 1]], dtype="u1", **eight), [[200, 1]])
    long = {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31, "PixelRepresentation": 1}
    np.testing.assert_array_equal(read(tmp_path, [[-70_000, 70_000]], dtype="<i4", **long), [[-70_000, 70_000]])
    one = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
    np.testing.assert_array_equal(read(tmp_path, [[0] * 5], PixelData=b"\x0d\0", **one), [[1, 0, 1, 1, 0]])


@pytest.mark.parametrize(("keyword", "dtype", "bits"), [("Float", "<f4", 32), ("DoubleFloat", "<f8", 64)])
def test_floating_point_pixels(tmp_path, keyword, dtype, bits):
    def tags(values):
        return {
            f"{keyword}PixelData": np.asarray(values, dtype).tobytes(), "BitsAllocated": bits, "RescaleSlope": 2,
            "without": ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"),
        }  # fmt: skip

    np.testing.assert_array_equal(read(tmp_path, [[0, 0]], **tags([0.25, -3])), [[0.5, -6]])
    for bad in (np.nan, np.inf, np.finfo(dtype).max):
        with pytest.raises(ValueError, match="NaN or infinite grey values"):
            read(tmp_path, [[0, 0]], **tags([0.25, bad]))


# ------------------------------------------------------------------------------------------------------------- spacing


@pytest.mark.parametrize(
    ("tags", "side"),
    [
        ({"PixelSpacing": [0.5, 0.8]}, 0.4**0.5),
        ({"PixelSpacing": None}, None),
        ({"PixelSpacing": [0.5, 0]}, None),
        ({"PixelSpacing": [-0.5, -0.5]}, None),
        ({"PixelSpacing": [0.5, 0.5], "SharedFunctionalGroupsSequence": macros((0.5, 0.5))}, 0.5),
        ({"PixelSpacing": [0.7, 0.7], "SharedFunctionalGroupsSequence": macros((0.5, 0.5))}, None),
        # At the detector, on the film, or without a unit: not the spacing in the patient
        (
            {"ImagerPixelSpacing": [0.5, 0.5], "NominalScannedPixelSpacing": [0.5, 0.5], "PixelAspectRatio": [1, 2]},
            None,
        ),
    ],
)
def test_spacing(tmp_path, tags, side):
    assert read_dicom(write(tmp_path, **tags), MAX_PIXELS)[1] == pytest.approx(side)


# ---------------------------------------------------------------------------------------- tags that pixels do not need


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"0.50\\0.50", b"ab.c\\defg"),
        (b"0.50\\0.50", b"0.5000000"),
        (b"018Y", b"old!"),
        (b"\x08\0\x60\0CS", b"\x08\0\x60\0ZZ"),  # no such value representation
        (b"ISO_IR 100", b"ISO_IR 999"),
        (b"20200102", b"2020-1-2"),
        (b"private!", b"\xff\xfe\0\x01\x02\x03\x04\x05"),
        (b"M\xc3\xbcller", b"\xff\xff\xff\xff\xff\xff\xff"),
    ],
)
def test_invalid_tags_that_pixels_do_not_need_are_tolerated(tmp_path, old, new):
    path = write(
        tmp_path, PixelSpacing=["0.50", "0.50"], PatientAge="018Y", SpecificCharacterSet="ISO_IR 100",
        StudyDate="20200102", PatientComments="xxxxxxx ", RescaleIntercept=-10,
    )  # fmt: skip
    data = pydicom.dcmread(path)
    data.private_block(0x0011, "MAKER", create=True).add_new(1, "LO", "private!")
    data.save_as(path)
    change(path, b"xxxxxxx ", b"M\xc3\xbcller ")
    values, side = read_dicom(change(path, old, new), MAX_PIXELS)
    np.testing.assert_array_equal(values, STORED - 10)
    assert side == (None if old.startswith(b"0.50") else 0.5)


# ------------------------------------------------------------------------------------------------------ kinds of files


def test_no_transfer_syntax_and_no_preamble(tmp_path):
    path = write(tmp_path, RescaleIntercept=-10)
    data = pydicom.dcmread(path)
    whole = path.read_bytes()
    files = {"no preamble": whole[132:]}
    for implicit, little in ((True, True), (False, True), (False, False)):
        buffer = DicomBytesIO()
        buffer.is_implicit_VR, buffer.is_little_endian = implicit, little
        plain = pydicom.dcmread(path)
        plain.PixelData = STORED.astype("<u2" if little else ">u2").tobytes()
        write_dataset(buffer, plain)
        files[f"implicit {implicit}, little {little}"] = buffer.getvalue()
    del data.file_meta.TransferSyntaxUID
    data.save_as(tmp_path / "no syntax", implicit_vr=False, little_endian=True, enforce_file_format=False)
    files["no syntax"] = (tmp_path / "no syntax").read_bytes()
    assert files["no syntax"][128:132] == b"DICM" and ExplicitVRLittleEndian.encode() not in files["no syntax"]
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        np.testing.assert_array_equal(images.load_slice(path)[0], STORED - 10, err_msg=name)
        assert read_header(path, ["SOPInstanceUID", "PatientID"]) == {"SOPInstanceUID": "1.3", "PatientID": None}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP"])
def test_images_are_not_taken_for_dicom(tmp_path, kind):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "image", format=kind)
    assert images.load_slice(tmp_path / "image")[0].shape[:2] == (8, 8)  # WebP has no grey


def test_padding_after_the_pixels(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, PixelData=STORED.astype("<u2").tobytes() + b"\7\7"), STORED)
    odd = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": b"\1\2\3\0"}
    np.testing.assert_array_equal(read(tmp_path, [[0, 0, 0]], **odd), [[1, 2, 3]])


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"RescaleSlope": 0}, "^RescaleSlope is 0; accepted: any other number"),
        ({"RescaleSlope": ["1", "2"]}, r"^RescaleSlope is \[1, 2\]; accepted: a finite number"),
        ({"RescaleSlope": 1e39}, "beyond the range"),
        ({"ModalityLUTSequence": TABLE, "RescaleSlope": 2}, "^ModalityLUTSequence; accepted: .*no rescaling"),
        ({"ModalityLUTSequence": TABLE * 2}, "^ModalityLUTSequence; accepted: one table"),
        (
            {"ModalityLUTSequence": table([3, 1, 16], [5, 6])},
            "^ModalityLUTSequence has 2 entries .* says 3 of 16 bits",
        ),
        ({"ModalityLUTSequence": table([2, 1, 12], [5, 6])}, "^ModalityLUTSequence .* 12 bits; accepted: .* 8 or 16"),
        ({"ModalityLUTSequence": sequence(ModalityLUTType="OD")}, "^ModalityLUTSequence is invalid"),
        ({"PresentationLUTShape": "LIN OD"}, "^PresentationLUTShape is LIN OD; accepted: IDENTITY, INVERSE"),
        (
            {"PresentationLUTShape": "IDENTITY", "PhotometricInterpretation": "MONOCHROME1"},
            "^PresentationLUTShape is IDENTITY; accepted: INVERSE",
        ),
        ({"PresentationLUTSequence": TABLE}, "^PresentationLUTSequence is not supported"),
        ({"PixelPresentation": "MIXED"}, "^PixelPresentation MIXED is not supported"),
        ({"DoseGridScaling": 0.1}, "^DoseGridScaling 0.1 is not supported"),
        (
            {"PhotometricInterpretation": "PALETTE COLOR"},
            "^PhotometricInterpretation is PALETTE COLOR; accepted: MONO",
        ),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "3 channels; accepted: one grey frame"),
        ({"without": ("PhotometricInterpretation",)}, "^no PhotometricInterpretation; accepted: MONOCHROME1, "),
        ({"without": ("BitsAllocated",)}, "^no BitsAllocated; accepted: 1, 8, 16, 32"),
        ({"BitsAllocated": 12, **TWELVE}, "^BitsAllocated is 12; accepted: 1, 8, 16, 32"),
        ({"without": ("BitsStored",)}, "^no BitsStored; accepted: 1 to BitsAllocated, 16"),
        ({"BitsStored": 17}, "^BitsStored is 17; accepted: 1 to BitsAllocated, 16"),
        ({"BitsStored": 12, "HighBit": 15}, "^HighBit is 15; accepted: BitsStored - 1, 11"),
        ({"without": ("PixelRepresentation",)}, "^no PixelRepresentation; accepted: 0 or 1"),
        ({"without": ("Rows",)}, "^no Rows; accepted: 1 to 65535"),
        ({"NumberOfFrames": -1}, "^NumberOfFrames is -1; accepted: 1"),
        ({"without": ("PixelData",)}, r"^no PixelData \(SOPClassUID: CT Image Storage\); accepted: a complete image"),
        ({"FloatPixelData": bytes(24)}, "^PixelData and FloatPixelData"),
        ({"PixelData": bytes(10)}, "^PixelData has 10 bytes; accepted: 12 for 2x3 pixels of 16 bits"),
        ({"PixelData": b""}, "^PixelData has 0 bytes; accepted: 12"),
        ({"PixelData": bytes(16)}, "^PixelData has 16 bytes; accepted: 12"),  # a column more
        ({"PixelData": bytes(24)}, "^PixelData has 24 bytes; accepted: 12"),  # a frame more
    ],
)
def test_unsupported_files_are_refused_with_the_reason(tmp_path, tags, message):
    path = write(tmp_path, **tags)
    with pytest.raises(ValueError, match=message) as error:
        read_dicom(path, MAX_PIXELS)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"^DICOM file {path} cannot be read: "):
        images.load_slice(path)


def test_objects_without_pixels_and_invalid_values(tmp_path):
    structures = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.3", "Modality": "RTSTRUCT"}
    with pytest.raises(ValueError, match=r"^no PixelData \(SOPClassUID: RT Structure Set Storage\)"):
        read(tmp_path, without=("PixelData", "Rows", "Columns"), **structures)
    slope = change(write(tmp_path, RescaleSlope="1.2345"), b"1.2345", b"1,2345")
    with pytest.raises(ValueError, match="^RescaleSlope is 1,2345; accepted: a finite number"):
        read_dicom(slope, MAX_PIXELS)
    nan = change(write(tmp_path, RescaleSlope="1.23"), b"1.23", b"NaN ")
    with pytest.raises(ValueError, match="^RescaleSlope is NaN; accepted: a finite number"):
        read_dicom(nan, MAX_PIXELS)
    syntax = change(write(tmp_path), b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
    with pytest.raises(ValueError, match="^TransferSyntaxUID is 1.2.840.10008.1.2.9, which"):
        read_dicom(syntax, MAX_PIXELS)


@pytest.mark.parametrize("cut", [1, 6, 12, 20, 60, 200, 300])
def test_truncated_files(tmp_path, cut):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="PixelData"):
        images.load_slice(path)


def test_limits_are_checked_before_pixels_are_decoded(tmp_path, monkeypatch):
    path = write(tmp_path)
    monkeypatch.setattr(dicom_slice, "get_decoder", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="3 x 2 pixels.*at most 5 pixels"):
        read_dicom(path, 5)
    monkeypatch.setattr(dicom_slice, "_read", lambda *_: pytest.fail("read"))
    monkeypatch.undo()
    monkeypatch.setattr(pydicom, "dcmread", lambda *_, **__: pytest.fail("read"))
    monkeypatch.setattr(dicom_slice, "MAX_FILE_BYTES", 2**8)
    for reading in (lambda: read_dicom(path, MAX_PIXELS), lambda: read_header(path, ["Rows"])):
        with pytest.raises(ValueError, match="more than 0 MB"):
            reading()


# ---------------------------------------------------------------------------------------------------------- compressed


def packed(path: Path, syntax: str, frames: list[bytes], **tags) -> Path:
    """Replace the pixels of a file by these compressed frames."""
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = syntax
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = encapsulate(frames)
    data["PixelData"].VR = "OB"
    data.save_as(path)
    return path


@pytest.fixture
def jpeg(tmp_path) -> bytes:
    """A JPEG of 8 x 16 pixels with the value 77."""
    Image.new("L", (16, 8), 77).save(tmp_path / "a.jpg", quality=95)
    return (tmp_path / "a.jpg").read_bytes()


EIGHT = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}


def test_compressed_pixels(tmp_path, jpeg):
    plain = write(tmp_path, np.zeros((8, 16), int), dtype="u1", RescaleIntercept=-7, **EIGHT)
    np.testing.assert_array_equal(read_dicom(packed(plain, JPEGBaseline8Bit, [jpeg]), MAX_PIXELS)[0], 70)
    data = pydicom.dcmread(write(tmp_path, RescaleIntercept=-7))
    data.compress(RLELossless)
    data.save_as(tmp_path / "rle")
    np.testing.assert_array_equal(read_dicom(tmp_path / "rle", MAX_PIXELS)[0], STORED - 7)
    rle = next(generate_frames(data.PixelData, number_of_frames=1))
    with pytest.raises(ValueError, match="PixelData has 2 compressed frames; accepted: one"):
        read_dicom(packed(tmp_path / "rle", RLELossless, [rle, rle]), MAX_PIXELS)


@pytest.mark.parametrize(
    ("frames", "tags", "message"),
    [
        (2, {}, "^PixelData has 2 compressed frames; accepted: one"),
        (1, {"Rows": 16, "Columns": 8}, "^16x8 pixels in its header, 8x16 in its compressed PixelData"),
        (1, {"Rows": 1, "Columns": 1}, "^1x1 pixels in its header, 8x16"),
        (0, {}, "^PixelData is not JPEG Baseline.*, as TransferSyntaxUID says"),
    ],
)
def test_compressed_pixels_are_one_frame_of_the_size_in_the_header(tmp_path, jpeg, monkeypatch, frames, tags, message):
    path = write(tmp_path, np.zeros((8, 16), int), dtype="u1", **EIGHT)
    packed(path, JPEGBaseline8Bit, [jpeg] * frames or [b"no image"], **tags)
    monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, "as_array", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=message):
        read_dicom(path, MAX_PIXELS)


def test_compressed_pixels_need_a_transfer_syntax_and_an_end(tmp_path, jpeg):
    path = packed(write(tmp_path, np.zeros((8, 16), int), dtype="u1", **EIGHT), JPEGBaseline8Bit, [jpeg])
    data = pydicom.dcmread(path)
    del data.file_meta.TransferSyntaxUID
    data["PixelData"].is_undefined_length = True
    data.save_as(tmp_path / "none", implicit_vr=False, little_endian=True, enforce_file_format=False)
    with pytest.raises(ValueError, match="^no TransferSyntaxUID, but compressed pixels"):
        read_dicom(tmp_path / "none", MAX_PIXELS)
    cut = path.read_bytes()
    path.write_bytes(cut[:-100])
    with pytest.raises(ValueError, match="^no PixelData"):  # the end is missing
        read_dicom(path, MAX_PIXELS)


# ------------------------------------------------------------------------------------------------- with the real model


def test_segment_with_the_shipped_model_reads_an_enhanced_slice(tmp_path, capfd):
    stored = np.random.default_rng(0).normal(100, 20, (128, 128))
    stored[50:70, 50:70] += 1000
    path = write(
        tmp_path, stored.astype(int), NumberOfFrames=1, SharedFunctionalGroupsSequence=macros(spacing=(0.5, 0.8), **CT)
    )
    command = ["segment", str(path), "--box", "48", "48", "72", "72", "--num-samples", "2"]
    cli.main([*command, "--output", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["area_mm2"]["mean"] == pytest.approx(0.4 * result["area_px"]["mean"], abs=1e-3)
    capfd.readouterr()


def test_deflated_files_are_refused_before_they_are_unpacked(tmp_path):
    data = pydicom.dcmread(write_slice(tmp_path / "a.dcm", np.zeros((8, 9)), "1.2", 0.0, "1.2.3"))
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(tmp_path / "deflated.dcm")
    with pytest.raises(ValueError, match="a deflated file; accepted: no compression, or compressed pixels only"):
        read_dicom(tmp_path / "deflated.dcm", 10_000)
