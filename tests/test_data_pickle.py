"""Source `pickle`: rows from pickles of every protocol; hostile pickles are refused without running their code."""

import os
import pickle

import numpy as np
import pytest
from tiny import card_sizes, load_script

from probabilistic_sam.data.format import decode_image, decode_masks
from probabilistic_sam.data.lidc.pickle_crops import read_pickle
from probabilistic_sam.data.lidc.pylidc_adapter import load_pylidc
from probabilistic_sam.errors import UserError


def crop(**changes) -> dict:
    pylidc = load_pylidc()
    scan = pylidc.query(pylidc.Scan).filter(pylidc.Scan.patient_id == "LIDC-IDRI-0004").one()
    image = np.arange(16).reshape(4, 4) / 15
    masks = [np.eye(4), np.zeros((4, 4)), np.asfortranarray(np.tri(4)), np.ones((4, 4))]
    return {"image": image, "masks": masks, "series_uid": scan.series_instance_uid} | changes


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_rows_hold_image_and_masks(tmp_path, protocol):
    path = write(tmp_path / "a.pickle", {"s10": crop(), "s9": crop(image=np.zeros((4, 4), ">f4"))}, protocol)
    first, second = read_pickle(path)
    assert not decode_image(first).any()  # s9 comes before s10
    np.testing.assert_array_equal(decode_image(second), np.arange(16).reshape(4, 4) * 17)
    np.testing.assert_array_equal(decode_masks(second), [np.eye(4), np.zeros((4, 4)), np.tri(4), np.ones((4, 4))])
    assert [row["slice_index"] for row in (first, second)] == [0, 1]
    assert second["patient_id"] == "LIDC-IDRI-0004" and second["num_nonempty"] == 3


class Calls:
    """An object whose pickle is a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Calls(os.system, ("touch ran",)), f"{os.system.__module__}.system"),
        (Calls(eval, ("open('ran', 'w')",)), "builtins.eval"),
        (Calls(np.ndarray, ((10**9,),)), "a call of numpy.ndarray"),
        (Calls(np.empty(0).__reduce__()[0], (float, (0,), b"b")), "builtins.float"),
        (np.array([os.system], dtype=object), "dtype 'O8'"),
        (np.array(["text"]), "dtype 'U4'"),
        (np.zeros(1, dtype=[("a", "i4")]), "dtype 'V4'"),
        (np.float64(1), "multiarray.scalar"),
        (np.zeros(2049 * 2048, dtype=bool), "shape (4196352,)"),
        ({1, 2}, "builtins.set"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_anything_else_is_named_and_not_run(tmp_path, monkeypatch, content, named, protocol):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.pickle", {"key": content}, protocol)
    if isinstance(content, set) and protocol == 4:
        pytest.skip("protocol 4 has an opcode for sets, which calls nothing")
    with pytest.raises(UserError, match="refused") as error:
        list(read_pickle(path))
    assert named in str(error.value).replace("__builtin__", "builtins")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"series_uid": "1.2.3"}, "of series '1.2.3'"),
        ({"image": np.full((4, 4), 2.0)}, "outside 0..1"),
        ({"image": [1, 2]}, "not a numpy array"),
        ({"masks": [np.full((4, 4), 0.5)]}, "other values than 0 and 1"),
        ({"masks": []}, "not a list of arrays"),
    ],
)
def test_crops_of_another_layout_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        list(read_pickle(write(tmp_path / "a.pickle", {"key": crop(**changes)})))


def test_damaged_files_are_refused(tmp_path):
    path = write(tmp_path / "a.pickle", {"key": crop()})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="truncated, damaged or not a pickle"):
        list(read_pickle(path))
    with pytest.raises(UserError, match="does not open"):
        list(read_pickle(tmp_path / "absent"))
    with pytest.raises(UserError, match="not a dict of crops"):
        list(read_pickle(write(tmp_path / "b.pickle", [1])))


def test_card_does_not_count_unknown_nodules(tmp_path, monkeypatch):
    crops = {f"crop{number}": crop() for number in range(30)}
    crops["five"] = crop(masks=[np.ones((4, 4))] * 5)
    path = write(tmp_path / "data_lidc.pickle", crops)
    command = ["build_dataset.py", "pickle", "--input", str(path), "--output", str(tmp_path / "build")]
    monkeypatch.setattr("sys.argv", command)
    load_script("build_dataset").main()
    card = (tmp_path / "build" / "README.md").read_text()
    (cells,) = card_sizes(card).values()
    assert cells == ["1", "1", "unknown", "31"]  # patients, scans, nodules, slices
    assert "masks of its readers: 4 to 5 per row" in card
    (split,) = card_sizes(card)
    assert "| split | 1 | 2 | 3 | 4 | 5 |" in card and f"| {split} | 0 | 0 | 30 | 0 | 1 |" in card
    assert "license: cc-by-3.0" in card  # series of LIDC-IDRI only are accepted
