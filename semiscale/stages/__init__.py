"""The stages of the pipeline, one package each. A stage is a function from a config to a receipt."""
