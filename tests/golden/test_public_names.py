"""Test that metrics, environment variables, verbs and exit codes keep their names."""

import re

from tests.golden import expected, program


def test_metrics_keep_their_names_types_and_labels() -> None:
    expected.check_nothing_lost("metrics", program.offered_metrics())


def test_environment_variables_keep_their_names() -> None:
    files = [path for source in program.SOURCES for path in [source, *source.rglob("*.py")] if path.is_file()]
    names = {name for path in files for name in re.findall(r"\bSEMISCALE_[A-Z_]+\b", path.read_text())}
    expected.check_nothing_lost("environment", sorted(names))


def test_verbs_keep_their_names_and_options() -> None:
    expected.check_nothing_lost("verbs", program.verbs())


# An abandoned pod of a Job, and a closed terminal (SIGHUP), documented since the version after 0.1.0.
NEW_EXIT_CODES = {4, 129}


def test_exit_codes_are_unchanged() -> None:
    documented = [code for code in program.documented_exit_codes() if code not in NEW_EXIT_CODES]
    expected.check_equal("exit_codes", {"ends": program.exit_codes(), "in --help": documented})
