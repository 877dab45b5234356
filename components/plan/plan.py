"""Plan: list and check every input before anything costs money, and group the pool into units.

The bulky parts (indexes of the labeled sets, the ledger of units) go to the workdir; the receipt names them.
"""

import json
from collections import Counter
from typing import ClassVar

from components.plan import ledger
from components.plan.labeled import LabeledSet, examine, hold_out, write_split
from components.plan.overlap import refuse_overlap
from components.shared import architectures, checkpoints, clips, scores, storage
from components.shared.errors import Refused
from components.shared.progress import Progress, say
from components.shared.receipts import PlanReceipt, Preprocessing
from components.shared.removal import read_keys
from components.shared.runfile import LATER, Parameters
from components.shared.shards import Columns, Unit
from components.shared.stage import StageConfig, digest, once

MAX_FAILURES_LISTED = 100  # in the receipt, which must stay small
# Between two tries of one run: what is no part of any finished stage's bytes.
MAY_CHANGE = {"workdir", "budget_hours", "pods", "retrain_above", "promotion", "champion"}


class PlanConfig(Parameters, StageConfig):
    """All of the run file: what is wrong anywhere is refused here."""

    stage: ClassVar[str] = "plan"

    def admit(self) -> None:
        """A run begins with its plan's object: while another of its name is at work, there must be none."""
        refuse_overlap(self.workdir, self.name)


def plan(config: PlanConfig, with_pool: bool = True) -> PlanReceipt:
    """List, decode and check the labeled sets, list the pool, and write both down.

    What selects nothing is planned without the pool, which need not be there. Raises Refused for every kind of bad
    input (the README lists them); nothing has been trained by then.
    """
    refuse_models(config)
    if with_pool:
        ledger.refuse_none(config.unlabeled)
    if config.remove:
        read_keys(config.remove)  # refused here rather than after the scan
    refuse_other_run(config)
    columns = Columns(config.image_column, config.label_column, config.frames > 0)
    progress = Progress("plan", 0)
    with progress.timed("decode"):
        sets = labeled_sets(config, columns, progress)
    classes = class_names(config, sets["labeled"])
    refuse_many_kept(config.classes_per_image, len(classes))
    sets = {name: canonical(found, classes) for name, found in sets.items()}
    for found in sets.values():
        refuse_other_classes(found, classes)
    refuse_teacher(config, classes)
    if "validation" not in sets:
        sets["labeled"], sets["validation"] = hold_out(sets["labeled"], config.validation_fraction, config.seed)
    pool_columns = Columns(config.image_column, "", config.frames > 0)
    with progress.timed("list"):
        units = ledger.draw_up(config.unlabeled, config.workdir, pool_columns) if with_pool else []
    storage.write(run_uri(config), json.dumps(config.model_dump(exclude=MAY_CHANGE), indent=1).encode())
    return write(config, classes, sets, units)


def refuse_models(config: PlanConfig) -> None:
    """Raise Refused for an architecture that does not see the samples, and for weights that cannot be read as asked."""
    architectures.refuse_unlike_samples(config)
    refuse_images_ways(config)
    for key in ("teacher_checkpoint", "teacher_start_weights", "student_start_weights"):
        if uri := getattr(config, key):
            checkpoints.version(uri, key)
    if config.teacher_checkpoint and config.teacher_start_weights:
        raise Refused("teacher_start_weights: a ready-made teacher is not trained; leave it out, or teacher_checkpoint")
    if config.teacher_classes and not config.teacher_checkpoint:
        raise Refused("teacher_classes: says what a ready-made teacher's outputs mean; name it in teacher_checkpoint")


def refuse_images_ways(config: PlanConfig) -> None:
    """Raise Refused where a run of videos asks for what is done to images alone, or PyAV is missing."""
    if not config.frames:
        return
    clips.refuse_without_av()
    for key in ("augmentation", "baseline_recipe", "decoder"):
        default = PlanConfig.model_fields[key].default
        if (given := getattr(config, key)) != default:
            raise Refused(f"{key}: {given} is for images; leave it out: clips begin and are cut at random places")


def refuse_teacher(config: PlanConfig, classes: list[str]) -> None:
    """Raise Refused where a ready-made teacher is known to be of other classes or pixels than this run."""
    if config.teacher_checkpoint:
        wanted = checkpoints.Description(
            architecture=config.teacher_architecture,
            classes=classes,
            preprocessing=Preprocessing(
                resolution=config.resolution, augmentation=config.augmentation, frames=config.frames_of("teacher")
            ),
            recipe="teacher",
            digest="",
        )
        uri = checkpoints.pinned(config.teacher_checkpoint, "teacher_checkpoint").uri
        checkpoints.refuse_unlike(uri, config.teacher_classes, wanted)


def run_uri(config: PlanConfig) -> str:
    """Return where the run file that a name stands for is kept."""
    return storage.join(config.workdir, config.name, "run.json")


