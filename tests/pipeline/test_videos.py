"""Test runs of videos: refusals of mixtures with images, and the whole pipeline."""

import importlib.util
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from semiscale import storage
from semiscale.cli.export import random_images
from semiscale.cli.throughput_probe import measure_device_rates, measure_inputs, measure_throughput
from semiscale.common.digest import content_digest
from semiscale.common.errors import InvalidInputError
from semiscale.config.run_config import RunConfig
from semiscale.data.listing import list_shards
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.reader import iter_samples
from semiscale.data.shard import SampleFields
from semiscale.evaluation.inference import EvalLoader, predict_logits
from semiscale.evaluation.prediction_cache import Predictions
from semiscale.models import checkpoint_io, networks, normalization
from semiscale.models.checkpoint_metadata import CheckpointMetadata
from semiscale.models.export import Format, export_model
from semiscale.receipts.base import Receipt
from semiscale.stages.plan.stage import PlanConfig, plan
from semiscale.stages.score.scorer import top_class_log_odds, top_class_mean_log_odds
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.recipes import RECIPES
from tests.support import sample_images, videos
from tests.support.stages import Stages

REAL = Path(os.environ.get("SEMISCALE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "clips"


def prepare_stages(root: Path, **changes: object) -> Stages:
    """Prepare the stages of a small run of videos."""
    return Stages.on(PlanConfig.model_validate(videos.write_run(root, **changes)), root)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"frames": 0}, "teacher_architecture: 'r2plus1d_8_small'.*SEMI-E152"),
        (
            {"frames": 0, "teacher_frames": 32, "teacher_architecture": "resnet8_small"},
            "teacher_frames: .*SEMI-E105",
        ),
        ({"student_architecture": "resnet18"}, "student_architecture: 'resnet18'.*SEMI-E152"),
        ({"augmentation": "shift"}, "augmentation: shift .*SEMI-E208"),
        ({"decoder": "gpu"}, "decoder: gpu .*SEMI-E208"),
        ({"baseline_recipe": "modern"}, "baseline_recipe: modern .*SEMI-E208"),
    ],
)
def test_a_mixture_of_images_and_videos_is_refused(tmp_path: Path, changes: dict[str, object], line: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{line}"):
        plan(PlanConfig.model_validate(videos.write_run(tmp_path, **changes)))


def test_without_av_videos_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match="^frames: .*PyAV.*SEMI-E063"):
        plan(PlanConfig.model_validate(videos.write_run(tmp_path)))


def test_a_class_folder_of_images_has_no_video(tmp_path: Path) -> None:
    content = videos.write_run(tmp_path)
    image = tmp_path / "data" / "labeled" / "yellow" / "0.png"
    image.parent.mkdir()
    image.write_bytes(sample_images.draw_png(0, 0))
    with pytest.raises(InvalidInputError, match="yellow has no video.*SEMI-E204"):
        plan(PlanConfig.model_validate(content))


def test_a_run_of_videos_reads_the_video_of_a_sample_with_both(tmp_path: Path) -> None:
    video, image = videos.draw_video(0, 0), sample_images.draw_png(0, 0)
    sample_images.write_tar(tmp_path / "a.tar", {"a.png": image, "a.avi": video, "b.png": image})
    (tmp_path / "c.webm").write_bytes(video)
    (tmp_path / "d.png").write_bytes(image)
    samples = {
        kind: [
            (sample.key, sample.image, sample.problem)
            for shard in list_shards([str(tmp_path)], kind)
            for sample in iter_samples(shard, SampleFields(label="", videos=kind))
        ]
        for kind in (True, False)
    }
    assert samples[True] == [("a", video, ""), ("b", b"", "no video members"), ("c.webm", video, "")]
    assert samples[False] == [("a", image, ""), ("b", image, ""), ("d.png", image, "")]


def test_damaged_and_truncated_videos_are_counted_with_their_reasons(tmp_path: Path) -> None:
    content = videos.write_run(tmp_path, max_failed_fraction=0.5)
    red = tmp_path / "data" / "labeled" / "red"
    whole = (red / "0.avi").read_bytes()
    (red / "cut.avi").write_bytes(whole[:-100])
    (red / "still.mp4").write_bytes(sample_images.draw_png(0, 0))
    (red / "sound.mkv").write_bytes(b"\x1aE\xdf\xa3" + bytes(64))
    receipt = plan(PlanConfig.model_validate(content))
    reasons = {failure.key: failure.reason for failure in receipt.failures}
    assert reasons == {"red/cut.avi": "video cut off", "red/still.mp4": "not a video", "red/sound.mkv": "damaged video"}


