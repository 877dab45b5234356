"""Load run files, which have the parameters of a run and its hardware."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.config.form import to_form
from semiscale.config.resources import Resources
from semiscale.config.run_parameters import INPUT_URI_KEYS, RunParameters
from semiscale.config.validation_errors import first_detail, format_validation_error, names_at
from semiscale.config.yaml_file import read_yaml_mapping


class RunConfig(RunParameters):
    """Content of a run file.

    The parameters of a run are arguments of the pipeline. `hardware` is applied when the pipeline is compiled.
    """

    hardware: Resources = Field(default=Resources(), description="What the stages run on, on a cluster.")

    def with_absolute_uris(self) -> "RunConfig":
        """Return a copy whose paths are absolute, so that they mean the same in every process."""

        def absolute(value: str | list[str]) -> str | list[str]:
            if isinstance(value, list):
                return [storage.absolute_uri(uri) for uri in value]
            return storage.absolute_uri(value) if value else value

        return self.model_copy(update={name: absolute(getattr(self, name)) for name in ("workdir", *INPUT_URI_KEYS)})

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of the run, which are all keys except `hardware`."""
        return {name: getattr(self, name) for name in RunParameters.model_fields}

    def pipeline_arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline.

        Returns:
            The fields of the form by name. `settings` has all other keys.
        """
        return to_form(self)


def load_run_config(path: Path) -> RunConfig:
    """Read and check a run file.

    Raises:
        InvalidInputError: The file is not a run file. The message is one line that names the key (SEMI-E100 to
            SEMI-E104).
    """
    return validate_run_config(read_yaml_mapping(path), where=str(path))


def validate_run_config(content: dict[str, Any], where: str) -> RunConfig:
    """Check the keys and values of a run file.

    Args:
        content: Keys and values.
        where: Path of the run file, for errors.

    Raises:
        InvalidInputError: A key or value is not valid. The message is one line that names the key (SEMI-E100).
    """
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        names = names_at(RunConfig, first_detail(error)["loc"])
        raise InvalidInputError("SEMI-E100", f"{where}: {format_validation_error(error, names)}") from None
