"""Keep the run file under the name of its run, and check that the name is free."""

import json

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.config.run_parameters import OMIT_DEFAULT_FROM_DIGEST, RunParameters

# These keys change the bytes of no finished stage, so they may change between two attempts of one run. The stored run
# file lacks them.
UNSTORED_KEYS = {"workdir", "budget_hours", "pods", "retrain_above", "promotion", "champion"}
# `max_failed_fraction` only decides whether a run continues. No digest of a model, score or selection has it. It is
# stored, because version 0.1.0 stored it and would take a run file without it for another one.
MUTABLE_KEYS = {*UNSTORED_KEYS, "max_failed_fraction"}


def run_file_uri(config: RunParameters) -> str:
    """Return the URI at which the run file of a name is kept."""
    return storage.join(config.workdir, config.name, "run.json")


def check_workdir_writable(workdir: str) -> None:
    """Check that the workdir can be written.

    Args:
        workdir: URI of the workdir.

    Raises:
        InvalidInputError: The workdir cannot be written (SEMI-E209), or its URI is not valid.
    """
    try:
        storage.write_bytes(storage.join(workdir, "stages", "plan", "writable"), b"")
    except InvalidInputError:
        raise
    except (OSError, SemiscaleError) as error:
        raise InvalidInputError(
            "SEMI-E209",
            f"workdir: {workdir} cannot be written: {_describe_store_error(error)}. "
            "Check the URI, the credentials and the permissions.",
        ) from None


def _describe_store_error(error: OSError | SemiscaleError) -> str:
    """Return the reason why an object cannot be written, without a full stop."""
    if isinstance(error, SemiscaleError):
        return error.message.rstrip(".")
    # The text of a store's FileNotFoundError is only the URI.
    if isinstance(error, FileNotFoundError) and not error.errno:
        return "there is no such bucket"
    return error.strerror or str(error)


def check_run_name_free(config: RunParameters) -> None:
    """Check that the workdir can be written and that no other run file has this name.

    Args:
        config: The run file.

    Raises:
        InvalidInputError: If the workdir cannot be written, or its run of this name has another run file.
    """
    check_workdir_writable(config.workdir)
    uri = run_file_uri(config)
    stored = storage.read_or_none(uri)
    current = config.model_dump(mode="json")
    earlier = json.loads(stored) if stored else current
    # A run file of an earlier version lacks the keys that were added later. Their defaults describe what it did.
    fields = type(config).model_fields
    defaults = {name: field.default for name, field in fields.items() if OMIT_DEFAULT_FROM_DIGEST in field.metadata}
    earlier = defaults | earlier
    # An earlier version stored more of the mutable keys.
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
    """Write the run file under the name of the run, without the unstored keys."""
    storage.write_bytes(run_file_uri(config), json.dumps(config.model_dump(exclude=UNSTORED_KEYS), indent=1).encode())
