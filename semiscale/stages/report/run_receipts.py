"""A finished run: the receipts of its stages, and what follows from them."""

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
    """Every receipt of a run; `baselines` and `students` are the sweeps over learning rates, `scores` the pods."""

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
        """Return the four models that were measured; of a sweep, the one that was chosen.

        Raises InvalidInputError where the evaluation measured another model than this run trained.
        """
        trained = {
            "teacher": [self.teacher],
            "baseline": self.baselines,
            "pretrained": [self.pretrained],
            "student": self.students,
        }
        return {name: self._measured(name, receipts) for name, receipts in trained.items()}

    def _measured(self, name: str, trained: list[TrainReceipt]) -> TrainReceipt:
        wanted = self.evaluation.models[name].receipt
        for receipt in trained:
            if receipt.digest == wanted:
                return receipt
        digests = ", ".join(receipt.digest for receipt in trained)
        raise InvalidInputError(
            f"evaluation: its {name} is training {wanted}, this run's are {digests}; evaluate this run again"
        )

    def seconds(self) -> dict[str, float]:
        """Return how long each stage took; sweeps and pods are summed, as if they had run one after the other."""
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
        """Return the scan's clocks by part, in thread-seconds, summed over the pods."""
        return {part: sum(getattr(pod.clocks, part) for pod in self.scores) for part in PartSeconds.model_fields}

    def bottleneck(self) -> str:
        """Return the part that the scan waited for longest, "" where nothing was scanned.

        Each pod waited for the part that its receipt names, for the seconds that its scan took: how many threads shared
        a part's clock is known to the pod alone.
        """
        scanned = [pod for pod in self.scores if pod.slowest]
        waited = {part: sum(pod.seconds for pod in scanned if pod.slowest == part) for part in PartSeconds.model_fields}
        return max(waited, key=lambda part: waited[part]) if scanned else ""
