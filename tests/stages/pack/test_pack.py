"""Test that an equal selection and seed pack D̂ into equal bytes."""

import io
import json
import tarfile
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.data import listing, parquet_reader, reader
from semiscale.data.shard import SampleFields
from semiscale.receipts.pack import PackReceipt
from semiscale.stages.pack import range_reads, tar_layout
from semiscale.stages.pack.config import PackConfig, PackFanoutConfig
from semiscale.stages.pack.fanout import plan_pack_fanout
from semiscale.stages.pack.range_reads import ByteLocation
from semiscale.stages.pack.selection_columns import I64, SelectionColumns
from semiscale.stages.pack.stage import pack
from tests.support import sample_images, selections
from tests.support.stages import Stages

# An image has about 200 bytes, so a tar has about ten.
TAR_BYTES = 2000


def run_pack(root: Path, receipts: tuple[str, str], workdir: str = "work", **changes: object) -> PackReceipt:
    """Pack a selection."""
    plan, selection = receipts
    settings = {"plan": plan, "selection": selection, "workdir": str(root / workdir), "packed_tar_bytes": TAR_BYTES}
    return pack(PackConfig.model_validate({**settings, **changes}))


def read_tars(receipt: PackReceipt) -> dict[str, bytes]:
    """Return the bytes of every tar, by name."""
    shards = [item["shard"] for item in json.loads(storage.read_bytes(receipt.shards))]
    return {shard["name"]: storage.read_bytes(shard["uri"]) for shard in shards}


def read_samples(receipt: PackReceipt) -> list[list[tuple[int, bytes]]]:
    """Return (class, image) of every sample, tar by tar."""
    tars = []
    for item in json.loads(storage.read_bytes(receipt.shards)):
        with tarfile.open(item["shard"]["uri"]) as tar:
            data = [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
        tars.append([(int(label), image) for label, image in zip(data[::2], data[1::2], strict=True)])
        assert [label for label, _ in tars[-1]] == item["labels"]
        assert Path(item["shard"]["uri"]).stat().st_size == item["shard"]["size_bytes"]
    return tars


def write_pool(root: Path, kind: str) -> str:
    """Write 240 images into tars or Parquet files, or as loose files."""
    images = {f"{number:05}.png": sample_images.draw_png(number % 4 - 1, 1000 + number) for number in range(240)}
    parts = [dict(list(images.items())[start : start + 40]) for start in range(0, 240, 40)]
    folder = root / kind
    folder.mkdir()
    for number, part in enumerate(parts):
        if kind == "tar":
            sample_images.write_tar(folder / f"{number}.tar", part)
        elif kind == "parquet":
            table = pa.table({"key": [name[:5] for name in part], "image": list(part.values())})
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=7)
        else:
            for name, image in part.items():
                (folder / name).write_bytes(image)
    return str(folder)


@pytest.mark.parametrize("kind", ["tar", "parquet", "files"])
def test_the_packed_set_is_the_shuffled_selection(tmp_path: Path, kind: str) -> None:
    receipts = selections.write_selection(tmp_path, write_pool(tmp_path, kind), per_class=60)
    receipt = run_pack(tmp_path, receipts)
    samples = [sample for tar in read_samples(receipt) for sample in tar]
    rows = pq.read_table(tmp_path / "selection.parquet").to_pylist()
    selected = [
        (row["class"], sample_images.draw_png(number % 4 - 1, 1000 + number))
        for row in rows
        for number in [int(Path(row["key"]).stem)]
    ]
    assert sorted(samples) == sorted(selected)
    assert samples != sorted(samples)
    assert receipt.class_counts == [60, 60, 60]
    assert receipt.samples == 180
    assert len(read_tars(receipt)) == receipt.tars > 10
    assert sum(map(len, read_tars(receipt).values())) == receipt.size_bytes
    assert not list((tmp_path / "work").rglob("excerpts/*")), "the extracts of Parquet files are deleted"


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_the_bytes_do_not_depend_on_the_pods(tmp_path: Path, kind: str) -> None:
    pool = write_pool(tmp_path, kind)
    tars = []
    for pods, pod in ((1, 0), (2, 1), (7, 5)):
        root = tmp_path / f"{pods}"
        root.mkdir()
        tars.append(read_tars(run_pack(root, selections.write_selection(root, pool, per_class=60, pods=pods), pod=pod)))
    assert tars[0] == tars[1] == tars[2]


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    receipts = selections.write_selection(tmp_path, write_pool(tmp_path, "tar"), per_class=60)
    first, second = (list(chain(*read_samples(run_pack(tmp_path, receipts, seed=seed)))) for seed in (1, 2))
    assert first != second
    assert sorted(first) == sorted(second)


