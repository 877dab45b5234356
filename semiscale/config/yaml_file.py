"""Read YAML files of keys and values."""

from pathlib import Path
from typing import Any

import yaml

from semiscale.common.errors import InvalidInputError
from semiscale.common.text import to_single_line


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Raises:
        InvalidInputError: The file cannot be read (SEMI-E101), is not UTF-8 (SEMI-E102), is not valid YAML or has a key
            twice (SEMI-E103), or does not contain keys and values (SEMI-E104).
    """
    try:
        loader = _UniqueKeyLoader(path.read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except OSError as error:
        raise InvalidInputError(
            "SEMI-E101", f"{path}: cannot read the file: {error.strerror}. Check the path and its permissions."
        ) from None
    except UnicodeDecodeError:
        raise InvalidInputError("SEMI-E102", f"{path}: the file is not UTF-8. Save it as UTF-8.") from None
    except RecursionError:
        raise InvalidInputError("SEMI-E103", f"{path}: the YAML is nested too deep. Correct the file.") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InvalidInputError(
            "SEMI-E103", f"{path}: not valid YAML: {line}{to_single_line(str(error.problem))}. Correct the file."
        ) from None
    # PyYAML raises ValueError for a date or a number that does not exist, such as 2026-02-31.
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidInputError(
            "SEMI-E103", f"{path}: not valid YAML: {to_single_line(str(error))}. Correct the file."
        ) from None
    if not isinstance(content, dict):
        content_type = "nothing" if content is None else type(content).__name__
        raise InvalidInputError(
            "SEMI-E104", f"{path}: expected keys and values, found {content_type}. See manifests/runs/demo.yaml."
        )
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys and takes plain values only.

    PyYAML would silently use the last value of a duplicate key.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            keys.add(key.value)
        return node
