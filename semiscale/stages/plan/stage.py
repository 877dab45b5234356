"""Plan: list and check every input before anything costs money, and group the pool into units.

The bulky parts (indexes of the labeled sets, the ledger of units) go to the workdir; the receipt names them.
"""

import json
from collections import Counter
from typing import ClassVar

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.common.errors import InvalidInputError
from semiscale.config import architectures
from semiscale.config.run_parameters import OMIT_DEFAULT_FROM_DIGEST, RunParameters
from semiscale.data import video_decoding
from semiscale.data.exclusion_list import read_exclusion_list
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields, ShardGroup
from semiscale.models import checkpoint_metadata
from semiscale.observability.progress import Progress, log_info
from semiscale.receipts.plan import PlanReceipt
from semiscale.runtime.run_once import run_once
from semiscale.runtime.stage_config import StageConfig
from semiscale.scores import score_file
from semiscale.stages.plan import shard_groups
from semiscale.stages.plan.concurrent_runs import check_no_concurrent_run
from semiscale.stages.plan.labeled_sets import LabeledSet, stratified_split, validate_labeled_set, write_split

MAX_FAILURES_LISTED = 100  # in the receipt, which must stay small
# Between two tries of one run: what is no part of any finished stage's bytes.
MUTABLE_KEYS = {"workdir", "budget_hours", "pods", "retrain_above", "promotion", "champion"}


class PlanConfig(RunParameters, StageConfig):
    """All of the run file: what is wrong anywhere is refused here."""

    stage: ClassVar[str] = "plan"

    def check_can_start(self) -> None:
        """A run begins with its plan's object: while another of its name is at work, there must be none."""
        check_no_concurrent_run(self.workdir, self.name)


def plan(config: PlanConfig, with_pool: bool = True) -> PlanReceipt:
    """List, decode and check the labeled sets, list the pool, and write both down.

    What selects nothing is planned without the pool, which need not be there. Raises InvalidInputError for every
    kind of bad
    input (the README lists them); nothing has been trained by then.
    """
    validate_models(config)
    if with_pool:
        shard_groups.require_unlabeled(config.unlabeled)
    if config.remove:
        read_exclusion_list(config.remove)  # refused here rather than after the scan
    check_run_name_free(config)
    columns = SampleFields(config.image_column, config.label_column, config.frames > 0)
    progress = Progress("plan", 0)
    with progress.timer("decode"):
        sets = load_labeled_sets(config, columns, progress)
    classes = resolve_class_names(config, sets["labeled"])
    check_classes_per_image(config.classes_per_image, len(classes))
    sets = {name: normalize_labels(found, classes) for name, found in sets.items()}
    for found in sets.values():
        check_classes_match(found, classes)
    validate_teacher(config, classes)
    if "validation" not in sets:
        sets["labeled"], sets["validation"] = stratified_split(sets["labeled"], config.validation_fraction, config.seed)
    pool_columns = SampleFields(config.image_column, "", config.frames > 0)
    with progress.timer("list"):
        units = shard_groups.build_shard_groups(config.unlabeled, config.workdir, pool_columns) if with_pool else []
    storage.write_bytes(run_config_uri(config), json.dumps(config.model_dump(exclude=MUTABLE_KEYS), indent=1).encode())
    return write_plan(config, classes, sets, units)


def validate_models(config: PlanConfig) -> None:
    """Raise InvalidInputError for an architecture that does not see the samples, and for weights that cannot be read
    as asked."""
    architectures.validate_architectures(config)
    validate_video_options(config)
    for key in ("teacher_checkpoint", "teacher_start_weights", "student_start_weights"):
        if uri := getattr(config, key):
            checkpoint_metadata.checkpoint_version(uri, key)
    if config.teacher_checkpoint and config.teacher_start_weights:
        raise InvalidInputError(
            "teacher_start_weights: a ready-made teacher is not trained; leave it out, or teacher_checkpoint"
        )
    if config.teacher_classes and not config.teacher_checkpoint:
        raise InvalidInputError(
            "teacher_classes: says what a ready-made teacher's outputs mean; name it in teacher_checkpoint"
        )


