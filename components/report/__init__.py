"""The contract of `report`."""
