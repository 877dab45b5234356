"""D̂ copied into tars: the definition, that nothing but the selection and the seed changes a byte, what is read."""

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
from tests.support import pictures, selections
from tests.support.stages import Stages

TAR_BYTES = 2000  # of images of 200 bytes or so: tars of ten


def packed(root: Path, receipts: tuple[str, str], workdir: str = "work", **changes: object) -> PackReceipt:
    """Pack a selection."""
    plan, selection = receipts
    settings = {"plan": plan, "selection": selection, "workdir": str(root / workdir), "packed_tar_bytes": TAR_BYTES}
    return pack(PackConfig.model_validate({**settings, **changes}))


def tars_of(receipt: PackReceipt) -> dict[str, bytes]:
    """The bytes of every tar, by name."""
    listed = [item["shard"] for item in json.loads(storage.read_bytes(receipt.shards))]
    return {shard["name"]: storage.read_bytes(shard["uri"]) for shard in listed}


def samples_of(receipt: PackReceipt) -> list[list[tuple[int, bytes]]]:
    """(class, image) of every sample, tar by tar."""
    found = []
    for item in json.loads(storage.read_bytes(receipt.shards)):
        with tarfile.open(item["shard"]["uri"]) as tar:
            data = [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
        found.append([(int(label), image) for label, image in zip(data[::2], data[1::2], strict=True)])
        assert [label for label, _ in found[-1]] == item["labels"]
        assert Path(item["shard"]["uri"]).stat().st_size == item["shard"]["size_bytes"]
    return found


def pool_of(root: Path, kind: str) -> str:
    """The same 240 images in tars, in Parquet files of several row groups, or as loose files."""
    images = {f"{number:05}.png": pictures.picture(number % 4 - 1, 1000 + number) for number in range(240)}
    parts = [dict(list(images.items())[start : start + 40]) for start in range(0, 240, 40)]
    folder = root / kind
    folder.mkdir()
    for number, part in enumerate(parts):
        if kind == "tar":
            pictures.write_tar(folder / f"{number}.tar", part)
        elif kind == "parquet":
            table = pa.table({"key": [name[:5] for name in part], "image": list(part.values())})
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=7)
        else:
            for name, image in part.items():
                (folder / name).write_bytes(image)
    return str(folder)


@pytest.mark.parametrize("kind", ["tar", "parquet", "files"])
def test_the_packed_set_is_the_selection_shuffled(tmp_path: Path, kind: str) -> None:
    receipts = selections.write(tmp_path, pool_of(tmp_path, kind), per_class=60)
    receipt = packed(tmp_path, receipts)
    samples = [sample for tar in samples_of(receipt) for sample in tar]
    rows = pq.read_table(tmp_path / "selection.parquet").to_pylist()
    selected = [
        (row["class"], pictures.picture(number % 4 - 1, 1000 + number))
        for row in rows
        for number in [int(Path(row["key"]).stem)]
    ]
    assert sorted(samples) == sorted(selected)
    assert samples != sorted(samples)
    assert receipt.class_counts == [60, 60, 60]
    assert receipt.samples == 180
    assert len(tars_of(receipt)) == receipt.tars > 10
    assert sum(map(len, tars_of(receipt).values())) == receipt.size_bytes
    assert not list((tmp_path / "work").rglob("excerpts/*")), "what was copied out of Parquet files is removed"


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_pods_and_their_order_change_no_byte(tmp_path: Path, kind: str) -> None:
    pool = pool_of(tmp_path, kind)
    found = []
    for pods, pod in ((1, 0), (2, 1), (7, 5)):
        root = tmp_path / f"{pods}"
        root.mkdir()
        found.append(tars_of(packed(root, selections.write(root, pool, per_class=60, pods=pods), pod=pod)))
    assert found[0] == found[1] == found[2]


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    receipts = selections.write(tmp_path, pool_of(tmp_path, "tar"), per_class=60)
    one, other = (list(chain(*samples_of(packed(tmp_path, receipts, seed=seed)))) for seed in (1, 2))
    assert one != other
    assert sorted(one) == sorted(other)


def test_tars_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    receipts = selections.write(tmp_path, pool_of(tmp_path, "tar"), per_class=60)
    first = packed(tmp_path, receipts)
    (Path(first.folder) / "receipt.json").unlink()
    victim, *kept = sorted(Path(first.folder).glob("*.tar"))
    expected, times = victim.read_bytes(), [path.stat().st_mtime_ns for path in kept]
    victim.unlink()
    again = packed(tmp_path, receipts)
    assert again.model_copy(update={"seconds": first.seconds}) == first
    assert victim.read_bytes() == expected
    assert [path.stat().st_mtime_ns for path in kept] == times


