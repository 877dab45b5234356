"""Semiscale: the paper's four steps as one Kubeflow pipeline (Yalniz et al. 2019, Figure 1).

    plan ─ teacher ─┬─ score × pods ─ merge ─ pack × pods ─ pretrain ─ finetune × rates ─┬─ evaluate ─ promote ─ report
                    └─ baseline × rates ─────────────────────────────────────────────────┘

A task is given the receipts of the tasks right before it. It finds earlier receipts, and the run's parameters in the
plan's receipt, through them. `python pipeline.py --help` lists the commands.
"""

import sys

from kfp import dsl

from components.evaluate.component import evaluate
from components.merge.component import merge
from components.pack.component import count_unpacked, pack
from components.placement import (
    place_count,
    place_on_cpu,
    place_on_inference_gpu,
    place_on_packing_pods,
    place_on_scoring_pods,
    place_on_training_gpu,
)
from components.plan.component import plan
from components.promote.component import promote
from components.report.component import report
from components.score.component import count_unscored, score
from components.train.component import train
from semiscale.config.form import run_form


@dsl.pipeline(name="semiscale", description="Billion-scale semi-supervised learning for image classification.")
@run_form
def semiscale(**form):
    """Turn a small labeled set and a huge unlabeled pool into a better classifier at the same inference cost."""
    planned = place_on_cpu(plan(**form)).set_display_name("Plan")

    # (1) Train a teacher on the labeled set D.
    teacher = place_on_training_gpu(train(role="teacher", plan=planned.outputs["receipt"])).set_display_name(
        "1 Train teacher"
    )

    # (2) Run it on the unlabeled pool U, and keep the top K images of every class: D̂. The number of pods is counted
    # here, because the plan knows neither the teacher nor what it has scored. No pod returns before the whole pool has
    # scores: it takes over the work of pods that died. More pods than a loop carries are one Job of Kubernetes, which
    # the loop's only task creates and follows.
    unscored = place_count(count_unscored(teacher=teacher.outputs["receipt"])).set_display_name("2 Count to score")
    with dsl.ParallelFor(unscored.outputs["Output"], name="2 Score on pods") as pod:
        scored = place_on_scoring_pods(score(count=unscored.outputs["receipt"], pod=pod)).set_display_name("2 Score U")
    selected = place_on_cpu(merge(scores=dsl.Collected(scored.outputs["receipt"]))).set_display_name("2 Merge: top K")
    unpacked = place_count(count_unpacked(selection=selected.outputs["receipt"])).set_display_name("2 Count to pack")
    with dsl.ParallelFor(unpacked.outputs["Output"], name="2 Pack on pods") as pod:
        share = place_on_packing_pods(pack(count=unpacked.outputs["receipt"], pod=pod)).set_display_name("2 Pack")
    # A training takes one receipt, and kfp passes on those of a loop as a list. One more task finds all tars written.
    packed = place_on_cpu(pack(count=unpacked.outputs["receipt"], pod=0)).after(share)
    packed.set_display_name("2 Packed set")

    # (3) Train the student on D̂, long.
    pretrained = place_on_training_gpu(train(role="pretrain", packed=packed.outputs["receipt"])).set_display_name(
        "3 Pre-train"
    )

    # (4) Fine-tune it on D, true labels only.
    with dsl.ParallelFor(pretrained.outputs["Output"], name="4 Fine-tunings") as learning_rate:
        student = place_on_training_gpu(
            train(role="finetune", start=pretrained.outputs["receipt"], learning_rate=learning_rate)
        ).set_display_name("4 Fine-tune")

    # The student is compared with the same network, trained on D alone for as many images.
    with dsl.ParallelFor(planned.outputs["Output"], name="Baselines") as learning_rate:
        baseline = place_on_training_gpu(
            train(role="baseline", plan=planned.outputs["receipt"], learning_rate=learning_rate)
        ).set_display_name("Train baseline")

    evaluated = place_on_inference_gpu(
        evaluate(
            baselines=dsl.Collected(baseline.outputs["receipt"]),
            students=dsl.Collected(student.outputs["receipt"]),
        )
    ).set_display_name("Evaluate")
    promoted = place_on_inference_gpu(promote(evaluation=evaluated.outputs["receipt"])).set_display_name("Promote")
    place_on_cpu(report(promotion=promoted.outputs["receipt"])).set_display_name("Report")


if __name__ == "__main__":
    from semiscale.cli.main import main

    sys.exit(main(semiscale, sys.argv[1:]))
