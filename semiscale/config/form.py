"""The form of the pipeline in Kubeflow's UI: the keys that people set, and one dict for all other keys.

`RunParameters` declares every key once. The form's fields, their types, defaults and descriptions are derived from it.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from types import UnionType
from typing import Annotated, Any, Dict, List, Literal, Union, get_args, get_origin  # noqa: UP035 - kfp's own types

from semiscale.common.errors import InvalidInputError, did_you_mean
from semiscale.config.run_parameters import RunParameters

FORM_KEYS = (
    *("name", "workdir", "labeled", "unlabeled", "test", "validation"),
    *("teacher_architecture", "student_architecture", "images_per_class", "classes_per_image"),
    *("teacher_images_processed", "pretrain_images_processed", "finetune_epochs", "seed", "pods"),
)
SETTINGS = "settings"
SETTINGS_DESCRIPTION = 'All other keys of a run file, as JSON: for example {"resolution": 288}. The plan checks them.'


def run_form(graph: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that takes keyword arguments the signature and the docstring of the form.

    kfp reads a pipeline's parameters from its signature, and their descriptions from its docstring.
    """
    fields = {name: RunParameters.model_fields[name] for name in FORM_KEYS}
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=_kfp_type(field.annotation),
            default=inspect.Parameter.empty if field.is_required() else field.default,
        )
        for name, field in fields.items()
    ]
    settings = inspect.Parameter(
        SETTINGS,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=Dict,  # noqa: UP006
        default={},
    )
    names = [*FORM_KEYS, SETTINGS]
    described = [f"        {name}: {field.description}" for name, field in fields.items()]

    @wraps(graph)
    def with_form(*values: Any) -> Any:
        return graph(**dict(zip(names, values, strict=True)))

    with_form.__dict__["__signature__"] = inspect.Signature([*parameters, settings])
    with_form.__annotations__ = {field.name: field.annotation for field in [*parameters, settings]}
    with_form.__doc__ = "\n".join(
        [
            inspect.getdoc(graph) or "",
            "",
            "    Args:",
            *described,
            f"        {SETTINGS}: {SETTINGS_DESCRIPTION}",
        ]
    )
    del with_form.__dict__["__wrapped__"]
    return with_form


def to_form(run: RunParameters) -> dict[str, Any]:
    """Return the form's arguments for a run: its fields, and in `settings` all other keys that are not the default."""
    other = {
        name: getattr(run, name)
        for name, field in RunParameters.model_fields.items()
        if name not in FORM_KEYS and getattr(run, name) != field.default
    }
    return {**{name: getattr(run, name) for name in FORM_KEYS}, SETTINGS: other}


def from_form(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a run as a run file has them, from the form's arguments.

    Raises:
        InvalidInputError: `settings` has an unknown key, or a key that is a field of the form.
    """
    settings = arguments.get(SETTINGS) or {}
    others = RunParameters.model_fields.keys() - set(FORM_KEYS)
    for name in settings:
        if name in FORM_KEYS:
            raise InvalidInputError("SEMI-E101", f"settings.{name}: this key is a field of the form. Set it there.")
        if name not in others:
            raise InvalidInputError("SEMI-E102", f"settings.{name}: This key is unknown{did_you_mean(name, others)}")
    return {**{name: arguments[name] for name in FORM_KEYS if name in arguments}, **settings}


def _kfp_type(annotation: Any) -> Any:
    """Return the type of a field as kfp's signatures have it: a list as `List`, a fixed choice as its own type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kfp_type(arguments[0])
    if origin is list:
        return List[_kfp_type(arguments[0])]  # type: ignore[misc]  # noqa: UP006
    if origin is Literal:
        return type(arguments[0])
    if origin in (Union, UnionType):
        raise TypeError(f"{annotation}: kfp takes no alternatives")
    return annotation
