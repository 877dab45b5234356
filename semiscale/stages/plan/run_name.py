"""Keep the run file under the name of its run, and check that the name is free."""

import json

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.config.run_parameters import OMIT_DEFAULT_FROM_DIGEST, RunParameters

# These keys change the bytes of no finished stage, so they may change between two attempts of one run.
MUTABLE_KEYS = {"workdir", "budget_hours", "pods", "retrain_above", "promotion", "champion"}


def run_file_uri(config: RunParameters) -> str:
    """Return the URI at which the run file of a name is kept."""
    return storage.join(config.workdir, config.name, "run.json")


def check_run_name_free(config: RunParameters) -> None:
    """Check that the workdir can be written and that no other run file has this name.

    Args:
        config: The run file.

    Raises:
        InvalidInputError: If the workdir cannot be written, or its run of this name has another run file.
    """
    uri = run_file_uri(config)
    try:
        stored = storage.read_or_none(uri)
        storage.write_bytes(storage.join(config.workdir, "stages", "plan", "writable"), b"")
    except OSError as error:
        raise InvalidInputError(
            "SEMI-E209",
            f"workdir: cannot write {uri}: {error.strerror or error}. Check the URI and the permissions.",
        ) from None
    current = config.model_dump(mode="json")
    earlier = json.loads(stored) if stored else current
    # A run file of an earlier version lacks the keys that were added later. Their defaults describe what it did.
    fields = type(config).model_fields
    defaults = {name: field.default for name, field in fields.items() if OMIT_DEFAULT_FROM_DIGEST in field.metadata}
    earlier = defaults | earlier
    # An earlier version also stored some of the mutable keys.
    keys = (current.keys() | earlier.keys()) - MUTABLE_KEYS
    if differing := sorted(key for key in keys if current.get(key) != earlier.get(key)):
        key = differing[0]
        raise InvalidInputError(
            "SEMI-E210",
            f"name: the workdir has a run {config.name!r} of a different run file ({key}: {earlier.get(key)!r}, now "
            f"{current.get(key)!r}). Give this run another name, or delete {uri} to keep its finished work under this "
            "name.",
        )


def save_run_file(config: RunParameters) -> None:
    """Write the run file under the name of the run, without its mutable keys."""
    storage.write_bytes(run_file_uri(config), json.dumps(config.model_dump(exclude=MUTABLE_KEYS), indent=1).encode())
