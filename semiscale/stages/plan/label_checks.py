"""Find the class names of a run, and check the labels of its sets against them."""

from dataclasses import replace

from semiscale.common.errors import InvalidInputError
from semiscale.config.run_parameters import RunParameters
from semiscale.models import checkpoint_metadata
from semiscale.scores import score_file
from semiscale.stages.plan.labeled_sets import LabeledSet

MAX_CLASS_NUMBER_DIGITS = 9
MAX_NAMES_IN_ERROR = 5


def resolve_class_names(config: RunParameters, labeled: LabeledSet) -> list[str]:
    """Return the class names in label order.

    Args:
        config: The run file. Its list of `classes` is used if there is one.
        labeled: The labeled set. Without a list, its labels are the classes.

    Returns:
        The list of the run file, or the sorted labels. Labels that are all numbers are sorted by value.

    Raises:
        InvalidInputError: If the list of classes cannot be read.
    """
    if config.classes:
        return checkpoint_metadata.read_class_names(config.classes, "classes")
    labels = {row.label for row in labeled.rows}
    if all(map(is_class_number, labels)):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def is_class_number(label: str) -> bool:
    """Return whether a label is the number of a class: up to nine ASCII digits."""
    return label.isascii() and label.isdecimal() and len(label) <= MAX_CLASS_NUMBER_DIGITS


def normalize_labels(labeled: LabeledSet, classes: list[str]) -> LabeledSet:
    """Replace labels that are class numbers by the names of the classes.

    Args:
        labeled: The set whose labels are replaced.
        classes: Class names in label order. A label that is itself a class name stays as it is.

    Returns:
        A copy of the set. Numbers without a class stay as they are.
    """
    class_names = set(classes)

    def class_name(label: str) -> str:
        if label not in class_names and is_class_number(label) and int(label) < len(classes):
            return classes[int(label)]
        return label

    return replace(labeled, rows=[replace(row, label=class_name(row.label)) for row in labeled.rows])


def check_classes_match(labeled: LabeledSet, classes: list[str], source: str) -> None:
    """Check that the classes of a set are exactly those of the run.

    Args:
        labeled: The set, with normalized labels.
        classes: Class names of the run.
        source: Run-file key that the class names come from: `classes`, or `labeled` without a list.

    Raises:
        InvalidInputError: If the set has another class or lacks one, or if the run has one class or too many.
    """
    labels = {row.label for row in labeled.rows}
    unknown, absent = sorted(labels - set(classes)), sorted(set(classes) - labels)
    if unknown or absent:
        owner = "the list of the key classes" if source == "classes" else "the labeled set"
        differences = []
        if unknown:
            differences.append(f"Its class {_join_names(unknown)} is not in {owner}.")
        if absent:
            differences.append(f"It has no sample of class {_join_names(absent)}, which is in {owner}.")
        raise InvalidInputError(
            "SEMI-E211",
            f"{labeled.name}: {' '.join(differences)} Give every set the same classes"
            f"{', and list all of them in classes' if source == 'classes' else ''}.",
        )
    if len(classes) < 2:
        raise InvalidInputError("SEMI-E212", f"labeled: {len(classes)} class was found. Give two classes or more.")
    if len(classes) > score_file.MAX_CLASSES:
        raise InvalidInputError(
            "SEMI-E213",
            f"labeled: {len(classes):,} classes were found. Give at most {score_file.MAX_CLASSES:,} classes.",
        )


def _join_names(names: list[str]) -> str:
    """Return the first names, with a comma between them."""
    return ", ".join(names[:MAX_NAMES_IN_ERROR]) + (", …" if len(names) > MAX_NAMES_IN_ERROR else "")


def check_classes_per_image(classes_per_image: int, classes: int) -> None:
    """Check that a score file can number the classes that are kept for an image.

    Args:
        classes_per_image: P of the run file.
        classes: Number of classes of the run, to which P is limited.

    Raises:
        InvalidInputError: If more classes would be kept than `score_file.MAX_CLASSES_KEPT`.
    """
    if min(classes_per_image, classes) > score_file.MAX_CLASSES_KEPT:
        raise InvalidInputError(
            "SEMI-E214",
            f"classes_per_image: {classes_per_image} is too large. Set it to {score_file.MAX_CLASSES_KEPT} or less.",
        )