def test_digests_of_runs_of_images_are_those_of_versions_without_videos(tmp_path: Path) -> None:
    """A run reuses the finished work of earlier versions."""
    settings = {"name": "a", "workdir": "w", "labeled": ["l"], "unlabeled": ["u"], "test": ["t"]}
    config = PlanConfig.model_validate(settings)
    assert config.digest() == content_digest("plan", config.model_dump(exclude={"workdir", "frames", "teacher_frames"}))
    assert config.model_copy(update={"frames": 8}).digest() != config.digest()
    receipt = tmp_path / "plan.json"
    receipt.write_text(json.dumps({"digest": "0"}))
    training: dict[str, object] = {
        "workdir": "w",
        "recipe": "teacher",
        "architecture": "resnet50",
        "plan": str(receipt),
    }
    training |= {"resolution": 224, "augmentation": "crop-flip"}
    assert TrainConfig.model_validate(training).digest() == "63567ad86742ed8c"
    assert TrainConfig.model_validate({**training, "frames": 8}).digest() != "63567ad86742ed8c"


def test_a_run_file_of_an_earlier_version_is_the_same_run(tmp_path: Path) -> None:
    config = PlanConfig.model_validate(sample_images.write_run(tmp_path))
    plan(config)
    run = tmp_path / "work" / "trial" / "run.json"
    content = json.loads(run.read_text())
    del content["frames"], content["teacher_frames"]
    run.write_text(json.dumps(content))
    plan(config)


@pytest.mark.parametrize(("frames", "nearest"), [(4, 8), (8, 8), (16, 8), (32, 32)])
def test_trainings_of_clips_follow_the_papers_tables(tmp_path: Path, frames: int, nearest: int) -> None:
    receipt = tmp_path / "plan.json"
    receipt.write_text("{}")
    common: dict[str, object] = {"workdir": "w", "architecture": "r2plus1d_18", "plan": str(receipt), "resolution": 112}
    common |= {"augmentation": "crop-flip", "frames": frames}
    kinds = {"teacher": "supervised", "baseline": "supervised", "pretrain": "pretrain", "finetune": "finetune"}
    for recipe, kind in kinds.items():
        config = TrainConfig.model_validate({**common, "recipe": recipe})
        expected = RECIPES[f"video-{kind}-{nearest}"]  # type: ignore[index]
        assert config.resolved_recipe == expected
        assert (config.learning_rate, config.batch_size) == (expected.learning_rate, expected.batch_size)


def test_a_teacher_of_longer_clips_equals_a_training_on_these_clips(tmp_path: Path) -> None:
    """In table 7 the students have 8 frames and the teacher has 32.

    The teacher has the minibatch of 32 frames.
    """
    receipt = tmp_path / "plan.json"
    receipt.write_text(json.dumps({"digest": "0"}))
    common: dict[str, object] = {"workdir": "w", "recipe": "teacher", "architecture": "r2plus1d_34"}
    common |= {"plan": str(receipt), "resolution": 112, "augmentation": "crop-flip"}
    alone, in_a_run = (
        TrainConfig.model_validate({**common, **frames}) for frames in ({"frames": 32}, {"frames": 8, "own_frames": 32})
    )
    assert in_a_run == alone
    assert in_a_run.digest() == alone.digest()
    assert in_a_run.preprocessing.frames == 32
    assert in_a_run.batch_size == 128 * 8


