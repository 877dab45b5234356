"""Checks of the style rules that ruff does not have."""
