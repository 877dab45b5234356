"""What every stage shares: a config that knows its digest, finished work that is found, and the ways in.

A stage is a function `stage(config) -> Receipt`. It is called from a test or a notebook as it is, from a shell by
`command_line`, and from a kfp component by `in_component`.
"""

import json
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.common.errors import InvalidInputError
from semiscale.config.run_parameters import OMIT_DEFAULT_FROM_DIGEST

_RECEIPT = "receipt"


ReceiptUri = Annotated[str, _RECEIPT]


ReceiptUris = Annotated[list[str], _RECEIPT]


NOT_IN_DIGEST = "how"  # marks a field that says how work is done and not what comes of it: it is no part of the digest


class StageConfig(BaseModel):
    """The inputs of a stage: where it works, its parameters, and the receipts of the stages before it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    stage: ClassVar[str]
    on_device: ClassVar[bool] = False  # whether its pod has a GPU: what a budget counts

    workdir: str
    """URI of the folder that everything bulky goes under."""

    def digest(self) -> str:
        """Return what identifies this work: the stage, its parameters, and the digests of its receipts.

        The workdir is left out, and what is marked HOW: the same work elsewhere or in another manner is the same work.
        So is what is marked LATER, at its default: it is what was done before it could be chosen.
        A stage that depends on more of a receipt than its digest says, or on less, overrides this.
        """
        content: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if _RECEIPT in field.metadata:
                uris = value if isinstance(value, list) else [value]
                content[name] = [_receipt_digest(uri) for uri in uris if uri]
            elif name != "workdir" and NOT_IN_DIGEST not in field.metadata and not _is_omitted_default(field, value):
                content[name] = value
        return content_digest(self.stage, content)

    def task_name(self) -> str:
        """Return what tells this task from the others of its run, in the name of a file."""
        return self.stage

    def check_can_start(self) -> None:
        """Raise InvalidInputError where this task may not begin: asked before its object says that it did."""

    def folder(self) -> str:
        """Return the URI of the folder that this work, and no other, is kept in."""
        return storage.join(self.workdir, "stages", self.stage, self.digest())


def _is_omitted_default(field: FieldInfo, value: Any) -> bool:
    return OMIT_DEFAULT_FROM_DIGEST in field.metadata and value == field.default


def _receipt_digest(uri: str) -> str:
    data = storage.read_or_none(uri)
    if data is None:
        raise InvalidInputError(f"{uri}: no receipt here; run the stage that writes it first")
    return str(json.loads(data)["digest"])


def with_workdir_receipts(config: "C") -> "C":
    """Return a config with its receipts named where they lie in the workdir, for a process on another machine.

    A kfp component is given copies of them on its own disk.
    """

    def placed(uri: str) -> str:
        return storage.join(json.loads(storage.read_bytes(uri))["folder"], "receipt.json") if uri else ""

    moved: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if _RECEIPT in field.metadata:
            moved[name] = [placed(uri) for uri in value] if isinstance(value, list) else placed(value)
    return config.model_copy(update=moved)


C = TypeVar("C", bound=StageConfig)
