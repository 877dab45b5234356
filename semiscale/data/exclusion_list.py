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
        raise InvalidInputError(
            "SEMI-E064", f"remove: {uri}: The file does not exist. Give a text file with one key per line."
        )
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            "SEMI-E065", f"remove: {uri}: Byte {error.start} is not UTF-8. Write the list as UTF-8."
        ) from None
    return sorted({line.removesuffix("\r") for line in lines} - {""})
