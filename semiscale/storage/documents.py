"""Read strict JSON documents from a store."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from semiscale import storage
from semiscale.common.errors import InvalidInputError


class StrictDocument(BaseModel):
    """A strict, immutable JSON document."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# A digest becomes part of a path. The pattern keeps a digest in a foreign checkpoint or receipt from leading to another
# folder.
Digest = Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]{0,99}$")]


R = TypeVar("R", bound=StrictDocument)


def load_document(uri: str, kind: type[R]) -> R:
    """Read a document.

    Args:
        uri: The object.
        kind: Class of the document.

    Raises:
        InvalidInputError: There is no object, or it is not a document of this class.
    """
    data = storage.read_or_none(uri)
    if data is None:
        raise InvalidInputError("SEMI-E028", f"{uri}: there is no {kind.__name__}. Run the stage that writes it first.")
    try:
        return kind.model_validate_json(data)
    except ValueError:
        raise InvalidInputError(
            "SEMI-E029", f"{uri}: the object is not a {kind.__name__}. Use one that this version wrote."
        ) from None