class TestMeanLogOdds:
    """Videos are ranked by the mean of ten softmaxes.

    The scores in fp32 equal those in fp64.
    """

    @staticmethod
    def compute_in_float64(logits_BVC: torch.Tensor) -> torch.Tensor:
        """Return log(mean p) - log(mean of the others' p) of every class.

        Both means are sums in fp64 without subtraction.
        """
        odds = torch.empty(logits_BVC.shape[0], logits_BVC.shape[2], dtype=torch.float64)
        log_p_BVC = logits_BVC.double().log_softmax(2)
        for label in range(logits_BVC.shape[2]):
            others = [other for other in range(logits_BVC.shape[2]) if other != label]
            odds[:, label] = log_p_BVC[:, :, label].logsumexp(1) - log_p_BVC[:, :, others].logsumexp((1, 2))
        return odds

    @pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 300.0])
    @pytest.mark.parametrize("classes", [2, 7, 400])
    def test_the_score_equals_float64(self, scale: float, classes: int) -> None:
        logits_BVC = torch.randn(20, 10, classes, generator=torch.Generator().manual_seed(classes)) * scale
        labels_BP, scores_BP = top_class_mean_log_odds(logits_BVC, min(5, classes))
        expected_BP = self.compute_in_float64(logits_BVC).gather(1, labels_BP)
        assert torch.allclose(scores_BP.double(), expected_BP, rtol=1e-5, atol=2e-6 * max(scale, 1) * 8)
        best_BP = self.compute_in_float64(logits_BVC).topk(min(5, classes)).values
        assert torch.allclose(scores_BP.double(), best_BP, rtol=1e-5, atol=2e-6 * max(scale, 1) * 8)

    def test_saturated_videos_have_different_scores(self) -> None:
        """All ten probabilities are 1 in fp32.

        The least certain clip decides the mean's distance to 1.
        """
        certain = torch.full((1, 10, 3), 0.0)
        certain[:, :, 0] = torch.tensor([40.0 + clip for clip in range(10)])
        more_certain = certain + torch.tensor([0.5, 0.0, 0.0])
        scores = [top_class_mean_log_odds(logits, 1)[1].item() for logits in (certain, more_certain)]
        assert scores[1] - scores[0] == pytest.approx(0.5, abs=1e-5)
        assert (certain.softmax(2)[..., 0] == 1).all()

    def test_equal_clips_have_the_score_of_an_image(self) -> None:
        logits_BC = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 4
        of_clips, of_image = (
            top_class_mean_log_odds(logits_BC[:, None].expand(6, 10, 9), 4),
            top_class_log_odds(logits_BC, 4),
        )
        assert torch.equal(of_clips[0], of_image[0])
        assert torch.allclose(of_clips[1], of_image[1], atol=1e-5)

    def test_clips_that_disagree_are_ranked_by_their_mean(self) -> None:
        logits_BVC = torch.tensor([[[50.0, 0.0, 10.0]] * 5 + [[0.0, 50.0, 10.0]] * 5])
        labels_BP, scores_BP = top_class_mean_log_odds(logits_BVC, 3)
        assert sorted(labels_BP[0, :2].tolist()) == [0, 1]
        assert scores_BP[0, :2].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
        assert scores_BP[0, 2] == pytest.approx(-40.0, abs=1e-4)


class _Brightness(nn.Module):
    """A network whose three logits are the mean brightness of a clip by channel."""

    def forward(self, clips_BCTHW: torch.Tensor) -> torch.Tensor:
        return clips_BCTHW.mean((2, 3, 4)) * 3


def test_logits_of_a_video_are_those_of_the_mean_softmax(tmp_path: Path) -> None:
    run = prepare_stages(tmp_path)
    preprocessing = Preprocessing(resolution=16, augmentation="crop-flip", frames=4)
    loader = EvalLoader(run.plan.test, SampleFields(videos=True), preprocessing)
    cpu = torch.device("cpu")
    logits_BC = predict_logits(_Brightness(), loader, cpu)
    views = np.concatenate(list(loader.batches()))
    assert views.shape == (9, 10, 4, 16, 16, 3)
    for row, view in zip(logits_BC.softmax(1), views, strict=True):
        clip_probabilities = torch.stack(
            [
                _Brightness()(normalization.to_normalized_batch(clip[None], preprocessing, cpu))[0].softmax(0)
                for clip in view
            ]
        )
        assert torch.allclose(row, clip_probabilities.mean(0), atol=1e-6)


def test_the_whole_pipeline_on_videos(tmp_path: Path) -> None:
    """The run has class folders, tars, Parquet and loose files of four containers.

    One file is damaged. The teacher has longer clips than the students (Table 7).
    """
    content = videos.write_run(tmp_path, max_failed_fraction=0.1, frames=2, teacher_frames=4)
    (tmp_path / "data" / "pool" / "broken.avi").write_bytes(videos.draw_video(0, 0)[:-50])
    run = Stages.on(PlanConfig.model_validate(content), tmp_path)
    report: Receipt = run.report
    assert run.selection.ledger.model_dump() == {"listed": 32, "scored": 31, "failed": 1, "removed": 0}
    assert run.selection.failed == {"video cut off": 1}
    assert run.packed.samples == run.selection.images == 12
    assert run.teacher.preprocessing.frames == 4
    for receipt in (run.pretrained, *run.students, *run.baselines):
        assert receipt.preprocessing.frames == 2
        assert np.isfinite([point.loss for point in receipt.curve]).all()
    assert set(run.evaluation.models) == {"teacher", "baseline", "pretrained", "student"}
    assert run.evaluation.models["student"].images == 9
    assert run.evaluation.models["student"].top1 > 0.6
    check_predictions(run)
    check_ready_made_teacher(run)
    page = storage.read_bytes(run.report.report).decode()
    assert page.count("data:image/png;base64") >= 3
    assert [page.count(f"r2plus1d_8_small, {frames} frames") for frames in (4, 2)] == [1, 3]
    assert report.stage == "report"
    kinds = {str(row["shard"]).partition(".")[2] for row in run.selection_rows()}
    # A shard of loose files has the name of its first file.
    assert kinds <= {"tar", "parquet", "avi"}


