"""pylidc 0.2.3 on current numpy, setuptools, SQLAlchemy and Python.

pylidc was last released for an older world: it imports `pkg_resources` (gone from setuptools 82), uses `np.int` and
`np.float` (gone from numpy 1.24) and `configparser.SafeConfigParser` (gone from Python 3.12), and keeps the folder of
the DICOM files in a file in the home folder. What it misses is given to its own modules only; numpy, configparser and
the home folder stay as they are.
"""

import importlib
import importlib.util
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError

_MODULES_USING_NUMPY = ("Annotation", "Contour", "Scan", "utils", "annotation_distance_metrics")


def load_pylidc(dicom_root: str | os.PathLike[str] | None = None) -> Any:
    """Import pylidc, mended, and return its module; its annotation database needs no download.

    Args:
        dicom_root: folder with the DICOM files as `patient/study/series`, for `scan.to_volume()` and the like. It
            stays as it was when None.

    Raises:
        UserError: pylidc is not installed, or `dicom_root` is no folder.
    """
    if "pylidc" not in sys.modules:
        _import_mended()
    pylidc = sys.modules["pylidc"]
    if dicom_root is not None:
        root = Path(dicom_root)
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; accepted: the folder that holds the patients' DICOM folders")
        _set_dicom_root(str(root))
    return pylidc


def _import_mended() -> None:
    present = sys.modules.get("pkg_resources")
    sys.modules["pkg_resources"] = _pkg_resources()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its deprecated imports of scipy and SQLAlchemy
            importlib.import_module("pylidc")
            modules = [importlib.import_module(f"pylidc.{name}") for name in _MODULES_USING_NUMPY]
    except ImportError as error:
        raise UserError(
            f"pylidc does not import ({error}); accepted: pip install 'probabilistic-sam[data]'"
        ) from error
    finally:
        if present is None:
            del sys.modules["pkg_resources"]
        else:
            sys.modules["pkg_resources"] = present
    old_numpy = _old_numpy()
    for module in modules:
        if hasattr(module, "np"):
            module.np = old_numpy  # type: ignore[attr-defined]
    _set_dicom_root(None)


def _pkg_resources() -> types.ModuleType:
    """The one function pylidc wants from `pkg_resources`: the path of a file beside a package."""

    def resource_filename(package: str, name: str) -> str:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        return str(Path(spec.origin).with_name(name))

    module = types.ModuleType("pkg_resources")
    module.resource_filename = resource_filename  # type: ignore[attr-defined]
    return module


def _old_numpy() -> types.ModuleType:
    """A view of numpy that still has the aliases `np.int`, `np.float` and `np.bool`."""
    module = types.ModuleType("numpy")
    vars(module).update(int=int, float=float, bool=bool, __getattr__=lambda name: getattr(np, name))
    return module


def _set_dicom_root(root: str | None) -> None:
    def dicom_root() -> str:
        if root is None:
            raise UserError("the folder of the DICOM files is not known; accepted: load_pylidc(dicom_root=...)")
        return root

    # The package's name `Scan` is the class; its module is only in sys.modules. Whatever reads ~/.pylidcrc goes.
    sys.modules["pylidc.Scan"]._get_dicom_file_path_from_config_file = dicom_root  # type: ignore[attr-defined]
