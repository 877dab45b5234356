"""List and check every input before a run costs money, and group the pool.

The bulky parts go to the workdir: indexes of the labeled sets and the list of shard groups. The receipt names them.
"""

import json
from collections import Counter
from typing import ClassVar

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.config.run_parameters import RunParameters
from semiscale.data.exclusion_list import read_exclusion_list
from semiscale.data.shard import SampleFields, ShardGroup
from semiscale.observability.progress import Progress, log_info
from semiscale.receipts.plan import PlanReceipt
from semiscale.runtime.run_once import run_once
from semiscale.runtime.stage_config import StageConfig
from semiscale.stages.plan import shard_groups
from semiscale.stages.plan.concurrent_runs import check_no_concurrent_run
from semiscale.stages.plan.label_checks import (
    check_classes_match,
    check_classes_per_image,
    normalize_labels,
    resolve_class_names,
)
from semiscale.stages.plan.labeled_sets import LabeledSet, stratified_split, validate_labeled_set, write_split
from semiscale.stages.plan.model_checks import check_models, check_teacher
from semiscale.stages.plan.run_name import check_run_name_free, save_run_file

# The receipt is passed between stages and must stay small.
MAX_FAILURES_IN_RECEIPT = 100


class PlanConfig(RunParameters, StageConfig):
    """The whole run file. An invalid value of any key is refused by the plan."""

    stage: ClassVar[str] = "plan"

    def check_can_start(self) -> None:
        """Check that no other run of this name is active.

        The plan's status object marks the start of a run, so this check comes before that object is written.

        Raises:
            InvalidInputError: If a task of a run of this name is active.
        """
        check_no_concurrent_run(self.workdir, self.name)


def plan(config: PlanConfig, with_pool: bool = True) -> PlanReceipt:
    """Check the run file, read the labeled sets, list the pool, and write the plan.

    Args:
        config: The run file.
        with_pool: False for a run that selects nothing. Its pool is not listed and may be absent.

    Returns:
        The receipt. It names the splits and the shard groups, and it holds the run file for all later stages.

    Raises:
        InvalidInputError: If any input is bad. Nothing has been trained or scored by then.
    """
    # Check the keys that need no data.
    check_models(config)
    if with_pool:
        shard_groups.require_unlabeled(config.unlabeled)
    if config.remove:
        # A bad exclusion list is refused here, before scoring, although only the merge uses it.
        read_exclusion_list(config.remove)
    check_run_name_free(config)

    # Decode every labeled sample, and check its label.
    is_video = config.frames > 0
    progress = Progress("plan", 0)
    with progress.timer("decode"):
        fields = SampleFields(config.image_column, config.label_column, is_video)
        labeled_sets = load_labeled_sets(config, fields, progress)
    classes = resolve_class_names(config, labeled_sets["labeled"])
    check_classes_per_image(config.classes_per_image, len(classes))
    labeled_sets = {name: normalize_labels(labeled, classes) for name, labeled in labeled_sets.items()}
    for labeled in labeled_sets.values():
        check_classes_match(labeled, classes, "classes" if config.classes else "labeled")
    check_teacher(config, classes)
    if "validation" not in labeled_sets:
        labeled_sets["labeled"], labeled_sets["validation"] = stratified_split(
            labeled_sets["labeled"], config.validation_fraction, config.seed
        )

    # List the pool. Its shards need no label column.
    with progress.timer("list"):
        pool_fields = SampleFields(config.image_column, "", is_video)
        groups = shard_groups.build_shard_groups(config.unlabeled, config.workdir, pool_fields) if with_pool else []
    save_run_file(config)
    return write_plan(config, classes, labeled_sets, groups)


def load_labeled_sets(config: PlanConfig, fields: SampleFields, progress: Progress) -> dict[str, LabeledSet]:
    """Read the labeled, validation and test sets that the run file names.

    Args:
        config: The run file.
        fields: Columns of images and labels in Parquet files.
        progress: Counts the samples.

    Returns:
        The sets by name: `labeled`, `test`, and `validation` if the run file has one.

    Raises:
        InvalidInputError: If a URI has no samples, or too large a share of a set is unusable.
    """
    uris_by_set = {"labeled": config.labeled, "validation": config.validation, "test": config.test}
    cache_folder = storage.join(config.workdir, "stages", "plan", "shards")
    labeled_sets = {
        name: validate_labeled_set(name, uris, fields, cache_folder, progress)
        for name, uris in uris_by_set.items()
        if uris
    }
    for labeled in labeled_sets.values():
        labeled.check_failure_rate(config.max_failed_fraction)
    return labeled_sets


def write_plan(
    config: PlanConfig, classes: list[str], labeled_sets: dict[str, LabeledSet], groups: list[ShardGroup]
) -> PlanReceipt:
    """Write the splits and the shard groups, and return the receipt.

    Args:
        config: The run file.
        classes: Class names in label order.
        labeled_sets: The sets `labeled`, `validation` and `test`, with normalized labels.
        groups: Shard groups of the pool, in order of their digests. They are empty for a run without a pool.

    Returns:
        The receipt. Equal inputs give the same folder, whose receipt is reused.
    """
    pool_digest = content_digest([group.digest for group in groups])
    shard_digests = [[shard.digest() for shard in labeled.shards] for labeled in labeled_sets.values()]
    identity = content_digest(config.digest(), classes, shard_digests, pool_digest)

    def write_contents(folder: str) -> dict[str, object]:
        train = write_split(labeled_sets["labeled"], classes, folder)
        validation = write_split(labeled_sets["validation"], classes, folder)
        test = write_split(labeled_sets["test"], classes, folder)
        groups_uri = storage.join(folder, "units.json")
        storage.write_bytes(groups_uri, json.dumps([group.model_dump() for group in groups]).encode())
        failures = [failure for labeled in labeled_sets.values() for failure in labeled.failures]
        shards = [shard for group in groups for shard in group.shards]
        return {
            "digest": content_digest(classes, train.digest, validation.digest),
            "pool_digest": pool_digest,
            "name": config.name,
            "classes": classes,
            "train": train,
            "validation": validation,
            "test": test,
            "units": groups_uri,
            "shards": len(shards),
            "size_bytes": sum(shard.size_bytes for shard in shards),
            "pods": min(config.pods, len(shards)),
            "classes_per_image": min(config.classes_per_image, len(classes)),
            "failed": dict(Counter(failure.reason for failure in failures)),
            "failures": failures[:MAX_FAILURES_IN_RECEIPT],
            "notes": plan_notes(config, len(classes), train.samples, validation.samples),
            "run": config.model_dump(),
        }

    receipt = run_once(config, PlanReceipt, write_contents, storage.join(config.workdir, "stages", "plan", identity))
    for note in receipt.notes:
        log_info("plan", note)
    for failure in receipt.failures:
        log_info("plan", f"not used: {failure.shard} {failure.key}: {failure.reason}")
    return receipt


def plan_notes(config: PlanConfig, classes: int, train_samples: int, validation_samples: int) -> list[str]:
    """Return sentences about what the plan decided for the user.

    Args:
        config: The run file.
        classes: Number of classes.
        train_samples: Size of the training split.
        validation_samples: Size of the validation split.

    Returns:
        The notes. They are stored in the receipt and shown in the report.
    """
    notes = []
    if config.classes_per_image > classes:
        notes.append(f"classes_per_image {config.classes_per_image} clamped to the {classes} classes there are")
    if not config.validation:
        labeled_samples = train_samples + validation_samples
        notes.append(
            f"no validation set given: held out {validation_samples} of {labeled_samples} labeled images, stratified"
        )
    return notes
