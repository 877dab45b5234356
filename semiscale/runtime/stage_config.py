"""The base class of the stages' configs: inputs, digest, and the folder that the work is kept in."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.common.errors import InvalidInputError
from semiscale.config.run_parameters import OMIT_DEFAULT_FROM_DIGEST, RunParameters

_RECEIPT = "receipt"
ReceiptUri = Annotated[str, _RECEIPT]
ReceiptUris = Annotated[list[str], _RECEIPT]
# Marks a field that says how work is done and not what comes of it. It is not part of the digest.
NOT_IN_DIGEST = "how"
# Marks a field that has the name of a run-file key and does not take its value.
NOT_FROM_RUN = "own"


class StageConfig(BaseModel):
    """The inputs of a stage: where it works, its parameters, and the receipts of the stages before it.

    A field with the name of a run-file key takes that key's value in a pipeline, unless it is marked NOT_FROM_RUN.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    stage: ClassVar[str]
    # Whether the stage's pod has a GPU. A budget counts these pods.
    on_device: ClassVar[bool] = False
    # Whether several pods share the stage's work, so that the others take over the work of one that fails.
    shares_work: ClassVar[bool] = False

    workdir: str
    """URI of the folder for all results."""

    @classmethod
    def from_run(cls, run: RunParameters, given: Mapping[str, Any]) -> Self:
        """Return the config of this stage in a run.

        Args:
            run: The run's parameters. Fields of the same name are filled in from them.
            given: Receipts, and what else the task is given. They take precedence.
        """
        shared = {
            name: getattr(run, name)
            for name, field in cls.model_fields.items()
            if name in RunParameters.model_fields and not is_receipt_field(field) and NOT_FROM_RUN not in field.metadata
        }
        return cls.model_validate({**shared, **given})

    def digest(self) -> str:
        """Return the digest that identifies this work: the stage, its parameters and the digests of its receipts.

        The workdir and fields marked NOT_IN_DIGEST are left out: the same work elsewhere, or done in another way, is
        the same work. A field marked OMIT_DEFAULT_FROM_DIGEST is left out at its default: older work was done like that
        before the field existed. A stage whose result depends on more or less of a receipt overrides this method.
        """
        content: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if is_receipt_field(field):
                uris = value if isinstance(value, list) else [value]
                content[name] = [_receipt_digest(uri) for uri in uris if uri]
            elif name != "workdir" and NOT_IN_DIGEST not in field.metadata and not _is_omitted_default(field, value):
                content[name] = value
        return content_digest(self.stage, content)

    def task_name(self) -> str:
        """Return the name of this task, which is unique in its run and a part of file names."""
        return self.stage

    def check_can_start(self) -> None:
        """Raise InvalidInputError if this task may not start. Called before its status object is written."""

    def folder(self) -> str:
        """Return the URI of the folder of this work. No other work is kept in it."""
        return storage.join(self.workdir, "stages", self.stage, self.digest())


def is_receipt_field(field: FieldInfo) -> bool:
    """Return whether a field of a config holds the URI of a receipt, or a list of them."""
    return _RECEIPT in field.metadata


def _is_omitted_default(field: FieldInfo, value: Any) -> bool:
    return OMIT_DEFAULT_FROM_DIGEST in field.metadata and value == field.default


def _receipt_digest(uri: str) -> str:
    data = storage.read_or_none(uri)
    if data is None:
        raise InvalidInputError("SEMI-E010", f"{uri}: there is no receipt. Run the stage that writes it first.")
    return str(json.loads(data)["digest"])


def with_workdir_receipts(config: "C") -> "C":
    """Return a config whose receipts are named by their URIs in the workdir, for a process on another machine.

    A kfp component is given copies of receipts on its own disk.
    """

    def workdir_uri(uri: str) -> str:
        return storage.join(json.loads(storage.read_bytes(uri))["folder"], "receipt.json") if uri else ""

    moved: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if is_receipt_field(field):
            moved[name] = [workdir_uri(uri) for uri in value] if isinstance(value, list) else workdir_uri(value)
    return config.model_copy(update=moved)


C = TypeVar("C", bound=StageConfig)
