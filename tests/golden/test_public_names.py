"""What other systems know the program by keeps its names: metrics, environment variables, verbs and exit codes."""

import re

from tests.golden import expected, program


def test_metrics_are_unchanged() -> None:
    expected.check("metrics", program.offered_metrics())


def test_environment_variables_are_unchanged() -> None:
    files = [path for source in program.SOURCES for path in [source, *source.rglob("*.py")] if path.is_file()]
    names = {name for path in files for name in re.findall(r"\bSEMISCALE_[A-Z_]+\b", path.read_text())}
    expected.check("environment", sorted(names))


def test_verbs_and_their_options_are_unchanged() -> None:
    expected.check("verbs", program.verbs())


def test_exit_codes_are_unchanged() -> None:
    expected.check("exit_codes", {"ends": program.exit_codes(), "in --help": program.documented_exit_codes()})