def test_existing_tars_are_not_written_again(tmp_path: Path) -> None:
    receipts = selections.write_selection(tmp_path, write_pool(tmp_path, "tar"), per_class=60)
    first = run_pack(tmp_path, receipts)
    (Path(first.folder) / "receipt.json").unlink()
    victim, *others = sorted(Path(first.folder).glob("*.tar"))
    expected, times = victim.read_bytes(), [path.stat().st_mtime_ns for path in others]
    victim.unlink()
    again = run_pack(tmp_path, receipts)
    assert again.model_copy(update={"seconds": first.seconds}) == first
    assert victim.read_bytes() == expected
    assert [path.stat().st_mtime_ns for path in others] == times


@pytest.mark.parametrize(("kind", "again"), [("tar", "1 of 4 pods: 1 of"), ("parquet", "4 of 4 pods: 1 of")])
def test_the_number_of_pods_follows_the_remaining_work(tmp_path: Path, kind: str, again: str) -> None:
    # The images of the last tar may lie in all Parquet files, so all extracts are written again.
    plan, selection = selections.write_selection(tmp_path, write_pool(tmp_path, kind), per_class=60, pods=4)
    config = PackFanoutConfig(
        workdir=str(tmp_path / "work"), plan=plan, selection=selection, packed_tar_bytes=TAR_BYTES
    )
    assert plan_pack_fanout(config).pods == 4
    receipt = run_pack(tmp_path, (plan, selection))
    assert plan_pack_fanout(config).why == f"1 of 4 pods: 0 of {receipt.tars} tars to pack"
    (Path(receipt.folder) / "receipt.json").unlink()
    assert plan_pack_fanout(config).why == f"1 of 4 pods: 0 of {receipt.tars} tars to pack"
    next(Path(receipt.folder).glob("*.tar")).unlink()
    assert plan_pack_fanout(config).why.startswith(f"{again} {receipt.tars} tars to pack")


def test_each_pod_begins_with_its_own_share_of_the_missing_tars(tmp_path: Path) -> None:
    # Two of eighteen tars are missing, so two of the four possible pods have work.
    plan, selection = selections.write_selection(tmp_path, write_pool(tmp_path, "tar"), per_class=60, pods=4)
    receipt = run_pack(tmp_path, (plan, selection))
    config = PackFanoutConfig(
        workdir=str(tmp_path / "work"), plan=plan, selection=selection, packed_tar_bytes=TAR_BYTES
    )
    first, second, *_ = sorted(Path(receipt.folder).glob("*.tar"))
    for path in (first, second, Path(receipt.folder) / "receipt.json"):
        path.unlink()
    counted = plan_pack_fanout(config)
    assert counted.pods == 2
    (tmp_path / "count.json").write_text(counted.model_dump_json())
    run_pack(tmp_path, (plan, selection), pod=1, count=str(tmp_path / "count.json"))
    assert second.stat().st_mtime_ns < first.stat().st_mtime_ns


@pytest.mark.parametrize("kind", ["tar", "files"])
def test_a_changed_source_is_refused_even_if_its_locations_have_images(tmp_path: Path, kind: str) -> None:
    receipts = selections.write_selection(tmp_path, write_pool(tmp_path, kind), per_class=60)
    for path in (tmp_path / kind).iterdir():
        path.write_bytes(path.read_bytes() + bytes(10240))
    with pytest.raises(SemiscaleError, match=rf"^{tmp_path}/{kind}/.*: .*SEMI-E021"):
        run_pack(tmp_path, receipts)


