"""Compare the merge with DuckDB and Polars: the exact top K of every class.

    make bench-merge ROWS=100000000

The pool is synthetic: 1000 classes, Zipf first choices, 35 % of the images in the classes' domain with an
over-confident teacher, 10 scored classes an image. It is stored twice: as the score files of our shard groups, and as
plain Parquet files of (id, class, score). Each contestant is a fresh process, and its time includes imports and
writing the winners. All must find the same winners. FULL=1 is a billion images. It measures our merge alone, on files
that hold the best ranks only, and checks it against an exact pass over the same rows.
"""

import argparse
import functools
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from semiscale import storage
from semiscale.scores import score_file
from semiscale.scores.score_file import ScoreFileReader, ScoreRows
from semiscale.stages.merge.top_k import select_top_k
from semiscale.stages.plan.shard_groups import TARGET_IMAGES_PER_GROUP

FOLDER = Path("runs/bench")
CLASSES, KEPT = 1000, 10
IN_DOMAIN = 0.35
IMAGES_PER_SHARD = 10_000
DRAWN_IMAGES = 10**6  # at once
PAPERS_SHARE = 625_000  # rows of the paper's pool a selected image of one class: 10 x 10^9 / 16,000
FULL_IMAGES = 10**9
FULL_BANDS = 4  # written of each of its files: all that can be needed
COMPARED_ROWS = 10**7  # up to so many rows the whole order is compared, by our own tie
MEMORY_SHARE = 0.6  # of this machine's memory, for each contestant
LIMIT_CPU_S = 1800
ZIPF_C = 1 / np.arange(1, CLASSES + 1) / (1 / np.arange(1, CLASSES + 1)).sum()


