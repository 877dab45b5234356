"""Read YAML files of keys and values."""

from pathlib import Path
from typing import Any

import yaml

from semiscale.common.errors import InvalidInputError
from semiscale.common.text import to_single_line


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values. Raises InvalidInputError where it is none, or where a key is there twice."""
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
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that is none
        raise InvalidInputError(
            "SEMI-E103", f"{path}: not valid YAML: {to_single_line(str(error))}. Correct the file."
        ) from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise InvalidInputError(
            "SEMI-E104", f"{path}: expected keys and values, found {found}. See manifests/runs/demo.yaml."
        )
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in plain values alone; a key that is given twice is an error instead of the last one's silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        once: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in once:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            once.add(key.value)
        return node
