"""What all tests share: the ISAs of this machine."""

import pytest


@pytest.fixture(scope="session")
def available_isas() -> set[str]:
    from fusedconvbn import raw

    return {row.isa for row in raw.kernels() if row.available}
