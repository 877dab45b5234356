"""Test the gallery: its classes, ranks and thumbnails."""

from pathlib import Path

import pytest

from semiscale.data.image_decoding import decode_image
from semiscale.data.listing import list_shards
from semiscale.stages.report.gallery import THUMBNAIL_PX, evenly_spaced, powers_of_ten, thumbnail
from tests.support.reports import make_png, make_selection_rows, read_page, write_report, write_run


def test_the_page_marks_images_that_are_gone_or_changed(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    rows = make_selection_rows(list_shards([str(tmp_path / "pool")]))
    # This image has rank 1 in classes 0 and 2.
    Path(str(rows[0]["uri"])).unlink()
    # This image has rank 1 in class 1.
    Path(str(rows[12]["uri"])).write_bytes(b"shorter")
    # The Parquet file holds ranks 10 and 12 of two classes.
    with (tmp_path / "pool" / "pool.parquet").open("ab") as file:
        file.write(b"more")
    page = read_page(write_report(tmp_path, receipts))
    assert page.count("gone or changed since it was scored") == 7


@pytest.mark.parametrize(
    ("count", "expected"), [(3, [0, 1, 2]), (20, list(range(20))), (1000, [round(i * 999 / 19) for i in range(20)])]
)
def test_gallery_classes_are_evenly_spaced(count: int, expected: list[int]) -> None:
    assert evenly_spaced(count, 20) == expected


def test_gallery_ranks_are_powers_of_ten_below_k() -> None:
    assert (powers_of_ten(1), powers_of_ten(10), powers_of_ten(16_000)) == ([], [1], [1, 10, 100, 1000, 10_000])


@pytest.mark.parametrize(("width", "shown", "tiny"), [(32, 32, True), (96, 96, False), (400, 96, False)])
def test_thumbnails_only_shrink(width: int, shown: int, tiny: bool) -> None:
    source, enlarged = thumbnail(decode_image(make_png(0, width, width // 2)))
    data = source.partition("base64,")[2]
    assert source.startswith("data:image/png" if tiny else "data:image/jpeg")
    assert enlarged is tiny
    assert len(data) < 4 * THUMBNAIL_PX**2
    assert shown <= THUMBNAIL_PX
