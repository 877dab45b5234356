"""Train: one trainer for all recipes of the paper."""