def check_predictions(run: Stages) -> None:
    """Check that all models have predictions of the same videos."""
    predictions = {
        name: Predictions.from_bytes(storage.read_bytes(model.predictions))
        for name, model in run.evaluation.models.items()
    }
    for receipt, name in ((run.teacher, "teacher"), (run.pretrained, "pretrained")):
        loader = EvalLoader(run.plan.test, SampleFields(videos=True), receipt.preprocessing)
        assert next(loader.batches()).shape[2] == receipt.preprocessing.frames
        expected_BC = predict_logits(
            checkpoint_io.load_model(receipt.checkpoint)[0], loader, torch.device("cpu")
        ).softmax(1)
        assert predictions[name].probability_B == pytest.approx(expected_BC.max(1).values.numpy())
    videos_of_models = [(model.keys, model.labels_B.tolist()) for model in predictions.values()]
    assert videos_of_models == [videos_of_models[0]] * 4


def check_ready_made_teacher(run: Stages) -> None:
    """Check that another run can use the teacher only with its clip length."""
    changes = {"name": "other", "teacher_checkpoint": run.teacher.checkpoint}
    other = Stages.on(run.config.model_copy(update=changes), run.root)
    receipt = other.train("teacher", checkpoint=run.teacher.checkpoint)
    assert (receipt.images_processed, receipt.preprocessing) == (0, run.teacher.preprocessing)
    shorter = other.config.model_copy(update={"name": "shorter", "teacher_frames": 0})
    with pytest.raises(InvalidInputError, match="4 frames of 8 x 8 pixels, .*2 frames of 8 x 8.*SEMI-E139"):
        plan(shorter)


def _identity(row: dict[str, object]) -> dict[str, object]:
    return {name: row[name] for name in ("class", "shard", "index", "score")}


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_exported_model_of_clips_describes_its_input(tmp_path: Path, kind: Format) -> None:
    preprocessing = Preprocessing(resolution=16, augmentation="crop-flip", frames=4)
    model = networks.build_model("r2plus1d_8_small", 3)
    with torch.no_grad():
        model(torch.randn(8, 3, 4, 16, 16))
    metadata = CheckpointMetadata(
        architecture="r2plus1d_8_small",
        classes=["a", "b", "c"],
        preprocessing=preprocessing,
        recipe="teacher",
        digest="0",
    )
    uri = checkpoint_io.save_model(model, metadata, str(tmp_path))
    exported = export_model(uri, kind, random_images(uri), str(tmp_path / "out"))
    assert exported.input.startswith("clips: uint8, batch x 4 frames x 16 x 16 x 3")
    assert exported.before.startswith("take 10 clips of 4 neighbouring frames, uniformly spaced")
    assert "short side to 18 pixels" in exported.before
    assert exported.verified_images == 8


def test_the_estimate_decodes_whole_videos(tmp_path: Path) -> None:
    settings = RunConfig.model_validate(videos.write_run(tmp_path))
    throughput, inputs = measure_throughput(settings), measure_inputs(settings, 0)
    # The sample has eight videos of each tar and all videos of the other shards.
    assert (throughput.samples, throughput.failed) == (23, 0)
    assert throughput.decode.source == "measured here on 23 videos, one core"
    assert (inputs.labeled.images, inputs.test.images, inputs.unlabeled.images) == (12, 9, 31)
    rates = measure_device_rates("r2plus1d_8_small", 8, 3, frames=4)
    # Scoring runs ten clips forward. Training runs one clip forward and backward.
    assert rates["forward"].value < rates["train"].value


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not here")
def test_the_whole_pipeline_on_real_videos(tmp_path: Path) -> None:
    content = {
        **videos.write_run(tmp_path, resolution=32, frames=8, classes="", validation=[], validation_fraction=0.2),
        **{
            "labeled": [str(REAL / "labeled")],
            "test": [str(REAL / "test")],
            "unlabeled": [str(REAL / "unlabeled-*.tar")],
        },
    }
    run = Stages.on(PlanConfig.model_validate(content), tmp_path)
    assert storage.read_bytes(run.report.report)
    assert (run.selection.ledger.scored, run.selection.ledger.failed) == (36, 0)
    assert run.evaluation.models["student"].images == 16


@pytest.mark.slow
def test_scores_do_not_depend_on_the_number_of_pods(tmp_path: Path) -> None:
    short = {"teacher_images_processed": 24}
    one_pod, three_pods = (prepare_stages(tmp_path / str(pods), pods=pods, **short) for pods in (1, 3))
    rows = [[_identity(row) for row in run.selection_rows()] for run in (one_pod, three_pods)]
    assert rows[0] == rows[1]
    table = pq.read_table(io.BytesIO(storage.read_bytes(one_pod.selection.selection)))
    assert np.isfinite(table["score"].to_numpy()).all()
