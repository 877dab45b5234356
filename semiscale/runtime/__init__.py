"""How a stage runs: its config and digest, finding finished work, the ways in, and the fan-out."""
