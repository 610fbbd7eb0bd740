from collections.abc import Iterator

import pytest
from distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    processes = Ranks(str(tmp_path_factory.mktemp("ranks")))
    yield processes
    processes.close()
