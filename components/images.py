"""The two container images that all components run in; docker/ builds them.

CUDA: with torch, for what trains and scores. CPU: without it, for what lists, merges, packs and reports.
"""

import os

REPOSITORY = os.environ.get("SEMISCALE_IMAGES", "semiscale")
CUDA = f"{REPOSITORY}/python-cuda:0.1.0"
CPU = f"{REPOSITORY}/python-cpu:0.1.0"
