"""Run all stages in this process, in the order of the pipeline's graph."""

import json
from pathlib import Path
from typing import Any

from tests.golden import passing, program
from tests.golden.passing import Fields, Receipts


class WholeRun:
    """The stages of one run and their receipts.

    The receipts are files in `folder`. Kubeflow passes them on in the same way.
    """

    def __init__(self, run: Fields, folder: Path) -> None:
        self.run = run
        self.receipts = Receipts()
        self._folder = folder

    def plan(self) -> Fields:
        """Plan the run."""
        self.receipts.plan, content = self._do("plan", passing.plan(self.run))
        return content

    def train_teacher(self) -> Fields:
        """Train the teacher, or reuse it."""
        self.receipts.teacher, content = self._do("train", passing.teacher(self.run, self.receipts))
        return content

    def score(self) -> list[Fields]:
        """Score the pool, one pod after the other, and return the pods' receipts."""
        self.receipts.unscored, count = self._do("count-unscored", passing.count_unscored(self.run, self.receipts))
        completed = [self._do("score", passing.score(self.run, self.receipts, pod)) for pod in range(count["pods"])]
        self.receipts.scores = [uri for uri, _ in completed]
        return [content for _, content in completed]

    def merge(self) -> Fields:
        """Select the images."""
        self.receipts.selection, content = self._do("merge", passing.merge(self.run, self.receipts))
        return content

    def pack(self) -> Fields:
        """Pack the selection, one pod after the other."""
        self.receipts.unpacked, count = self._do("count-unpacked", passing.count_unpacked(self.run, self.receipts))
        for pod in [*range(count["pods"]), 0]:
            self.receipts.packed, content = self._do("pack", passing.pack(self.run, self.receipts, pod))
        return content

    def train_students(self) -> None:
        """Pre-train and fine-tune the student, and train the baseline."""
        self.receipts.pretrained, _ = self._do("train", passing.pretrain(self.run, self.receipts))
        self.receipts.students = [
            self._do("train", passing.finetune(self.run, self.receipts, rate))[0]
            for rate in self.run["finetune_learning_rates"]
        ]
        self.receipts.baselines = [
            self._do("train", passing.baseline(self.run, self.receipts, rate))[0]
            for rate in self.run["baseline_learning_rates"]
        ]

    def evaluate(self) -> Fields:
        """Evaluate the four models."""
        self.receipts.evaluation, content = self._do("evaluate", passing.evaluate(self.run, self.receipts))
        return content

    def promote(self) -> Fields:
        """Compare the student with the champion, and promote it if it is not worse."""
        self.receipts.promotion, content = self._do("promote", passing.promote(self.run, self.receipts))
        return content

    def report(self) -> Fields:
        """Write the report."""
        return self._do("report", passing.report(self.run, self.receipts))[1]

    def all(self) -> "WholeRun":
        """Run every stage."""
        program.announce(self.run["workdir"], self.run["name"])
        self.plan()
        self.train_teacher()
        self.score()
        self.merge()
        self.pack()
        self.train_students()
        self.evaluate()
        self.promote()
        self.report()
        return self

    def _do(self, stage: str, fields: Fields) -> tuple[str, Fields]:
        content = program.run_stage(stage, fields)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{len(list(self._folder.iterdir())):03}-{stage}.json"
        path.write_text(json.dumps(content))
        return str(path), content


def content_of(path: str) -> Any:
    """Read a receipt that a stage has returned."""
    return json.loads(Path(path).read_text())
