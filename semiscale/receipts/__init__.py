"""The documents that stages leave, one module for each stage, and their summaries in Markdown."""
