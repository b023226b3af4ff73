"""Fixtures that several test modules use."""

import logging
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "model_cards" / "psam-lidc"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that the processes of pytest-xdist end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the real LIDC slices and pretrained weights beside the project, or a skip."""
    path = ROOT.parent / "shared"
    if not (path / "data" / "lidc-idri-slices.tar.gz").exists():
        pytest.skip("the real data folder ../shared is not beside the project")
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The shipped model with its ONNX files, exported once for all workers of pytest-xdist."""
    pytest.importorskip("onnx", reason="the export needs onnx, extra [onnx]")
    from filelock import FileLock

    from probabilistic_sam.inference import load_model
    from probabilistic_sam.onnx_export import export_onnx

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "exported"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "onnx").is_dir():
            folder.mkdir(exist_ok=True)
            for name in ("config.json", "processor_config.json", "model.safetensors"):
                shutil.copyfile(SHIPPED / name, folder / name)
            logging.disable()  # PyTorch's trace records, which pytest would keep, are slow
            try:
                export_onnx(*load_model(folder), folder / "onnx", "psam-lidc")
            finally:
                logging.disable(logging.NOTSET)
    return folder