@dataclass(frozen=True)
class Pool:
    """A synthetic pool and what is to be selected from it. All of it follows from these numbers."""

    images: int
    images_per_class: int
    images_per_unit: int
    full: bool = False

    @property
    def units(self) -> int:
        return -(-self.images // self.images_per_unit)

    @property
    def head(self) -> int:
        return score_file.first_band_size(self.images_per_class, self.units)

    @property
    def folder(self) -> Path:
        return FOLDER / f"merge-{self.images * KEPT}-{self.images_per_unit}{'-full' * self.full}"

    @property
    def banded(self) -> Path:
        """Our files; their bands follow from K."""
        return self.folder / f"banded-{score_file.FORMAT}-{self.head}"

    @property
    def plain(self) -> Path:
        return self.folder / "plain"

    def shard_names(self, unit: int) -> list[str]:
        shards = -(-self.images_per_unit // IMAGES_PER_SHARD)
        return [f"part-{unit * shards + number:08}.tar" for number in range(shards)]

    def metadata(self, unit: int) -> dict[str, Any]:
        return {"teacher": "synthetic", "unit": str(unit), "shards": self.shard_names(unit)}


def unit_rows(pool: Pool, unit: int) -> ScoreRows:
    """Draw the rows of one unit, DRAWN_IMAGES at a time."""
    images = min(pool.images_per_unit, pool.images - unit * pool.images_per_unit)
    starts = range(0, images, DRAWN_IMAGES)
    drawn = [drawn_choices((1, unit, start), min(DRAWN_IMAGES, images - start)) for start in starts]
    return flattened(pool, unit, *(np.concatenate(columns) for columns in zip(*drawn, strict=True)))


def drawn_choices(seed: tuple[int, ...], images: int) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Draw label_BP and score_BP: first choices by Zipf's law, the others spread over the classes."""
    rng = np.random.default_rng(seed)
    first_B = rng.choice(CLASSES, images, p=ZIPF_C)
    steps_BP = np.cumsum(rng.integers(1, 110, (images, KEPT - 1)), axis=1)  # below 1000: the classes are distinct
    label_BP = np.column_stack([first_B, (first_B[:, None] + steps_BP) % CLASSES])
    in_domain_B = rng.random(images) < IN_DOMAIN
    best_B = np.where(in_domain_B, 4 + 3 * rng.standard_gamma(2, images), rng.normal(0, 2, images))
    second_B = np.minimum(best_B, -np.logaddexp(0, best_B))  # the others share what the first leaves
    falls_BP = np.cumsum(rng.standard_exponential((images, KEPT - 1), np.float32), axis=1)
    score_BP = np.column_stack([best_B, second_B[:, None] - falls_BP])
    return label_BP.astype(np.uint16), score_BP.astype(np.float32)


def flattened(pool: Pool, unit: int, label_BP: NDArray[np.uint16], score_BP: NDArray[np.float32]) -> ScoreRows:
    """Return the rows of images in order, each with its position, its sample and its tie."""
    codes = sample_codes(np.arange(len(label_BP)))
    return ScoreRows(
        label_BP.ravel(),
        score_BP.ravel(),
        np.repeat(codes, KEPT),
        np.tile(np.arange(KEPT, dtype=np.uint8), len(codes)),
        np.repeat(score_file.tie_breakers(codes, pool.shard_names(unit)), KEPT),
    )


def sample_codes(images: NDArray[np.int64]) -> score_file.U64:
    """Return the codes of images counted within their unit."""
    shard, index = np.divmod(images.astype(np.uint64), np.uint64(IMAGES_PER_SHARD))
    return np.asarray(shard << np.uint64(32) | index)


def write_unit(pool: Pool, unit: int) -> None:
    """Write one unit both ways, what is not there yet."""
    banded, plain = (folder / f"{unit:05}.parquet" for folder in (pool.banded, pool.plain))
    if banded.exists() and plain.exists():
        return
    rows = unit_rows(pool, unit)
    storage.write_bytes(
        str(banded),
        score_file.write_score_file(score_file.sort_into_bands(rows, pool.head), CLASSES, pool.metadata(unit)),
    )
    ids = unit * pool.images_per_unit + np.arange(len(rows) // KEPT, dtype=np.uint64)
    buffer = io.BytesIO()
    table = pa.table({"id": np.repeat(ids, KEPT), "class": rows.label, "score": rows.score})
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(str(plain), buffer.getvalue())


def best_rows(pool: Pool, unit: int) -> tuple[ScoreRows, NDArray[np.int64]]:
    """Draw the best ranks of one unit directly, from the law of order statistics; returns how many rows there were too.

    Two populations a class: first choices in the domain, and all others.
    """
    rng = np.random.default_rng((2, unit))
    images = pool.images_per_unit
    inside = rng.poisson(IN_DOMAIN * images * ZIPF_C)
    others = rng.poisson(images * (KEPT - IN_DOMAIN) / CLASSES, CLASSES)
    kept = written_ranks(pool.head)
    inside_scores = 4 + 3 * best_exponentials(rng, inside, kept)
    others_scores = best_exponentials(rng, others, kept) - 6
    score = -np.sort(-np.hstack([inside_scores, others_scores]), axis=1)[:, :kept]
    codes = sample_codes(rng.integers(0, images, CLASSES * kept))
    label = np.repeat(np.arange(CLASSES, dtype=np.uint16), kept)
    position = (rng.geometric(0.7, len(label)) - 1).clip(max=KEPT - 1).astype(np.uint8)
    tie = score_file.tie_breakers(codes, pool.shard_names(unit))
    return ScoreRows(label, score.astype(np.float32).ravel(), codes, position, tie), inside + others


def best_exponentials(rng: np.random.Generator, counts: NDArray[np.int64], kept: int) -> NDArray[np.float64]:
    """Return the best `kept` of so many exponential variables, descending; -inf where there are fewer.

    The i-th smallest of n uniform variables is the i-th arrival of a Poisson process over its (n + 1)-th.
    """
    arrivals = np.cumsum(rng.standard_exponential((len(counts), kept + 1)), axis=1)
    later = rng.standard_gamma(np.maximum(counts - kept, 0))
    last = arrivals[np.arange(len(counts)), np.minimum(counts, kept)] + later
    values = -np.log(arrivals[:, :kept] / last[:, None])
    return np.where(np.arange(kept) < counts[:, None], values, -np.inf)


def written_ranks(head: int) -> int:
    """Return how many ranks of a class the first FULL_BANDS bands hold."""
    return int(np.searchsorted(score_file.band_of_rank(np.arange(100 * head), head), FULL_BANDS))


def write_best(pool: Pool, unit: int) -> None:
    """Write the first bands of one unit, with a footer that tells of all: reading beyond them is an error."""
    path = pool.banded / f"{unit:05}.parquet"
    if not path.exists():
        rows, counts = best_rows(pool, unit)
        depths = np.tile(score_file.band_of_rank(counts - 1, pool.head) + 1, (KEPT, 1))
        metadata = {**pool.metadata(unit), "depths": depths.tolist()}
        storage.write_bytes(
            str(path), score_file.write_score_file(score_file.sort_into_bands(rows, pool.head), CLASSES, metadata)
        )


def written(pool: Pool, write: Callable[[Pool, int], None]) -> None:
    """Write all units that are not there yet. Memory: two units, 6 GB each, in other processes than this one."""
    started = time.monotonic()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 2)) as processes:
        list(processes.map(functools.partial(write, pool), range(pool.units)))
    print(f"pool of {pool.images:,} images in {pool.folder}: {time.monotonic() - started:.0f} s", flush=True)


def ours(folder: str, images_per_class: int, output: str) -> None:
    """The contestant: open the units, select, write the winners; prints what was read."""
    units = [ScoreFileReader(str(path)) for path in sorted(Path(folder).glob("*.parquet"))]
    found = select_top_k(units, CLASSES, images_per_class, KEPT)
    columns = {"class": found.rows.label, "score": found.rows.score, "unit": found.group, "sample": found.rows.sample}
    table = pa.table({**columns, "position": found.rows.position})
    pq.write_table(table, output, compression="zstd", use_dictionary=["class", "unit", "position"])
    print(sum(unit.bytes_read for unit in units))


# The others in their own words, as whole programs: files, K, output, and their memory in bytes.
DUCKDB = """
import sys, duckdb
files, k, output, memory = sys.argv[1:]
duckdb.sql(f"set memory_limit='{int(memory) * 3 // 4}B'; set temp_directory='{output}.spill'")
duckdb.sql("set enable_progress_bar=false")
duckdb.sql(f'''copy (QUERY) to '{output}' (format parquet, compression zstd)''')
"""
POLARS = """
import sys, polars as pl
files, k, output, _ = sys.argv[1:]
best = pl.struct("score", "id").top_k_by(BY)
rows = pl.scan_parquet(files).group_by("class").agg(best.alias("w")).explode("w").unnest("w")
rows.sink_parquet(output, compression="zstd", engine="streaming")
"""
OTHERS = {
    "DuckDB row_number": DUCKDB.replace(
        "QUERY",
        """select class, score, id from '{files}'
           qualify row_number() over (partition by class order by score desc, id) <= {k}""",
    ),
    "DuckDB heap": DUCKDB.replace(
        "QUERY",
        """select class, -w.s as score, w.i as id from (
           select class, unnest(min({{'s': -score, 'i': id}}, {k})) as w from '{files}' group by class)""",
    ),
    "Polars top_k_by": POLARS.replace("BY", '["score", "id"], int(k), reverse=[False, True]'),
    "Polars without ties": POLARS.replace("BY", '"score", int(k)'),
}
OURS = "import sys; from benchmarks.merge import ours; ours(sys.argv[1], int(sys.argv[2]), sys.argv[3])"


@dataclass(frozen=True)
class Run:
    """What one process cost, and the file that it left."""

    name: str
    cpu_s: float
    wall_s: float
    peak_rss_bytes: int
    bytes_read: int
    winners: Path


def run(name: str, program: str, source: str, pool: Pool) -> Run | None:
    """Run a contestant in a fresh process, within its share of memory; None, and a line that says why, if it failed.

    This process must be small until all have run: the kernel counts what it holds at the fork into the child's peak.
    """
    output = pool.folder / f"winners-{name.replace(' ', '-')}.parquet"
    output.unlink(missing_ok=True)
    memory = int(MEMORY_SHARE * memory_bytes())
    command = [sys.executable, "-c", program, source, str(pool.images_per_class), str(output), str(memory)]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as complaint:
        process = subprocess.Popen(command, stdout=stdout, stderr=complaint, preexec_fn=lambda: limit_this(memory))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.monotonic() - started
        stdout.seek(0), complaint.seek(0)
        if process.returncode:
            print(f"{name}: failed after {wall_s:.0f} s, with {memory >> 30} GiB allowed: {reason(complaint)}")
            return None
        bytes_read = int(stdout.read() or sum(path.stat().st_size for path in pool.plain.iterdir()))
    return Run(name, usage.ru_utime + usage.ru_stime, wall_s, usage.ru_maxrss * 1024, bytes_read, output)


def reason(complaint: IO[str]) -> str:
    """Return the line of an error output that says most: of memory where it does, else the last."""
    lines = complaint.read().splitlines() or ["no message"]
    return next((line for line in lines if "memory" in line.lower()), lines[-1])


def limit_this(memory: int) -> None:
    """Bound this process's address space and processor time."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_CPU_S, LIMIT_CPU_S))


def run_ours(pool: Pool) -> Run:
    """Run ours three times and return the median: a second of work is at the mercy of who else is on the machine."""
    runs = [run("rank bands", OURS, str(pool.banded), pool) for _ in range(3)]
    done = sorted((one for one in runs if one), key=lambda one: one.cpu_s)
    if len(done) < len(runs):
        sys.exit("ours failed")
    return done[1]


def compare(pool: Pool) -> dict[str, Any]:
    """Run all contestants on one pool, check that they agree, and return the numbers."""
    written(pool, write_unit)
    mine = run_ours(pool)
    files = str(pool.plain / "*.parquet")
    runs = [mine, *filter(None, (run(name, program, files, pool) for name, program in OTHERS.items()))]
    table(runs)
    for one in runs[1:]:
        check_same_scores(mine, one)
    if pool.images * KEPT <= COMPARED_ROWS:
        check_order(pool, mine)
    return {
        "rows": pool.images * KEPT,
        "ratio_to_duckdb": ratio(runs, "DuckDB"),
        "ratio_to_polars": ratio(runs, "Polars"),
        **footprint(mine),
    }


def ratio(runs: list[Run], name: str) -> float | None:
    """Return the processor time of the best run of that name by ours; None where none finished."""
    theirs = [one.cpu_s for one in runs if one.name.startswith(name)]
    return round(min(theirs) / runs[0].cpu_s, 1) if theirs else None


def footprint(mine: Run) -> dict[str, Any]:
    """Return our peak memory, the bytes we read, and the winners' own size, stored as a score file of ours."""
    found = pq.read_table(mine.winners)
    label, score, sample, position = (found[name].to_numpy() for name in ("class", "score", "sample", "position"))
    rows = ScoreRows(label, score, sample, position, tie=np.zeros(len(found), np.uint64))
    winners = len(score_file.write_score_file(score_file.sort_into_bands(rows, len(rows)), CLASSES, {}))
    print(
        f"winners: {len(rows):,}, {winners / 1e6:.1f} MB as one score file; read {mine.bytes_read / winners:.2f} x that"
    )
    return {"peak_rss_bytes": mine.peak_rss_bytes, "bytes_read": mine.bytes_read, "winner_bytes": winners}


def check_same_scores(mine: Run, other: Run) -> None:
    """Exit unless both selected as many rows of the same classes and scores; ties may differ."""
    one, two = (sorted_scores(run.winners) for run in (mine, other))
    if not np.array_equal(one, two):
        sys.exit(f"{other.name} found other winners: {len(two)} rows, ours {len(one)}")
    print(f"{other.name}: the same {len(one):,} classes and scores")


def sorted_scores(path: Path) -> NDArray[Any]:
    """Return the (class, score) pairs of a file of winners in order."""
    found = pq.read_table(path, columns=["class", "score"])
    pairs = np.column_stack([found["class"].to_numpy().astype(np.float64), found["score"].to_numpy()])
    return pairs[np.lexsort(pairs.T)]


def check_order(pool: Pool, mine: Run) -> None:
    """Exit unless DuckDB, over the rows as they were drawn, finds the same samples in the same order by our tie."""
    import duckdb

    query = f"""select class, score, unit, sample, position from drawn
                qualify row_number() over (partition by class order by score desc, tie) <= {pool.images_per_class}
                order by class, score desc, tie"""
    with duckdb.connect() as connection:
        connection.register("drawn", pa.concat_tables(drawn_table(pool, unit) for unit in range(pool.units)))
        relation = connection.sql(query)
        assert relation is not None  # a select has a result
        expected = relation.to_arrow_table()
    if not expected.equals(pq.read_table(mine.winners)):
        sys.exit("ours is not in the order of (class, score, tie) by DuckDB")
    print(f"order: all {len(expected):,} winners as DuckDB ranks them by our tie")


def drawn_table(pool: Pool, unit: int) -> pa.Table:
    """Return a unit's rows as they were drawn, with their unit and tie."""
    rows = unit_rows(pool, unit)
    names = {"class": rows.label, "score": rows.score, "sample": rows.sample, "position": rows.position}
    return pa.table({**names, "unit": np.full(len(rows), unit, np.int32), "tie": rows.tie})


def full(pool: Pool) -> dict[str, Any]:
    """Run ours alone on the best ranks of a billion images, and compare it with an exact pass over the same rows."""
    written(pool, write_best)
    mine = run_ours(pool)
    table([mine])
    check_exactly(pool, mine)
    numbers = {"rows": pool.images * KEPT, "ratio_to_duckdb": None, "ratio_to_polars": None, "cpu_s": mine.cpu_s}
    return {**numbers, **footprint(mine)}


def check_exactly(pool: Pool, mine: Run) -> None:
    """Exit unless sorting all drawn rows of each class gives our winners. Memory: 20 bytes a drawn row."""
    kept = written_ranks(pool.head)
    score = np.empty((CLASSES, pool.units, kept), np.float32)
    sample, tie = np.empty((2, *score.shape), np.uint64)
    for unit in range(pool.units):
        rows, _ = best_rows(pool, unit)
        for target, column in ((score, rows.score), (sample, rows.sample), (tie, rows.tie)):
            target[:, unit] = column.reshape(CLASSES, kept)
    found = pq.read_table(mine.winners)
    for label in range(CLASSES):
        order = np.lexsort((tie[label].ravel(), -score[label].ravel()))[: pool.images_per_class]
        part = found.slice(label * pool.images_per_class, pool.images_per_class)
        same = (part["class"].to_numpy() == label, part["unit"].to_numpy() == order // kept)
        if not np.all(same) or not np.array_equal(part["sample"].to_numpy(), sample[label].ravel()[order]):
            sys.exit(f"class {label}: other winners than by sorting all its rows")
    print(f"exact: all {len(found):,} winners as sorting every drawn row ranks them")


def table(runs: list[Run]) -> None:
    """Print what each run cost, and how many times ours."""
    print(f"\n{'':20}{'CPU s':>10}{'wall s':>10}{'peak MB':>10}{'read MB':>10}{'CPU / ours':>12}{'read / ours':>12}")
    for one in runs:
        sizes = f"{one.peak_rss_bytes / 1e6:10.0f}{one.bytes_read / 1e6:10.1f}"
        ratios = f"{one.cpu_s / runs[0].cpu_s:12.1f}{one.bytes_read / runs[0].bytes_read:12.1f}"
        print(f"{one.name:20}{one.cpu_s:10.2f}{one.wall_s:10.2f}{sizes}{ratios}")
    print(flush=True)


def memory_bytes() -> int:
    """Return the size of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine() -> str:
    """Return the processor, cores, memory and versions in one line."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    parts = [f"{name} {version(name)}" for name in ("numpy", "pyarrow", "duckdb", "polars")]
    cores = f"{os.cpu_count()} cores, {memory_bytes() / 2**30:.0f} GiB, load {os.getloadavg()[0]:.1f}"
    return ", ".join([models[0].partition(": ")[2], cores, f"Python {platform.python_version()}", *parts])


def main() -> None:
    """Compare at so many rows, and print the numbers as JSON in the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10**8)
    parser.add_argument("--images-per-class", type=int, help="K; by default the paper's share of the rows")
    parser.add_argument("--images-per-unit", type=int, default=TARGET_IMAGES_PER_GROUP)
    parser.add_argument("--full", action="store_true", help=f"{FULL_IMAGES:,} images, ours alone")
    arguments = parser.parse_args()
    images = FULL_IMAGES if arguments.full else arguments.rows // KEPT
    per_class = arguments.images_per_class or max(images * KEPT // PAPERS_SHARE, 1)
    pool = Pool(images, per_class, arguments.images_per_unit, arguments.full)
    print(f"{machine()}\n{pool}, {pool.units} units, band 0 holds {pool.head} ranks", flush=True)
    print(json.dumps(full(pool) if pool.full else compare(pool)))


if __name__ == "__main__":
    main()
