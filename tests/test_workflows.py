"""The workflows of the repository's hosting: they call the Makefile, whose targets exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
if not WORKFLOWS:
    pytest.skip("an sdist has no workflows", allow_module_level=True)

# An action at a major version, or a branch that stands for one.
ACTION = re.compile(r"[\w-]+/[\w-]+@(?:v\d+|release/v\d+)")


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each with its job."""
    return [(job, step) for job in jobs(path).values() for step in job["steps"]]


def commands(job: dict[str, Any], step: dict[str, Any]) -> list[str]:
    """What a step runs, for every entry of the matrix."""
    entries = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
    lines = step.get("run", "").splitlines()
    fill = r"\$\{\{ matrix\.(\w+) \}\}"
    return [re.sub(fill, lambda found, entry=entry: entry[found[1]], line) for line in lines for entry in entries]


def targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_whole(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert set(content) == {"name", True, "permissions", "jobs"}  # YAML 1.1 reads `on` as true
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert set(job.get("needs", [])) <= set(content["jobs"]) - {name}
        assert job["runs-on"]
    for _, step in steps(path):
        assert ("uses" in step) != ("run" in step)
        assert "uses" not in step or ACTION.fullmatch(step["uses"]), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_are_targets_of_the_makefile(path: Path) -> None:
    found = [command for job, step in steps(path) for command in commands(job, step)]
    assert found
    for command in found:
        program, *wanted = command.split()
        assert program == "make"
        assert set(wanted) <= targets((ROOT / "Makefile").read_text()), command


def test_files_that_the_makefile_names_exist() -> None:
    text = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?<![\w./-])((?:tests|docs|examples|benchmarks)/[\w/.-]+\.\w+|constraints[\w-]*\.txt)", text)
    assert {"tests/fresh.py", "constraints-oldest.txt"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_nothing_is_published_but_by_a_release() -> None:
    (publish,) = [job for path in WORKFLOWS for job in jobs(path).values() if "id-token" in job.get("permissions", {})]
    assert publish["if"] == "github.event_name == 'release'"
    assert set(publish["needs"]) == {"wheels", "sdist"}
    text = "".join(path.read_text() for path in WORKFLOWS)
    assert "://" not in text
    assert "secrets." not in text
