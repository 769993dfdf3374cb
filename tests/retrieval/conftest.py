import pytest

from tests.retrieval.world import make_data, make_lists
from ulmrec_hf.tables import LeaveOneOut, Sequences


@pytest.fixture(scope="session")
def data() -> LeaveOneOut:
    return make_data(make_lists())


@pytest.fixture(scope="session")
def sequences(data) -> Sequences:
    return data.sequences
