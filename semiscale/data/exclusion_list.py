"""The removal list: the keys of images that may never be selected, such as opt-outs and duplicates."""

from semiscale import storage
from semiscale.common.errors import InvalidInputError


def read_exclusion_list(uri: str) -> list[str]:
    """Read a removal list, one key a line, taken as it is: a key may begin with a space or hold any separator but
    a line feed. A byte order mark in front and the carriage returns of Windows belong to no key.

    Raises InvalidInputError where there is none or it is not UTF-8.
    """
    data = storage.read_or_none(uri)
    if data is None:
        raise InvalidInputError(f"remove: {uri}: no such file; expected one key a line")
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"remove: {uri}: byte {error.start} is not UTF-8; write the list as UTF-8") from None
    return sorted({line.removesuffix("\r") for line in lines} - {""})
