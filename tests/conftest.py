"""Fixtures that several test modules use."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the real LIDC slices and pretrained weights beside the project, or a skip."""
    path = ROOT.parent / "shared"
    if not (path / "data" / "lidc-idri-slices.tar.gz").exists():
        pytest.skip("the real data folder ../shared is not beside the project")
    return path
