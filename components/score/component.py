"""The contract of the score stage, one pod of the fan-out."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CUDA, install_kfp_package=False)
def score(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    workdir: str,
    plan: dsl.Input[dsl.Artifact],
    teacher: dsl.Input[dsl.Artifact],
    pod: int,
    images_per_class: int,
    image_column: str,
    decoder: str,
):
    """Run the teacher over this pod's share of the unlabeled pool and keep every image's best classes.

    Args:
        workdir: URI of the folder that everything bulky goes under.
        plan: The plan's receipt: it names the ledger of the pool.
        teacher: The teacher's receipt.
        pod: Which of the pods this is.
        images_per_class: K: how the score files are laid out for the merge; any other K can still be selected.
        image_column: Parquet column of the images.
        decoder: cpu, or gpu: what decodes plain JPEGs.

    Returns:
        receipt: What was done, as JSON: what the next stages read.
        summary: What was done, in words.
    """
    from components.score.score import ScoreConfig
    from components.score.score import score as stage
    from components.shared.stage import in_component

    in_component(ScoreConfig, stage, locals())
