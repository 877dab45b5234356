"""Run the stages as functions, one after the other, on a small run."""

from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from semiscale.receipts.base import Receipt
from semiscale.receipts.evaluate import EvaluationReceipt
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.merge import SelectionReceipt
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.promote import PromotionReceipt
from semiscale.receipts.report import ReportReceipt
from semiscale.receipts.score import ScoreReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.evaluate.config import EvaluateConfig
from semiscale.stages.evaluate.stage import evaluate
from semiscale.stages.merge.stage import MergeConfig, merge
from semiscale.stages.pack.config import PackConfig, PackFanoutConfig
from semiscale.stages.pack.fanout import plan_pack_fanout
from semiscale.stages.pack.stage import pack
from semiscale.stages.plan.stage import PlanConfig, plan
from semiscale.stages.promote.stage import PromoteConfig, promote
from semiscale.stages.report.stage import ReportConfig, report
from semiscale.stages.score.config import ScoreConfig, ScoreFanoutConfig
from semiscale.stages.score.fanout import plan_score_fanout
from semiscale.stages.score.stage import score
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.stage import train
from tests.support import sample_images


class Stages:
    """A small run. Each stage runs when its receipt is first read."""

    def __init__(self, root: Path, config: Any = None, **changes: Any) -> None:
        """Write the data of a run, unless there is a config for existing data.

        Args:
            root: The folder of the data and the receipts.
            config: The `PlanConfig` of a run on existing data.
            **changes: Changed settings of the run file.
        """
        self.root = root
        self.content: dict[str, Any] = config.model_dump() if config else sample_images.write_run(root, **changes)
        self.config: PlanConfig = config or PlanConfig.model_validate(self.content)

    @classmethod
    def on(cls, config: PlanConfig, root: Path) -> "Stages":
        """Return a run on existing data."""
        return cls(root, config)

    @property
    def workdir(self) -> str:
        """Return the URI of the workdir."""
        return self.config.workdir

    @cached_property
    def plan(self) -> PlanReceipt:
        """Return the receipt of the plan."""
        return plan(self.config)

    @cached_property
    def teacher(self) -> TrainReceipt:
        """Return the receipt of the teacher."""
        return self.train("teacher")

    def train(self, recipe: str, **changes: Any) -> TrainReceipt:
        """Train a model by a recipe."""
        settings = {
            "workdir": self.workdir,
            "recipe": recipe,
            "architecture": self.config.teacher_architecture,
            "plan": self.uri(self.plan),
            "images_processed": self.config.teacher_images_processed,
            "learning_rate": self.config.teacher_learning_rate,
            "batch_size": self.config.batch_size,
            "device_batch_size": self.config.device_batch_size,
            "weight_decay": self.config.weight_decay,
            "resolution": self.config.resolution,
            "augmentation": self.config.augmentation,
            "frames": self.config.frames,
            "own_frames": self.config.teacher_frames if recipe == "teacher" else 0,
            **changes,
        }
        return train(TrainConfig.model_validate(settings))

    @cached_property
    def unscored(self) -> FanoutReceipt:
        """Return the number of pods that score the pool."""
        return plan_score_fanout(
            ScoreFanoutConfig(workdir=self.workdir, plan=self.uri(self.plan), teacher=self.uri(self.teacher))
        )

    def score(self, pod: int) -> ScoreReceipt:
        """Score the share of one pod."""
        return score(
            ScoreConfig(
                workdir=self.workdir,
                plan=self.uri(self.plan),
                teacher=self.uri(self.teacher),
                count=self.uri(self.unscored),
                pod=pod,
                images_per_class=self.config.images_per_class,
            )
        )

    @cached_property
    def scores(self) -> list[ScoreReceipt]:
        """Return the receipts of all scoring pods."""
        return [self.score(pod) for pod in range(self.unscored.pods)]

    @cached_property
    def selection(self) -> SelectionReceipt:
        """Return the receipt of the selection."""
        return self.merge()

    def selection_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the selection."""
        return list(pq.read_table(self.selection.selection).to_pylist())

    def merge(self, **changes: Any) -> SelectionReceipt:
        """Merge the scores with changed settings."""
        settings = {
            "workdir": self.workdir,
            "plan": self.uri(self.plan),
            "scores": [self.uri(receipt) for receipt in self.scores],
            "images_per_class": self.config.images_per_class,
            "classes_per_image": self.config.classes_per_image,
            "max_failed_fraction": self.config.max_failed_fraction,
            "retrain_above": self.config.retrain_above,
            **changes,
        }
        return merge(MergeConfig.model_validate(settings))

    @cached_property
    def unpacked(self) -> FanoutReceipt:
        """Return the number of pods that pack the selection."""
        plan, selection = self.uri(self.plan), self.uri(self.selection)
        return plan_pack_fanout(PackFanoutConfig(workdir=self.workdir, plan=plan, selection=selection))

    @cached_property
    def packed(self) -> PackReceipt:
        """Return the receipt of the packed selection."""
        return self.pack()

    def pack(self, seed: int = 0) -> PackReceipt:
        """Pack the selection in the order of a seed."""
        config = PackConfig(
            workdir=self.workdir,
            plan=self.uri(self.plan),
            selection=self.uri(self.selection),
            count=self.uri(self.unpacked),
            seed=seed,
        )
        return pack(config)

    @cached_property
    def pretrained(self) -> TrainReceipt:
        """Return the receipt of the student before fine-tuning."""
        return self.train("pretrain", packed=self.uri(self.packed))

    @cached_property
    def students(self) -> list[TrainReceipt]:
        """Return the receipts of the student, fine-tuned at two learning rates."""
        return [self.train("finetune", start=self.uri(self.pretrained), learning_rate=rate) for rate in (0.1, 0.2)]

    @cached_property
    def baselines(self) -> list[TrainReceipt]:
        """Return the receipts of the baseline at two learning rates."""
        return [self.train("baseline", learning_rate=rate) for rate in (0.5, 1.0)]

    @cached_property
    def evaluation(self) -> EvaluationReceipt:
        """Return the receipt of the evaluation of all four models."""
        return evaluate(
            EvaluateConfig(
                workdir=self.workdir,
                plan=self.uri(self.plan),
                teacher=self.uri(self.teacher),
                baselines=[self.uri(receipt) for receipt in self.baselines],
                pretrained=self.uri(self.pretrained),
                students=[self.uri(receipt) for receipt in self.students],
            )
        )

    def promote(self, **changes: Any) -> PromotionReceipt:
        """Compare the student with the champion."""
        settings = {
            "workdir": self.workdir,
            "plan": self.uri(self.plan),
            "evaluation": self.uri(self.evaluation),
            "promotion": self.config.promotion,
            "champion": self.config.champion,
            **changes,
        }
        return promote(PromoteConfig.model_validate(settings))

    @cached_property
    def promotion(self) -> PromotionReceipt:
        """Return the receipt of the promotion."""
        return self.promote()

    @cached_property
    def report(self) -> ReportReceipt:
        """Return the receipt of the report.

        The stage also copies all receipts into the workdir.
        """
        uri = self.uri
        return report(
            ReportConfig(
                workdir=self.workdir,
                plan=uri(self.plan),
                teacher=uri(self.teacher),
                baselines=[uri(receipt) for receipt in self.baselines],
                scores=[uri(receipt) for receipt in self.scores],
                selection=uri(self.selection),
                packed=uri(self.packed),
                pretrained=uri(self.pretrained),
                students=[uri(receipt) for receipt in self.students],
                evaluation=uri(self.evaluation),
                promotion=uri(self.promotion),
            )
        )

    def uri(self, receipt: Receipt) -> str:
        """Write a receipt to its own file, as kfp does, and return the path."""
        path = self.root / "receipts" / f"{receipt.stage}-{receipt.digest}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(receipt.model_dump_json())
        return str(path)
