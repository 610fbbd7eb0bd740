from collections.abc import Iterator
from typing import Any

import pytest
from serving.api.live import Live, live_server
from tiny_model import save_checkpoint

from lightning_attention.inference import load


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model in float64, so that greedy answers do not depend on the batch, and its tokenizer."""
    model, tokenizer = load(save_checkpoint(tmp_path_factory.mktemp("run")))
    return model.cpu().double(), tokenizer


@pytest.fixture(scope="module")
def live(loaded: Any) -> Iterator[Live]:
    with live_server(*loaded) as server:
        yield server
        assert server.is_idle()
