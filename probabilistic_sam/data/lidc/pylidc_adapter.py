"""pylidc 0.2.3 on current versions of numpy, setuptools, SQLAlchemy and Python.

pylidc imports `pkg_resources` (removed in setuptools 82), uses `np.int` and `np.float` (removed in numpy 1.24) and
`configparser.SafeConfigParser` (removed in Python 3.12), and reads the folder of the DICOM files from a file in the
home directory. This module provides replacements to pylidc's own modules only; numpy, configparser and the home
directory are not changed.
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
    """Import pylidc with the replacements and return its module. Its annotation database needs no download.

    Args:
        dicom_root: folder with the DICOM files as `patient/study/series`, for `scan.to_volume()` and similar methods.
            None leaves the current setting unchanged.

    Raises:
        UserError: pylidc is not installed, or `dicom_root` is not a folder.
    """
    if "pylidc" not in sys.modules:
        _import_patched()
    pylidc = sys.modules["pylidc"]
    if dicom_root is not None:
        root = Path(dicom_root)
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; accepted: the folder that holds the patients' DICOM folders")
        _set_dicom_root(str(root))
    return pylidc


def _import_patched() -> None:
    present = sys.modules.get("pkg_resources")
    sys.modules["pkg_resources"] = _pkg_resources()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated imports of scipy and SQLAlchemy
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
    """The only function of `pkg_resources` that pylidc uses: the path of a file in a package."""

    def resource_filename(package: str, name: str) -> str:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        return str(Path(spec.origin).with_name(name))

    module = types.ModuleType("pkg_resources")
    module.resource_filename = resource_filename  # type: ignore[attr-defined]
    return module


def _old_numpy() -> types.ModuleType:
    """A view of numpy with the removed aliases `np.int`, `np.float` and `np.bool`."""
    module = types.ModuleType("numpy")
    vars(module).update(int=int, float=float, bool=bool, __getattr__=lambda name: getattr(np, name))
    return module


def _set_dicom_root(root: str | None) -> None:
    def dicom_root() -> str:
        if root is None:
            raise UserError("the folder of the DICOM files is not known; accepted: load_pylidc(dicom_root=...)")
        return root

    # `pylidc.Scan` is the class; its module is only in sys.modules. This replaces the function that reads ~/.pylidcrc
    sys.modules["pylidc.Scan"]._get_dicom_file_path_from_config_file = dicom_root  # type: ignore[attr-defined]