def validate_video_options(config: PlanConfig) -> None:
    """Raise InvalidInputError where a run of videos asks for what is done to images alone, or PyAV is missing."""
    if not config.frames:
        return
    video_decoding.require_pyav()
    for key in ("augmentation", "baseline_recipe", "decoder"):
        default = PlanConfig.model_fields[key].default
        if (given := getattr(config, key)) != default:
            raise InvalidInputError(
                f"{key}: {given} is for images; leave it out: clips begin and are cut at random places"
            )


def validate_teacher(config: PlanConfig, classes: list[str]) -> None:
    """Raise InvalidInputError where a ready-made teacher is known to be of other classes or pixels than this run."""
    if config.teacher_checkpoint:
        wanted = checkpoint_metadata.CheckpointMetadata(
            architecture=config.teacher_architecture,
            classes=classes,
            preprocessing=Preprocessing(
                resolution=config.resolution, augmentation=config.augmentation, frames=config.clip_frames("teacher")
            ),
            recipe="teacher",
            digest="",
        )
        uri = checkpoint_metadata.parse_checkpoint_ref(config.teacher_checkpoint, "teacher_checkpoint").uri
        checkpoint_metadata.check_compatible(uri, config.teacher_classes, wanted)


def run_config_uri(config: PlanConfig) -> str:
    """Return where the run file that a name stands for is kept."""
    return storage.join(config.workdir, config.name, "run.json")


def check_run_name_free(config: PlanConfig) -> None:
    """Raise InvalidInputError where another run file has this run's name, or where nothing can be written."""
    uri = run_config_uri(config)
    try:
        known = storage.read_or_none(uri)
        storage.write_bytes(storage.join(config.workdir, "stages", "plan", "writable"), b"")
    except OSError as error:
        raise InvalidInputError(f"workdir: cannot write {uri}: {error.strerror or error}") from None
    mine = config.model_dump(mode="json")
    other = json.loads(known) if known else mine
    keys = (mine.keys() | other.keys()) - MUTABLE_KEYS  # an earlier version kept more of them
    other = {
        name: field.default
        for name, field in PlanConfig.model_fields.items()
        if OMIT_DEFAULT_FROM_DIGEST in field.metadata
    } | other
    differing = sorted(key for key in keys if mine.get(key) != other.get(key))
    if differing:
        key = differing[0]
        raise InvalidInputError(
            f"name: the workdir has a run {config.name!r} of a different run file ({key}: {other.get(key)!r}, now "
            f"{mine.get(key)!r}); give this run another name, or delete {uri} to keep its finished work under this one"
        )


def load_labeled_sets(config: PlanConfig, columns: SampleFields, progress: Progress) -> dict[str, LabeledSet]:
    """Read the labeled, validation and test sets that the run file names."""
    given = {"labeled": config.labeled, "validation": config.validation, "test": config.test}
    folder = storage.join(config.workdir, "stages", "plan", "shards")
    found = {name: validate_labeled_set(name, uris, columns, folder, progress) for name, uris in given.items() if uris}
    for one in found.values():
        one.check_failure_rate(config.max_failed_fraction)
    return found


def resolve_class_names(config: PlanConfig, labeled: LabeledSet) -> list[str]:
    """Return the class names in label order: the run file's list, else the labels found, sorted, numbers by value."""
    if config.classes:
        return checkpoint_metadata.read_class_names(config.classes, "classes")
    labels = {row.label for row in labeled.rows}
    return (
        sorted(labels, key=lambda label: (int(label), label)) if all(map(is_class_number, labels)) else sorted(labels)
    )


def is_class_number(label: str) -> bool:
    """Say whether a label is the number of a class: up to nine ASCII digits."""
    return label.isascii() and label.isdecimal() and len(label) <= 9


