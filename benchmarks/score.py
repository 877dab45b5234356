"""Compare scoring with the bare model and decoder, Ray Data and a DataLoader.

    make bench-score

Scoring is the real stage, from leases to compacted shard groups, on WebDataset tars of photographs
(benchmarks/score_workload.py). It is measured where the model is the limit and where decoding is
(benchmarks/score_parts.py). The others run the same network on the same tars, in the best form that we could write
(benchmarks/score_rivals.py). Each contestant is its own process. They take turns of a second, so that the machine's
load affects all alike (benchmarks/turns.py).

Ray Data does not take turns, because its processes kept an eighth of their speed when they were stopped and resumed.
It runs alone, before and after the others, and its better run counts.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks import score_parts, score_rivals
from benchmarks.machine import describe_gpu, describe_machine
from benchmarks.score_workload import PHOTOS, Case, Workload, cases, photographs
from benchmarks.turns import by_turns, wait_for_go
from semiscale.models import checkpoint_io

# The most seconds of a contestant's turns.
MAX_RUN_S = 3600.0
CONTESTANTS = {
    "scan": score_parts.prepare_scan,
    "model": score_parts.prepare_model,
    "decoder": score_parts.prepare_decoder,
    "dataloader": score_rivals.prepare_dataloader,
    "ray_data": score_rivals.prepare_ray_data,
}
# A user's script does not know how this program configures torch.
WITHOUT_OUR_TORCH_SETTINGS = ("dataloader", "ray_data")
# The names of contestants in the last line.
NAMES_IN_JSON = {"model": "bare_model", "decoder": "bare_decoder"}


def compare(case: Case, photos: Path) -> dict[str, float]:
    """Run the contestants of a case and print a table.

    Args:
        case: The case.
        photos: The folder of the tars with JPEG files.

    Returns:
        The images a second of each contestant.
    """
    with tempfile.TemporaryDirectory() as folder:
        Workload(case, photographs(photos), Path(folder)).write()
        command = [sys.executable, "-m", "benchmarks.score", "--photos", str(photos), "--folder", folder]
        command += ["--case", str(cases().index(case)), "--contestant"]
        rounds = [["ray_data"], ["scan", case.limit, "dataloader"], ["ray_data"]]
        printed = [by_turns({name: [*command, name] for name in names}, MAX_RUN_S) for names in rounds]
    rates: dict[str, float] = {}
    for name, lines in [item for contest in printed for item in contest.items()]:
        rates[name] = max(rates.get(name, 0.0), images_per_s(name, lines, case))
    print(f"\n{case.architecture} at {case.resolution}, {case.images:,} images: {case.limit}-bound")
    for name, rate in rates.items():
        print(f"{name:14}{rate:10.1f}/s   scan / it {rates['scan'] / rate:5.2f}", flush=True)
    return rates


def images_per_s(name: str, lines: list[tuple[float, str]], case: Case) -> float:
    """Return the images a second of a contestant from its last line.

    Args:
        name: The name of the contestant.
        lines: The lines that it has printed, each after the seconds of its own turns.
        case: The case.

    Raises:
        SystemExit: The contestant has not scored all images.
    """
    ended_s, line = lines[-1]
    images, start_s = line.split()
    if int(images) < case.images:
        raise SystemExit(f"{name}: {images} of {case.images} images")
    return int(images) / (ended_s - float(start_s))


def run_contestant(workload: Workload, contestant: str) -> None:
    """Be one contestant: prepare, wait for the first turn, run.

    Args:
        workload: The pool and the network.
        contestant: A key of `CONTESTANTS`.
    """
    if contestant not in WITHOUT_OUR_TORCH_SETTINGS:
        checkpoint_io.configure_torch()
    run = CONTESTANTS[contestant](workload)
    wait_for_go()
    images, start_s = run()
    print(images, start_s, flush=True)


def main() -> None:
    """Measure every case, and print the ratios as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder of tars with JPEG files")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    photos = photographs(arguments.photos)
    if arguments.contestant:
        run_contestant(Workload(cases()[arguments.case], photos, arguments.folder), arguments.contestant)
        return
    print(describe_machine(describe_gpu(), "torch", "torchvision", "simplejpeg", "ray"))
    print(f"{len(photos)} photographs, {sum(map(len, photos)) / len(photos) / 1e3:.0f} kB on average")
    ratios: dict[str, list[float]] = {}
    for case in cases():
        rates = compare(case, arguments.photos)
        for name, rate in rates.items():
            ratios.setdefault(NAMES_IN_JSON.get(name, name), []).append(rates["scan"] / rate)
    # If a contestant takes part in several cases, the smallest ratio counts.
    print(json.dumps({f"ratio_to_{name}": round(min(values), 3) for name, values in ratios.items() if name != "scan"}))


if __name__ == "__main__":
    main()
