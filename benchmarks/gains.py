"""Measure the gain of a run over fresh seeds, and whether the selection causes it.

Each seed runs the pipeline, and then the control. The control trains a student in the same way on as many pool
images, picked at random, with the teacher's first choice as the label.
"""

import contextlib
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from semiscale.cli.run import log_path, results, run_compiled
from semiscale.config.run_config import RunConfig
from semiscale.receipts.base import Receipt
from semiscale.receipts.merge import SelectionReceipt
from semiscale.stages.evaluate.config import EvaluateConfig
from semiscale.stages.evaluate.stage import evaluate
from semiscale.stages.merge.stage import MergeConfig, merge
from semiscale.stages.pack.config import PackConfig
from semiscale.stages.pack.stage import pack
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.stage import train
from semiscale.storage.documents import load_document

GAINS = {
    "student - baseline": ("student", "baseline"),
    "student - before fine-tuning": ("student", "pretrained"),
    "student - control": ("student", "control"),
    "control - baseline": ("control", "baseline"),
}


def compare(settings_of: Callable[[int], RunConfig], seeds: Sequence[int], at_a_time: int) -> None:
    """Run all seeds and print test top-1 and gains.

    The last lines are the means, and the gains with their standard errors in points. Finished stages are reused, so
    more seeds may be added to a study.

    Args:
        settings_of: Returns the run file of a seed.
        seeds: The seeds, two at least.
        at_a_time: The number of seeds that run at the same time.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(at_a_time) as pool:
        results_of_seeds = list(pool.map(partial(run_seed, settings_of), seeds))
    models = list(results_of_seeds[0])
    print(f"{'seed':<6}" + "".join(f"{model:>12}" for model in models))
    for seed, row in zip(seeds, results_of_seeds, strict=True):
        print(f"{seed:<6}" + "".join(f"{row[model]:12.2%}" for model in models))
    means = [statistics.mean(row[model] for row in results_of_seeds) for model in models]
    print(f"{'mean':<6}" + "".join(f"{mean:12.2%}" for mean in means) + "\n")
    for title, (model, reference) in GAINS.items():
        print(f"{title:32} {summarize([100 * (row[model] - row[reference]) for row in results_of_seeds])}")


def summarize(points: list[float]) -> str:
    """Return the mean, the standard error over the seeds, and the range."""
    error = statistics.stdev(points) / len(points) ** 0.5
    return f"{statistics.mean(points):+6.2f} ± {error:.2f} points ({min(points):+.2f} to {max(points):+.2f})"


def run_seed(settings_of: Callable[[int], RunConfig], seed: int) -> dict[str, float]:
    """Run the pipeline and the control of one seed.

    Args:
        settings_of: Returns the run file of a seed.
        seed: The seed.

    Returns:
        The test top-1 of each model.
    """
    settings = settings_of(seed)
    log = log_path(settings)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.with_name("stages.log").open("w") as file, contextlib.redirect_stdout(file):
        run_compiled(settings, log)
        control = Control(settings).run()
    numbers = results(settings)
    models = ("teacher", "baseline", "pretrained", "student")
    return {**{model: numbers[model]["top1"] for model in models}, "control": control}


class Control:
    """The control of one finished run.

    It reads the receipts of the run, and repeats the stages from merge on with another selection.
    """

    def __init__(self, settings: RunConfig) -> None:
        self._settings = settings
        self._receipts = Path(settings.workdir) / settings.name / "receipts"

    def run(self) -> float:
        """Select at random, pack, pre-train, fine-tune and evaluate; return test top-1."""
        settings, workdir, plan = self._settings, self._settings.workdir, self._uri("plan")
        ranked = load_document(self._uri("selection"), SelectionReceipt)
        selection = merge(
            MergeConfig(
                workdir=workdir,
                plan=plan,
                scores=self._uris("scores"),
                images_per_class=settings.images_per_class,
                classes_per_image=settings.classes_per_image,
                max_failed_fraction=settings.max_failed_fraction,
                random_images=ranked.images,
                seed=settings.seed,
            )
        )
        packed = pack(PackConfig(workdir=workdir, plan=plan, selection=receipt_uri(selection), seed=settings.seed))
        pretrained = self._train(
            recipe="pretrain",
            packed=receipt_uri(packed),
            images_processed=settings.pretrain_images_processed,
            learning_rate=settings.pretrain_learning_rate,
        )
        students = [
            self._train(recipe="finetune", start=pretrained, epochs=settings.finetune_epochs, learning_rate=rate)
            for rate in settings.finetune_learning_rates
        ]
        evaluation = evaluate(
            EvaluateConfig(
                workdir=workdir,
                plan=plan,
                teacher=self._uri("teacher"),
                baselines=self._uris("baselines"),
                pretrained=pretrained,
                students=students,
            )
        )
        return evaluation.models["student"].top1

    def _train(self, **changes: Any) -> str:
        shared = self._settings.model_dump(include=set(TrainConfig.model_fields))
        fixed = {"architecture": self._settings.student_architecture, "plan": self._uri("plan")}
        return receipt_uri(train(TrainConfig.model_validate({**shared, **fixed, **changes})))

    def _uri(self, name: str) -> str:
        return str(self._receipts / f"{name}.json")

    def _uris(self, name: str) -> list[str]:
        return sorted(map(str, self._receipts.glob(f"{name}-*.json")))


def receipt_uri(receipt: Receipt) -> str:
    """Return the path of a stage's receipt."""
    return f"{receipt.folder}/receipt.json"
