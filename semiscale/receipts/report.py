"""Define the receipt of the report."""

from semiscale.receipts.base import Receipt


class ReportReceipt(Receipt):
    """Where the page and the numbers lie."""

    report: str
    results: str
