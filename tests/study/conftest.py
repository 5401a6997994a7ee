"""What the tests of studies share."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_folders import cells_in_process

from gptnorm.study import run


@pytest.fixture
def study(request: pytest.FixtureRequest, recipe: Path, tmp_path: Path) -> Path:
    """A recipe with the [study] table that the test's module has in STUDY."""
    path = tmp_path / "study.toml"
    path.write_text(recipe.read_text() + request.module.STUDY)
    return path


@pytest.fixture
def in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells one after the other in this process, but where a test kills processes."""
    if "kills" not in request.fixturenames:
        monkeypatch.setattr(run, "run_cells", cells_in_process)
