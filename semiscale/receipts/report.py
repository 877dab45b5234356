"""Define the receipt of the report."""

from semiscale.receipts.base import Receipt


class ReportReceipt(Receipt):
    """Receipt of the report.

    Attributes:
        report: URI of the HTML page.
        results: URI of the JSON file of the results.
    """

    report: str
    results: str