@pytest.mark.parametrize("change", ["shorter", "no image", "deleted"])
def test_a_changed_linked_image_is_refused(tmp_path: Path, change: str) -> None:
    links = sorted(str(path) for path in Path(write_pool(tmp_path, "files")).iterdir())
    pq.write_table(pa.table({"image": links}), tmp_path / "links.parquet")
    receipts = selections.write_selection(tmp_path, str(tmp_path / "links.parquet"), per_class=60)
    for link in links:
        Path(link).write_bytes(b"short" if change == "shorter" else b"x" * 200_000)
        if change == "deleted":
            Path(link).unlink()
    message = r": .*SEMI-E320" if change == "deleted" else r", byte 0: .*SEMI-E321"
    with pytest.raises(SemiscaleError, match=rf"\.png{message}"):
        run_pack(tmp_path, receipts)


def test_a_changed_parquet_source_is_refused(tmp_path: Path) -> None:
    receipts = selections.write_selection(tmp_path, write_pool(tmp_path, "parquet"), per_class=60)
    sample_images.write_parquet(tmp_path / "parquet" / "3.parquet", 5, seed=1)
    with pytest.raises(SemiscaleError, match=r"3\.parquet: .*SEMI-E021"):
        run_pack(tmp_path, receipts)


def test_only_the_row_groups_with_a_selected_image_are_read(tmp_path: Path) -> None:
    pool = Path(write_pool(tmp_path, "parquet"))
    [shard] = listing.list_shards([str(pool / "0.parquet")])
    # They lie in row groups 0, 2, 2 and 5.
    wanted = [3, 15, 16, 39]
    samples = list(reader.iter_samples(shard, SampleFields("image", "")))
    assert list(parquet_reader.read_samples_at(shard, wanted, SampleFields("image", ""))) == [
        samples[index] for index in wanted
    ]
    path = pool / "0.parquet"
    data = bytearray(path.read_bytes())
    unread = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data[unread.data_page_offset : unread.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(data)
    [damaged] = listing.list_shards([str(path)])
    assert [
        sample.index for sample in parquet_reader.read_samples_at(damaged, wanted, SampleFields("image", ""))
    ] == wanted
    with pytest.raises(SemiscaleError, match="SEMI-E057"):
        list(parquet_reader.read_samples_at(damaged, [8], SampleFields("image", "")))


def random_selection(images: int, classes: int, seed: int = 0) -> SelectionColumns:
    """Return a random selection from 20 shards, in the order of the merge.

    Args:
        images: The number of images of the pool.
        classes: The number of classes. An image is selected for up to this many.
        seed: Seeds the selection.
    """
    rng = np.random.default_rng(seed)
    chosen = [(label, image) for label in range(classes) for image in np.flatnonzero(rng.random(images) < 0.6)]
    label, image = np.array(chosen).T
    return SelectionColumns(
        label=label.astype(np.uint16),
        shard=(image % 20).astype(np.int32),
        index=image // 20,
        uri=(image % 20).astype(np.int32),
        offset=image // 20 * 200,
        size_bytes=np.full(len(image), 100),
        shards=[f"shard-{number}.tar" for number in range(20)],
        uris=pa.array([f"/pool/shard-{number}.tar" for number in range(20)]),
    )


def identities(rows: SelectionColumns, order: I64) -> list[tuple[int, str, int]]:
    """Return (class, shard name, index) of these rows."""
    return [(int(rows.label[row]), rows.shards[rows.shard[row]], int(rows.index[row])) for row in order]


@pytest.mark.parametrize("tars", [1, 2, 3, 4, 5, 40])
def test_copies_of_an_image_are_far_apart(tars: int) -> None:
    rows = random_selection(images=2000, classes=4)
    layout = tar_layout.plan_layout(rows, tar_bytes=-(-100 * len(rows) // tars), seed=3)
    assert len(layout.edges) == tars + 1
    assert sorted(layout.order.tolist()) == list(range(len(rows)))
    positions_of = defaultdict(list)
    for position, (_, shard, index) in enumerate(identities(rows, layout.order)):
        positions_of[shard, index].append(position)
    assert {len(positions) for positions in positions_of.values()} == {1, 2, 3, 4}
    for positions in positions_of.values():
        copies = len(positions)
        tar_of_copy = np.searchsorted(layout.edges, positions, side="right")
        if copies <= tars:
            assert len(set(tar_of_copy)) == copies, "no tar has two copies"
        # With c copies, the distance is a c-th of a tar except for chance. It is larger with more tars.
        assert np.diff(positions).min(initial=len(rows)) > 0.8 * len(rows) / tars / copies


def test_tars_have_similar_sizes() -> None:
    rows = random_selection(images=10_000, classes=4)
    layout = tar_layout.plan_layout(rows, tar_bytes=100 * len(rows) // 20, seed=0)
    sizes = np.diff(layout.edges)
    assert abs(sizes / sizes.mean() - 1).max() < 0.15


def test_the_tar_of_a_row_depends_on_its_identity_only() -> None:
    # It depends neither on the order of the rows, nor on the numbers or the URIs of the shards.
    rows = random_selection(images=500, classes=3)
    rng = np.random.default_rng(5)
    shuffled, renumbered = rng.permutation(len(rows)), rng.permutation(20)
    other = SelectionColumns(
        label=rows.label[shuffled],
        shard=np.argsort(renumbered)[rows.shard[shuffled]].astype(np.int32),
        index=rows.index[shuffled],
        uri=rows.uri[shuffled],
        offset=rows.offset[shuffled],
        size_bytes=rows.size_bytes[shuffled],
        shards=[rows.shards[number] for number in renumbered],
        uris=pa.array([f"elsewhere-{number}" for number in range(20)]),
    )
    layout, other_layout = (tar_layout.plan_layout(some, tar_bytes=9000, seed=7) for some in (rows, other))
    assert layout.edges == other_layout.edges
    assert identities(rows, layout.order) == identities(other, other_layout.order)


def test_near_images_are_read_together_and_distant_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    image = b"\xff\xd8\xff" + bytes(range(100))
    gap = range_reads.COALESCE_GAP_BYTES
    locations = [
        ByteLocation(str(path), offset, len(image)) for offset in (0, 500, 500 + len(image) + gap, 3 * gap, 500)
    ]
    data = bytearray(4 * gap)
    for location in locations:
        data[location.offset : location.end] = image
    path.write_bytes(data)
    ranges = range_reads.coalesce(locations)
    assert [part.images for part in ranges] == [[0, 1, 4, 2], [3]]
    assert [(part.start, part.end) for part in ranges] == [
        (0, locations[2].end),
        (locations[3].offset, locations[3].end),
    ]
    assert range_reads.read_images(locations) == [image] * 5


def test_a_dense_shard_is_read_in_several_requests() -> None:
    size = 1 << 20
    ranges = range_reads.coalesce([ByteLocation("a", number * size, size) for number in range(20)])
    assert [part.end - part.start for part in ranges] == [range_reads.MAX_RANGE_BYTES] * 2 + [4 * size]
    assert [number for part in ranges for number in part.images] == list(range(20))


@pytest.mark.parametrize("name", ["jpg", "png", "webp", "gif", "bmp"])
def test_the_extension_of_an_image_is_its_format(name: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "JPEG" if name == "jpg" else name)
    assert range_reads.detect_extension(buffer.getvalue()) == name


def test_loose_gifs_and_bitmaps_are_listed_scored_and_packed(tmp_path: Path) -> None:
    originals = {}
    (tmp_path / "loose").mkdir()
    for number in range(12):
        frames = [Image.open(io.BytesIO(sample_images.draw_png((number + shift) % 3, number))) for shift in (0, 1)]
        path = tmp_path / "loose" / f"{number:02}.{('gif', 'bmp')[number % 2]}"
        animated: dict[str, Any] = {"save_all": True, "append_images": frames[1:]} if path.suffix == ".gif" else {}
        frames[0].save(path, **animated)
        originals[path.name] = path.read_bytes()
    with Image.open(tmp_path / "loose" / "00.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 2
    stages = Stages(tmp_path, unlabeled=[str(tmp_path / "loose")], images_per_class=12, classes_per_image=1)
    assert sum(pod.listed for pod in stages.scores) == sum(pod.scored for pod in stages.scores) == 12
    rows = stages.selection_rows()
    assert {row["key"] for row in rows} == originals.keys()
    num_correct = sum(row["class"] == int(row["key"][:2]) % 3 for row in rows)
    assert num_correct >= 10, "the teacher, trained on PNG, recognises the first frame"
    members = []
    for data in read_tars(stages.packed).values():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members += [(Path(member.name).suffix, tar.extractfile(member).read()) for member in tar if member.isfile()]  # type: ignore[union-attr]
    images = [(suffix, data) for suffix, data in members if suffix in (".gif", ".bmp")]
    assert sorted(images) == sorted((Path(name).suffix, data) for name, data in originals.items())
