"""Compare the merge with DuckDB and Polars: the exact top K of every class.

    make bench-merge ROWS=100000000

The pool is synthetic (benchmarks/merge_pool.py). Each contestant is a fresh process. Its time includes imports and
writing the winners. All contestants must select the same winners.

FULL=1 is a pool of a billion images. Our merge then runs alone, on files that hold the best ranks only. The benchmark
compares it with an exact pass over the same rows.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.machine import describe_machine
from benchmarks.merge_pool import (
    CLASSES,
    CLASSES_PER_IMAGE,
    Pool,
    draw_best_ranks,
    draw_group,
    write_best_ranks,
    write_group,
    write_pool,
    written_ranks,
)
from semiscale.scores import score_file
from semiscale.scores.score_file import ScoreFileReader, ScoreRows
from semiscale.stages.merge.top_k import select_top_k
from semiscale.stages.plan.shard_groups import TARGET_IMAGES_PER_GROUP

# Rows of the paper's pool for each selected image of one class: 10 x 10^9 / 16,000.
ROWS_PER_SELECTED_IMAGE = 625_000
FULL_IMAGES = 10**9
# Up to this number of rows the whole order is compared, tie-breakers included.
MAX_ROWS_TO_COMPARE_IN_ORDER = 10**7
# The fraction of this machine's memory that each contestant may use.
MEMORY_FRACTION = 0.6
MAX_CPU_S = 1800


def select_with_rank_bands(folder: str, images_per_class: int, output: str) -> None:
    """Select with our merge, write the winners, and print the bytes read."""
    readers = [ScoreFileReader(str(path)) for path in sorted(Path(folder).glob("*.parquet"))]
    winners = select_top_k(readers, CLASSES, images_per_class, CLASSES_PER_IMAGE)
    columns = {
        "class": winners.rows.label,
        "score": winners.rows.score,
        "unit": winners.group,
        "sample": winners.rows.sample,
    }
    table = pa.table({**columns, "position": winners.rows.position})
    pq.write_table(table, output, compression="zstd", use_dictionary=["class", "unit", "position"])
    print(sum(reader.bytes_read for reader in readers))


# The other contestants as whole programs. Their arguments are files, K, output and memory in bytes.
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
OURS = (
    "import sys; from benchmarks.merge import select_with_rank_bands as select; "
    "select(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
)


@dataclass(frozen=True)
class Run:
    """The cost of one process, and the file that it wrote."""

    name: str
    cpu_s: float
    wall_s: float
    peak_rss_bytes: int
    bytes_read: int
    winners: Path


def run(name: str, program: str, source: str, pool: Pool) -> Run | None:
    """Run a contestant in a fresh process with bounded memory.

    This process must be small until all have run. The kernel counts its memory at the fork into the child's peak.

    Args:
        name: The name of the contestant.
        program: Its Python program.
        source: Its input: a folder or a pattern.
        pool: The pool.

    Returns:
        The cost of the run. None if it failed, after printing a line with the reason.
    """
    output = pool.folder / f"winners-{name.replace(' ', '-')}.parquet"
    output.unlink(missing_ok=True)
    memory = int(MEMORY_FRACTION * memory_bytes())
    command = [sys.executable, "-c", program, source, str(pool.images_per_class), str(output), str(memory)]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, preexec_fn=lambda: limit_this_process(memory))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.monotonic() - started
        stdout.seek(0), stderr.seek(0)
        if process.returncode:
            reason = most_useful_line(stderr)
            print(f"{name}: failed after {wall_s:.0f} s, with {memory >> 30} GiB allowed: {reason}")
            return None
        bytes_read = int(stdout.read() or sum(path.stat().st_size for path in pool.plain.iterdir()))
    return Run(name, usage.ru_utime + usage.ru_stime, wall_s, usage.ru_maxrss * 1024, bytes_read, output)


def most_useful_line(stderr: IO[str]) -> str:
    """Return the first line about memory, or else the last line."""
    lines = stderr.read().splitlines() or ["no message"]
    return next((line for line in lines if "memory" in line.lower()), lines[-1])


def limit_this_process(memory: int) -> None:
    """Bound the address space and the processor time of this process."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))


