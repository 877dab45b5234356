"""What `python pipeline.py VERB` does: one module a verb. Verbs may import kfp; programs may not."""
