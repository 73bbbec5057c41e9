import pytest

from distrain.parallel.group import Group


@pytest.fixture(scope="module")
def group():
    with Group() as group:
        yield group
