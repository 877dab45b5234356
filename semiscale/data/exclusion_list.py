"""Read the removal list: keys of images that must never be selected.

Typical entries are opt-outs and duplicates.
"""

from semiscale import storage
from semiscale.common.errors import InvalidInputError


def read_exclusion_list(uri: str) -> list[str]:
    """Read a removal list, which has one key per line.

    A key is taken as it is. It may begin with a space, and it may contain any separator except a line feed. A byte
    order mark at the beginning and the carriage returns of Windows are not part of a key.

    Args:
        uri: A UTF-8 text file.

    Returns:
        The keys, sorted and without duplicates.

    Raises:
        InvalidInputError: The file does not exist, or it is not UTF-8.

    Cost:
        Memory for the file and its keys.
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
