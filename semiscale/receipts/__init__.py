"""Define the receipts that stages write, and summarize them in Markdown."""