@pytest.mark.parametrize(("kind", "again"), [("tar", "1 of 4 pods: 1 of"), ("parquet", "4 of 4 pods: 1 of")])
def test_the_packing_has_as_many_pods_as_there_is_work_for(tmp_path: Path, kind: str, again: str) -> None:
    """The last tar's images may lie in all Parquet files, whose excerpts are made anew."""
    plan, selection = selections.write(tmp_path, pool_of(tmp_path, kind), per_class=60, pods=4)
    config = PackFanoutConfig(
        workdir=str(tmp_path / "work"), plan=plan, selection=selection, packed_tar_bytes=TAR_BYTES
    )
    assert plan_pack_fanout(config).pods == 4
    receipt = packed(tmp_path, (plan, selection))
    assert plan_pack_fanout(config).why == f"1 of 4 pods: 0 of {receipt.tars} tars to pack"
    (Path(receipt.folder) / "receipt.json").unlink()
    assert plan_pack_fanout(config).why == f"1 of 4 pods: 0 of {receipt.tars} tars to pack"
    next(Path(receipt.folder).glob("*.tar")).unlink()
    assert plan_pack_fanout(config).why.startswith(f"{again} {receipt.tars} tars to pack")


def test_each_of_the_counted_pods_begins_with_its_own_share_of_what_is_left(tmp_path: Path) -> None:
    """The first two tars of eighteen are gone: of the four pods that there may be, two are worth it."""
    plan, selection = selections.write(tmp_path, pool_of(tmp_path, "tar"), per_class=60, pods=4)
    receipt = packed(tmp_path, (plan, selection))
    config = PackFanoutConfig(
        workdir=str(tmp_path / "work"), plan=plan, selection=selection, packed_tar_bytes=TAR_BYTES
    )
    first, second, *_ = sorted(Path(receipt.folder).glob("*.tar"))
    for path in (first, second, Path(receipt.folder) / "receipt.json"):
        path.unlink()
    counted = plan_pack_fanout(config)
    assert counted.pods == 2
    (tmp_path / "count.json").write_text(counted.model_dump_json())
    packed(tmp_path, (plan, selection), pod=1, count=str(tmp_path / "count.json"))
    assert second.stat().st_mtime_ns < first.stat().st_mtime_ns


@pytest.mark.parametrize("kind", ["tar", "files"])
def test_a_source_that_changed_is_refused_also_where_other_images_lie_in_its_places(tmp_path: Path, kind: str) -> None:
    receipts = selections.write(tmp_path, pool_of(tmp_path, kind), per_class=60)
    for path in (tmp_path / kind).iterdir():
        path.write_bytes(path.read_bytes() + bytes(10240))
    with pytest.raises(SemiscaleError, match=rf"^{tmp_path}/{kind}/.*: .*SEMI-E021"):
        packed(tmp_path, receipts)


@pytest.mark.parametrize("what", ["shorter", "no image", "gone"])
def test_a_linked_image_that_changed_is_refused(tmp_path: Path, what: str) -> None:
    links = sorted(str(path) for path in Path(pool_of(tmp_path, "files")).iterdir())
    pq.write_table(pa.table({"image": links}), tmp_path / "links.parquet")
    receipts = selections.write(tmp_path, str(tmp_path / "links.parquet"), per_class=60)
    for link in links:
        Path(link).write_bytes(b"short" if what == "shorter" else b"x" * 200_000)
        if what == "gone":
            Path(link).unlink()
    how = r": .*SEMI-E320" if what == "gone" else r", byte 0: .*SEMI-E321"
    with pytest.raises(SemiscaleError, match=rf"\.png{how}"):
        packed(tmp_path, receipts)


def test_a_parquet_source_that_changed_is_refused(tmp_path: Path) -> None:
    receipts = selections.write(tmp_path, pool_of(tmp_path, "parquet"), per_class=60)
    pictures.write_parquet(tmp_path / "parquet" / "3.parquet", 5, seed=1)
    with pytest.raises(SemiscaleError, match=r"3\.parquet: .*SEMI-E021"):
        packed(tmp_path, receipts)


