"""Write and list small objects in any store."""

from semiscale import storage


def write_objects(folder: str, *names: str) -> None:
    """Write objects below a folder, each with its own name as content."""
    for name in names:
        storage.write_bytes(storage.join(folder, name), name.encode())


def list_names(folder: str) -> list[str]:
    """List the objects below a folder, relative to it."""
    return [entry.uri.removeprefix(folder + "/") for entry in storage.list_objects(folder)]
