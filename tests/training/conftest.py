from pathlib import Path

import pytest
from training.runs import write_inputs


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Folder with the data and the model configuration of a run."""
    write_inputs(tmp_path)
    return tmp_path