def run_ours(pool: Pool) -> Run:
    """Run our contestant three times and return the median.

    One run takes about a second, so other load on the machine disturbs it.
    """
    attempts = [run("rank bands", OURS, str(pool.banded), pool) for _ in range(3)]
    runs = sorted((attempt for attempt in attempts if attempt), key=lambda attempt: attempt.cpu_s)
    if len(runs) < len(attempts):
        sys.exit("ours failed")
    return runs[1]


def compare(pool: Pool) -> dict[str, Any]:
    """Run all contestants on one pool, check that they agree, and return the numbers."""
    write_pool(pool, write_group)
    ours = run_ours(pool)
    files = str(pool.plain / "*.parquet")
    runs = [ours, *filter(None, (run(name, program, files, pool) for name, program in OTHERS.items()))]
    print_table(runs)
    for other in runs[1:]:
        check_same_scores(ours, other)
    if pool.images * CLASSES_PER_IMAGE <= MAX_ROWS_TO_COMPARE_IN_ORDER:
        check_order(pool, ours)
    return {
        "rows": pool.images * CLASSES_PER_IMAGE,
        "ratio_to_duckdb": ratio(runs, "DuckDB"),
        "ratio_to_polars": ratio(runs, "Polars"),
        **footprint(ours),
    }


def ratio(runs: list[Run], name: str) -> float | None:
    """Return the processor time of a contestant's best run, divided by ours.

    Args:
        runs: The runs, ours first.
        name: The start of the contestant's name.

    Returns:
        The ratio, or None if no run of the contestant has finished.
    """
    times_s = [run.cpu_s for run in runs if run.name.startswith(name)]
    return round(min(times_s) / runs[0].cpu_s, 1) if times_s else None


def footprint(ours: Run) -> dict[str, Any]:
    """Return our peak memory, the bytes read, and the size of the winners."""
    winners = pq.read_table(ours.winners)
    label, score, sample, position = (winners[name].to_numpy() for name in ("class", "score", "sample", "position"))
    rows = ScoreRows(label, score, sample, position, tie=np.zeros(len(winners), np.uint64))
    size = len(score_file.write_score_file(score_file.sort_into_bands(rows, len(rows)), CLASSES, {}))
    print(f"winners: {len(rows):,}, {size / 1e6:.1f} MB as one score file; read {ours.bytes_read / size:.2f} x that")
    return {"peak_rss_bytes": ours.peak_rss_bytes, "bytes_read": ours.bytes_read, "winner_bytes": size}


def check_same_scores(ours: Run, other: Run) -> None:
    """Exit unless both runs selected the same classes and scores.

    The order of equal scores may differ.

    Args:
        ours: Our run.
        other: The run of another contestant.
    """
    expected, actual = (sorted_scores(run.winners) for run in (ours, other))
    if not np.array_equal(expected, actual):
        sys.exit(f"{other.name} selected other winners: {len(actual)} rows, ours {len(expected)}")
    print(f"{other.name}: the same {len(expected):,} classes and scores")


def sorted_scores(path: Path) -> NDArray[Any]:
    """Return the (class, score) pairs of a file of winners in order."""
    winners = pq.read_table(path, columns=["class", "score"])
    pairs = np.column_stack([winners["class"].to_numpy().astype(np.float64), winners["score"].to_numpy()])
    return pairs[np.lexsort(pairs.T)]


def check_order(pool: Pool, ours: Run) -> None:
    """Exit unless DuckDB ranks the drawn rows in our order.

    DuckDB reads the rows as they were drawn, with our tie-breakers.

    Args:
        pool: The pool.
        ours: Our run.
    """
    import duckdb

    query = f"""select class, score, unit, sample, position from drawn
                qualify row_number() over (partition by class order by score desc, tie) <= {pool.images_per_class}
                order by class, score desc, tie"""
    with duckdb.connect() as connection:
        connection.register("drawn", pa.concat_tables(draw_table(pool, group) for group in range(pool.groups)))
        relation = connection.sql(query)
        # A select has a result.
        assert relation is not None
        expected = relation.to_arrow_table()
    if not expected.equals(pq.read_table(ours.winners)):
        sys.exit("ours is not in the order of (class, score, tie) by DuckDB")
    print(f"order: all {len(expected):,} winners as DuckDB ranks them by our tie")


