"""Hold the receipts of a finished run, and derive figures from them."""

from dataclasses import dataclass

from semiscale.common.errors import InvalidInputError
from semiscale.receipts.evaluate import EvaluationReceipt
from semiscale.receipts.merge import SelectionReceipt
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.promote import PromotionReceipt
from semiscale.receipts.score import PartSeconds, ScoreReceipt
from semiscale.receipts.train import TrainReceipt


@dataclass(frozen=True)
class RunReceipts:
    """Every receipt of a run.

    Attributes:
        plan: The checked inputs and the run file.
        teacher: The training of the teacher, or the ready-made teacher.
        baselines: The trainings of the baseline, one for each learning rate.
        scores: The scoring of the pool, one receipt for each pod.
        selection: The merge: D̂, the accounting of the pool, and the counts of each class.
        packed: The tars that D̂ was copied into.
        pretrained: The student's pre-training on D̂.
        students: The student's fine-tunings on D, one for each learning rate.
        evaluation: The four measured models on the test set.
        promotion: Whether the student became the champion.
    """

    plan: PlanReceipt
    teacher: TrainReceipt
    baselines: list[TrainReceipt]
    scores: list[ScoreReceipt]
    selection: SelectionReceipt
    packed: PackReceipt
    pretrained: TrainReceipt
    students: list[TrainReceipt]
    evaluation: EvaluationReceipt
    promotion: PromotionReceipt

    def evaluated_models(self) -> dict[str, TrainReceipt]:
        """Return the four evaluated models by name, and the chosen one of each sweep.

        Returns:
            The trainings of `teacher`, `baseline`, `pretrained` and `student`.

        Raises:
            InvalidInputError: If the evaluation measured a model that this run did not train.
        """
        candidates = {
            "teacher": [self.teacher],
            "baseline": self.baselines,
            "pretrained": [self.pretrained],
            "student": self.students,
        }
        return {name: self._find_evaluated(name, receipts) for name, receipts in candidates.items()}

    def _find_evaluated(self, name: str, candidates: list[TrainReceipt]) -> TrainReceipt:
        digest = self.evaluation.models[name].receipt
        for receipt in candidates:
            if receipt.digest == digest:
                return receipt
        digests = ", ".join(receipt.digest for receipt in candidates)
        raise InvalidInputError(
            "SEMI-E355",
            f"evaluation: its {name} is training {digest}, and this run has {digests}. Evaluate this run again.",
        )

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage, summed over sweeps and pods."""
        spent = {
            "plan": [self.plan.seconds],
            "teacher": [self.teacher.seconds],
            "baseline": [receipt.seconds for receipt in self.baselines],
            "score": [receipt.seconds for receipt in self.scores],
            "merge": [self.selection.seconds],
            "pack": [self.packed.seconds],
            "pretrain": [self.pretrained.seconds],
            "finetune": [receipt.seconds for receipt in self.students],
            "evaluate": [self.evaluation.seconds],
        }
        return {stage: round(sum(seconds), 3) for stage, seconds in spent.items()}

    def part_seconds(self) -> dict[str, float]:
        """Return the thread-seconds of each part of scoring, summed over the pods."""
        return {part: sum(getattr(pod.clocks, part) for pod in self.scores) for part in PartSeconds.model_fields}

    def bottleneck(self) -> str:
        """Return the part that scoring waited for longest, or "" if nothing was scored.

        A pod names its slowest part in its receipt, for only the pod knows how many threads shared a clock. The seconds
        of the pod count for that part.
        """
        scoring_pods = [pod for pod in self.scores if pod.slowest]
        if not scoring_pods:
            return ""
        seconds_by_part = {
            part: sum(pod.seconds for pod in scoring_pods if pod.slowest == part) for part in PartSeconds.model_fields
        }
        return max(seconds_by_part, key=lambda part: seconds_by_part[part])