def refuse_other_run(config: PlanConfig) -> None:
    """Raise Refused where another run file has this run's name, or where nothing can be written."""
    uri = run_uri(config)
    try:
        known = storage.read_if_there(uri)
        storage.write(storage.join(config.workdir, "stages", "plan", "writable"), b"")
    except OSError as error:
        raise Refused(f"workdir: cannot write {uri}: {error.strerror or error}") from None
    mine = config.model_dump(mode="json")
    other = json.loads(known) if known else mine
    keys = (mine.keys() | other.keys()) - MAY_CHANGE  # an earlier version kept more of them
    other = {name: field.default for name, field in PlanConfig.model_fields.items() if LATER in field.metadata} | other
    differing = sorted(key for key in keys if mine.get(key) != other.get(key))
    if differing:
        key = differing[0]
        raise Refused(
            f"name: the workdir has a run {config.name!r} of a different run file ({key}: {other.get(key)!r}, now "
            f"{mine.get(key)!r}); give this run another name, or delete {uri} to keep its finished work under this one"
        )


def labeled_sets(config: PlanConfig, columns: Columns, progress: Progress) -> dict[str, LabeledSet]:
    """Read the labeled, validation and test sets that the run file names."""
    given = {"labeled": config.labeled, "validation": config.validation, "test": config.test}
    folder = storage.join(config.workdir, "stages", "plan", "shards")
    found = {name: examine(name, uris, columns, folder, progress) for name, uris in given.items() if uris}
    for one in found.values():
        one.refuse_above(config.max_failed_fraction)
    return found


def class_names(config: PlanConfig, labeled: LabeledSet) -> list[str]:
    """Return the class names in label order: the run file's list, else the labels found, sorted, numbers by value."""
    if config.classes:
        return checkpoints.class_names(config.classes, "classes")
    labels = {row.label for row in labeled.rows}
    return sorted(labels, key=lambda label: (int(label), label)) if all(map(is_number, labels)) else sorted(labels)


def is_number(label: str) -> bool:
    """Say whether a label is the number of a class: up to nine ASCII digits."""
    return label.isascii() and label.isdecimal() and len(label) <= 9


def canonical(found: LabeledSet, classes: list[str]) -> LabeledSet:
    """Replace the labels that are numbers of classes by the classes' names."""
    known = set(classes)

    def name(label: str) -> str:
        return classes[int(label)] if label not in known and is_number(label) and int(label) < len(classes) else label

    rows = [type(row)(row.shard, row.index, row.key, name(row.label)) for row in found.rows]
    return LabeledSet(found.name, found.shards, rows, found.failures)


def refuse_other_classes(found: LabeledSet, classes: list[str]) -> None:
    """Raise Refused where a set's classes are not exactly the run's."""
    labels = {row.label for row in found.rows}
    unknown, absent = sorted(labels - set(classes)), sorted(set(classes) - labels)
    if unknown or absent:
        only = f"it has {', '.join(unknown[:5])}, unknown to the labeled set" if unknown else ""
        lacks = f"class {', '.join(absent[:5])} has no image in it" if absent else ""
        raise Refused(f"{found.name}: its classes differ: {'; '.join(filter(None, [only, lacks]))}")
    if len(classes) < 2:
        raise Refused(f"labeled: found {len(classes)} class; expected two or more")
    if len(classes) > scores.MAX_CLASSES:
        raise Refused(f"labeled: found {len(classes):,} classes; expected at most {scores.MAX_CLASSES:,}")


def refuse_many_kept(classes_per_image: int, classes: int) -> None:
    """Raise Refused where more classes of each image would be kept than a score file can number."""
    if min(classes_per_image, classes) > scores.MAX_KEPT:
        raise Refused(f"classes_per_image: {classes_per_image}; expected at most {scores.MAX_KEPT}")


def write(config: PlanConfig, classes: list[str], sets: dict[str, LabeledSet], units: list[Unit]) -> PlanReceipt:
    """Write the splits and the ledger, and return the receipt; the same inputs give the same folder."""
    pool_digest = digest([unit.digest for unit in units])
    labeled = [[shard.digest() for shard in found.shards] for found in sets.values()]
    identity = digest(config.digest(), classes, labeled, pool_digest)

    def work(folder: str) -> dict[str, object]:
        train = write_split(sets["labeled"], classes, folder)
        validation = write_split(sets["validation"], classes, folder)
        test = write_split(sets["test"], classes, folder)
        uri = storage.join(folder, "units.json")
        storage.write(uri, json.dumps([unit.model_dump() for unit in units]).encode())
        failures = [failure for found in sets.values() for failure in found.failures]
        classes_per_image = min(config.classes_per_image, len(classes))
        return {
            "digest": digest(classes, train.digest, validation.digest),
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
            "notes": notes(config, len(classes), train.samples, validation.samples),
            "run": config.model_dump(),
        }

    receipt = once(config, PlanReceipt, work, storage.join(config.workdir, "stages", "plan", identity))
    for note in receipt.notes:
        say("plan", note)
    for failure in receipt.failures:
        say("plan", f"not used: {failure.shard} {failure.key}: {failure.reason}")
    return receipt


def notes(config: PlanConfig, classes: int, train: int, validation: int) -> list[str]:
    """Say what was decided for the user."""
    said = []
    if config.classes_per_image > classes:
        said.append(f"classes_per_image {config.classes_per_image} clamped to the {classes} classes there are")
    if not config.validation:
        said.append(
            f"no validation set given: held out {validation} of {train + validation} labeled images, stratified"
        )
    return said
