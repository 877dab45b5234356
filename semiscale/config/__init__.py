"""The run file: its keys, the form of the pipeline, the hardware, and reading YAML."""