def draw_table(pool: Pool, group: int) -> pa.Table:
    """Draw the rows of a shard group with its number and the tie-breakers."""
    rows = draw_group(pool, group)
    columns = {"class": rows.label, "score": rows.score, "sample": rows.sample, "position": rows.position}
    return pa.table({**columns, "unit": np.full(len(rows), group, np.int32), "tie": rows.tie})


def run_full(pool: Pool) -> dict[str, Any]:
    """Run our merge alone on a billion images, and compare it with an exact pass."""
    write_pool(pool, write_best_ranks)
    ours = run_ours(pool)
    print_table([ours])
    check_exactly(pool, ours)
    numbers = {
        "rows": pool.images * CLASSES_PER_IMAGE,
        "ratio_to_duckdb": None,
        "ratio_to_polars": None,
        "cpu_s": ours.cpu_s,
    }
    return {**numbers, **footprint(ours)}


def check_exactly(pool: Pool, ours: Run) -> None:
    """Exit unless sorting all drawn rows of each class gives our winners.

    Args:
        pool: The pool.
        ours: Our run.

    Cost:
        It needs 20 bytes of memory for each drawn row.
    """
    ranks = written_ranks(pool.head)
    score = np.empty((CLASSES, pool.groups, ranks), np.float32)
    sample, tie = np.empty((2, *score.shape), np.uint64)
    for group in range(pool.groups):
        rows, _ = draw_best_ranks(pool, group)
        for target, column in ((score, rows.score), (sample, rows.sample), (tie, rows.tie)):
            target[:, group] = column.reshape(CLASSES, ranks)
    winners = pq.read_table(ours.winners)
    for label in range(CLASSES):
        order = np.lexsort((tie[label].ravel(), -score[label].ravel()))[: pool.images_per_class]
        part = winners.slice(label * pool.images_per_class, pool.images_per_class)
        same = (part["class"].to_numpy() == label, part["unit"].to_numpy() == order // ranks)
        if not np.all(same) or not np.array_equal(part["sample"].to_numpy(), sample[label].ravel()[order]):
            sys.exit(f"class {label}: other winners than by sorting all its rows")
    print(f"exact: all {len(winners):,} winners as sorting every drawn row ranks them")


def print_table(runs: list[Run]) -> None:
    """Print the cost of each run, and its ratios to the first run."""
    print(f"\n{'':20}{'CPU s':>10}{'wall s':>10}{'peak MB':>10}{'read MB':>10}{'CPU / ours':>12}{'read / ours':>12}")
    for run in runs:
        sizes = f"{run.peak_rss_bytes / 1e6:10.0f}{run.bytes_read / 1e6:10.1f}"
        ratios = f"{run.cpu_s / runs[0].cpu_s:12.1f}{run.bytes_read / runs[0].bytes_read:12.1f}"
        print(f"{run.name:20}{run.cpu_s:10.2f}{run.wall_s:10.2f}{sizes}{ratios}")
    print(flush=True)


def memory_bytes() -> int:
    """Return the size of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine() -> str:
    """Return the processor, cores, memory and versions in one line."""
    return describe_machine(f"{memory_bytes() / 2**30:.0f} GiB", "numpy", "pyarrow", "duckdb", "polars")


def main() -> None:
    """Run the comparison, and print the numbers as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**8, help="rows of the pool, 10 an image")
    parser.add_argument("--images-per-class", type=int, help="K; by default the paper's share of the rows")
    parser.add_argument("--images-per-unit", type=int, default=TARGET_IMAGES_PER_GROUP, help="images of a shard group")
    parser.add_argument("--full", action="store_true", help=f"{FULL_IMAGES:,} images, our merge alone")
    arguments = parser.parse_args()
    images = FULL_IMAGES if arguments.full else arguments.rows // CLASSES_PER_IMAGE
    per_class = arguments.images_per_class or max(images * CLASSES_PER_IMAGE // ROWS_PER_SELECTED_IMAGE, 1)
    pool = Pool(images, per_class, arguments.images_per_unit, arguments.full)
    print(f"{machine()}\n{pool}, {pool.groups} shard groups, band 0 has {pool.head} ranks", flush=True)
    print(json.dumps(run_full(pool) if pool.full else compare(pool)))


if __name__ == "__main__":
    main()
