"""Fixtures of the tests of the report."""

import pytest

from semiscale.receipts.report import ReportReceipt
from tests.support.reports import write_report, write_run


@pytest.fixture(scope="session")
def written_report(tmp_path_factory: pytest.TempPathFactory) -> ReportReceipt:
    """Write the report of a finished run once for all tests."""
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, write_run(folder))