def normalize_labels(found: LabeledSet, classes: list[str]) -> LabeledSet:
    """Replace the labels that are numbers of classes by the classes' names."""
    known = set(classes)

    def name(label: str) -> str:
        return (
            classes[int(label)]
            if label not in known and is_class_number(label) and int(label) < len(classes)
            else label
        )

    rows = [type(row)(row.shard, row.index, row.key, name(row.label)) for row in found.rows]
    return LabeledSet(found.name, found.shards, rows, found.failures)


def check_classes_match(found: LabeledSet, classes: list[str]) -> None:
    """Raise InvalidInputError where a set's classes are not exactly the run's."""
    labels = {row.label for row in found.rows}
    unknown, absent = sorted(labels - set(classes)), sorted(set(classes) - labels)
    if unknown or absent:
        only = f"it has {', '.join(unknown[:5])}, unknown to the labeled set" if unknown else ""
        lacks = f"class {', '.join(absent[:5])} has no image in it" if absent else ""
        raise InvalidInputError(f"{found.name}: its classes differ: {'; '.join(filter(None, [only, lacks]))}")
    if len(classes) < 2:
        raise InvalidInputError(f"labeled: found {len(classes)} class; expected two or more")
    if len(classes) > score_file.MAX_CLASSES:
        raise InvalidInputError(f"labeled: found {len(classes):,} classes; expected at most {score_file.MAX_CLASSES:,}")


def check_classes_per_image(classes_per_image: int, classes: int) -> None:
    """Raise InvalidInputError where more classes of each image would be kept than a score file can number."""
    if min(classes_per_image, classes) > score_file.MAX_CLASSES_KEPT:
        raise InvalidInputError(
            f"classes_per_image: {classes_per_image}; expected at most {score_file.MAX_CLASSES_KEPT}"
        )


def write_plan(
    config: PlanConfig, classes: list[str], sets: dict[str, LabeledSet], units: list[ShardGroup]
) -> PlanReceipt:
    """Write the splits and the ledger, and return the receipt; the same inputs give the same folder."""
    pool_digest = content_digest([unit.digest for unit in units])
    labeled = [[shard.digest() for shard in found.shards] for found in sets.values()]
    identity = content_digest(config.digest(), classes, labeled, pool_digest)

    def work(folder: str) -> dict[str, object]:
        train = write_split(sets["labeled"], classes, folder)
        validation = write_split(sets["validation"], classes, folder)
        test = write_split(sets["test"], classes, folder)
        uri = storage.join(folder, "units.json")
        storage.write_bytes(uri, json.dumps([unit.model_dump() for unit in units]).encode())
        failures = [failure for found in sets.values() for failure in found.failures]
        classes_per_image = min(config.classes_per_image, len(classes))
        return {
            "digest": content_digest(classes, train.digest, validation.digest),
            "pool_digest": pool_digest,
            "name": config.name,
            "classes": classes,
            "train": train,
            "validation": validation,
            "test": test,
            "units": uri,
            "shards": sum(len(unit.shards) for unit in units),
            "size_bytes": sum(shard.size_bytes for unit in units for shard in unit.shards),
            "pods": min(config.pods, sum(len(unit.shards) for unit in units)),
            "classes_per_image": classes_per_image,
            "failed": dict(Counter(failure.reason for failure in failures)),
            "failures": failures[:MAX_FAILURES_LISTED],
            "notes": plan_notes(config, len(classes), train.samples, validation.samples),
            "run": config.model_dump(),
        }

    receipt = run_once(config, PlanReceipt, work, storage.join(config.workdir, "stages", "plan", identity))
    for note in receipt.notes:
        log_info("plan", note)
    for failure in receipt.failures:
        log_info("plan", f"not used: {failure.shard} {failure.key}: {failure.reason}")
    return receipt


def plan_notes(config: PlanConfig, classes: int, train: int, validation: int) -> list[str]:
    """Say what was decided for the user."""
    said = []
    if config.classes_per_image > classes:
        said.append(f"classes_per_image {config.classes_per_image} clamped to the {classes} classes there are")
    if not config.validation:
        said.append(
            f"no validation set given: held out {validation} of {train + validation} labeled images, stratified"
        )
    return said