def test_of_a_parquet_file_only_the_row_groups_with_a_selected_image_are_read(tmp_path: Path) -> None:
    pool = Path(pool_of(tmp_path, "parquet"))
    [shard] = listing.list_shards([str(pool / "0.parquet")])
    wanted = [3, 15, 16, 39]  # of row groups 0, 2, 2 and 5
    everything = list(reader.iter_samples(shard, SampleFields("image", "")))
    assert list(parquet_reader.read_samples_at(shard, wanted, SampleFields("image", ""))) == [
        everything[index] for index in wanted
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


def rows_of(images: int, classes: int, seed: int = 0) -> SelectionColumns:
    """A selection of images in one to `classes` classes each, as the merge orders it, spread over 20 shards."""
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


def sequence(rows: SelectionColumns, order: I64) -> list[tuple[int, str, int]]:
    """Name rows by what they are, not by where they stand in the selection."""
    return [(int(rows.label[row]), rows.shards[rows.shard[row]], int(rows.index[row])) for row in order]


@pytest.mark.parametrize("tars", [1, 2, 3, 4, 5, 40])
def test_copies_of_an_image_lie_far_apart(tars: int) -> None:
    rows = rows_of(images=2000, classes=4)
    drawn = tar_layout.plan_layout(rows, tar_bytes=-(-100 * len(rows) // tars), seed=3)
    assert len(drawn.edges) == tars + 1
    assert sorted(drawn.order.tolist()) == list(range(len(rows)))
    where = defaultdict(list)
    for place, (_, shard, index) in enumerate(sequence(rows, drawn.order)):
        where[shard, index].append(place)
    assert {len(places) for places in where.values()} == {1, 2, 3, 4}
    for places in where.values():
        copies = len(places)
        in_tars = np.searchsorted(drawn.edges, places, side="right")
        if copies <= tars:
            assert len(set(in_tars)) == copies, "never two in one tar"
        # A copies-th of a tar, give or take chance; further with more tars.
        assert np.diff(places).min(initial=len(rows)) > 0.8 * len(rows) / tars / copies


def test_tars_are_about_equally_large() -> None:
    rows = rows_of(images=10_000, classes=4)
    drawn = tar_layout.plan_layout(rows, tar_bytes=100 * len(rows) // 20, seed=0)
    sizes = np.diff(drawn.edges)
    assert abs(sizes / sizes.mean() - 1).max() < 0.15


def test_where_a_row_goes_depends_on_what_it_is_alone() -> None:
    """Not on its place in the selection, on the numbering of the shards, or on where they lie."""
    rows = rows_of(images=500, classes=3)
    lots = np.random.default_rng(5)
    shuffled, renumbered = lots.permutation(len(rows)), lots.permutation(20)
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
    one, two = (tar_layout.plan_layout(some, tar_bytes=9000, seed=7) for some in (rows, other))
    assert one.edges == two.edges
    assert sequence(rows, one.order) == sequence(other, two.order)


def test_neighbours_are_read_together_and_what_is_far_is_not(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    image = b"\xff\xd8\xff" + bytes(range(100))
    apart = range_reads.COALESCE_GAP_BYTES
    places = [
        ByteLocation(str(path), offset, len(image)) for offset in (0, 500, 500 + len(image) + apart, 3 * apart, 500)
    ]
    data = bytearray(4 * apart)
    for place in places:
        data[place.offset : place.end] = image
    path.write_bytes(data)
    found = range_reads.coalesce(places)
    assert [one.images for one in found] == [[0, 1, 4, 2], [3]]
    assert [(one.start, one.end) for one in found] == [(0, places[2].end), (places[3].offset, places[3].end)]
    assert range_reads.read_images(places) == [image] * 5


def test_a_dense_shard_is_read_in_several_requests() -> None:
    size = 1 << 20
    found = range_reads.coalesce([ByteLocation("a", number * size, size) for number in range(20)])
    assert [one.end - one.start for one in found] == [range_reads.MAX_RANGE_BYTES] * 2 + [4 * size]
    assert [number for one in found for number in one.images] == list(range(20))


@pytest.mark.parametrize("name", ["jpg", "png", "webp", "gif", "bmp"])
def test_an_image_is_called_what_it_is(name: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "JPEG" if name == "jpg" else name)
    assert range_reads.detect_extension(buffer.getvalue()) == name


def test_loose_gifs_and_bitmaps_are_listed_scored_and_packed(tmp_path: Path) -> None:
    written = {}
    (tmp_path / "loose").mkdir()
    for number in range(12):
        frames = [Image.open(io.BytesIO(pictures.picture((number + shift) % 3, number))) for shift in (0, 1)]
        path = tmp_path / "loose" / f"{number:02}.{('gif', 'bmp')[number % 2]}"
        animated: dict[str, Any] = {"save_all": True, "append_images": frames[1:]} if path.suffix == ".gif" else {}
        frames[0].save(path, **animated)
        written[path.name] = path.read_bytes()
    with Image.open(tmp_path / "loose" / "00.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 2
    stages = Stages(tmp_path, unlabeled=[str(tmp_path / "loose")], images_per_class=12, classes_per_image=1)
    assert sum(one.listed for one in stages.scores) == sum(one.scored for one in stages.scores) == 12
    rows = stages.selection_rows()
    assert {row["key"] for row in rows} == written.keys()
    right = sum(row["class"] == int(row["key"][:2]) % 3 for row in rows)
    assert right >= 10, "the first frame's class, by a teacher that was trained on PNG"
    found = []
    for data in tars_of(stages.packed).values():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            found += [(Path(one.name).suffix, tar.extractfile(one).read()) for one in tar if one.isfile()]  # type: ignore[union-attr]
    images = [(suffix, data) for suffix, data in found if suffix in (".gif", ".bmp")]
    assert sorted(images) == sorted((Path(name).suffix, data) for name, data in written.items())
