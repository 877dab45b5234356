"""Find the kind of an object in a workdir by its path.

Every path has exactly one kind.
"""

import io
import re
from typing import Any

import pyarrow.parquet as pq

HEX = "[0-9a-f]{16}"
# Kinds of JSON objects, by the pattern of their paths below the workdir.
JSON_KINDS = {
    "plan receipt": rf"stages/plan/{HEX}/receipt\.json|[^/]+/receipts/plan\.json",
    "training receipt": rf"stages/train/{HEX}/receipt\.json"
    r"|[^/]+/receipts/(teacher|pretrained|(baselines|students)-\d{3})\.json",
    "pod's score receipt": r"[^/]+/receipts/scores-\d{3}\.json|stages/score/[^/]+/pods\.json",
    "shard group receipt": rf"stages/score/[^/]+/{HEX}/receipt\.json",
    "selection receipt": rf"stages/merge/({HEX}/receipt|settled/{HEX})\.json|[^/]+/receipts/selection\.json",
    "packing receipt": rf"stages/pack/{HEX}/receipt\.json|[^/]+/receipts/packed\.json",
    "evaluation receipt": rf"stages/evaluate/{HEX}/receipt\.json|[^/]+/receipts/evaluation\.json",
    "promotion receipt": r"[^/]+/receipts/promotion\.json",
    "champion": r"champions/[^/]+\.json",
    "measurement": rf"[^/]+/measured/{HEX}\.json",
    "task": r"progress/[^/]+/[^/]+\.json",
    "model description": rf"stages/train/{HEX}/model\.json",
    "execution decision": r"stages/score/[^/]+/decision\.json",
    "training checkpoint": rf"stages/train/{HEX}/checkpoints/\d{{15}}-[0-9a-f]{{8}}\.json",
    "list of shards": rf"stages/plan/{HEX}/(labeled|train|validation|test)-shards\.json",
    "list of shard groups": rf"stages/plan/{HEX}/units\.json",
    "run parameters": r"[^/]+/run\.json",
}
# These are plain JSON without a type in the program. A test checks their form.
PLAIN_JSON_KINDS = {
    "shards of a shard group": rf"stages/plan/units/{HEX}\.json",
    "packed tars with their labels": rf"stages/pack/{HEX}/shards\.json",
    "results": r"[^/]+/results\.json",
}
PARQUET_KINDS = {
    "examined shard of a labeled set": rf"stages/plan/shards/{HEX}\.parquet",
    "labeled set": rf"stages/plan/{HEX}/(labeled|train|validation|test)\.parquet",
    "scores of a shard": rf"stages/score/[^/]+/parts/{HEX}\.parquet",
    "scores of a shard group": rf"stages/score/[^/]+/{HEX}/scores\.parquet",
    "places of a shard group": rf"stages/score/[^/]+/{HEX}/places\.parquet",
    "samples of a shard group": rf"stages/score/[^/]+/{HEX}/samples\.parquet",
    "selection": rf"stages/merge/{HEX}/selection\.parquet",
    "ledger of shards": rf"stages/merge/{HEX}/ledger\.parquet",
    "predictions": rf"stages/evaluate/predictions/{HEX}\.parquet",
}
OTHER_KINDS = {
    "packed tar": rf"stages/pack/{HEX}/packed-\d{{6}}\.tar",
    "tensors": rf"stages/train/{HEX}/(model|checkpoints/\d{{15}}-[0-9a-f]{{8}})\.safetensors",
    "curve": rf"stages/train/{HEX}/(metrics\.jsonl|events\.out\.tfevents\.\d{{17}}\.[^/]+)",
    "test of writing": r"stages/plan/writable",
    "report": r"[^/]+/report\.html",
}


def kind_of(path: str) -> str:
    """Return the kind of the object at a path below the workdir."""
    kinds = {**JSON_KINDS, **PLAIN_JSON_KINDS, **PARQUET_KINDS, **OTHER_KINDS}
    matches = [kind for kind, pattern in kinds.items() if re.fullmatch(pattern, path)]
    assert len(matches) == 1, f"{path}: kinds {matches}; expected one"
    return matches[0]


def parquet_schema(data: bytes) -> dict[str, Any]:
    """Return the columns, types and names of metadata of a Parquet file.

    The types are those of Parquet and those of Arrow.
    """
    file = pq.ParquetFile(io.BytesIO(data))
    arrow = file.schema_arrow
    leaves = len(file.schema.names)
    metadata = {key.decode() for key in file.metadata.metadata or {}}
    return {
        "columns": [[field.name, str(field.type), field.nullable] for field in arrow],
        "leaves": [
            [leaf.path, leaf.physical_type, str(leaf.logical_type)] for leaf in map(file.schema.column, range(leaves))
        ],
        "metadata": sorted(metadata),
    }
