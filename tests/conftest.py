"""Random inputs are fresh in every run; the seed is printed with a failure and can be given back as DRIFT_TEST_SEED.

Hypothesis prints the example that fails, and a line that repeats it: `@reproduce_failure(...)`, to put above the test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from loopback import LoopbackHub

# Triton's kernels run in its interpreter where there is no GPU. Set before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests' tensors are small: where there is other work, threads that wait for each other take many times as long.
# What is to have several is given them (problems.threads).
torch.set_num_threads(1)

# Nothing depends on how fast the machine is: there is no deadline, and examples may be made slowly. The fixtures of a
# function are a folder and the seed, which every example may share. What is random in an example is drawn, and printed
# with it, or comes of a seed that is drawn.
settings.register_profile(
    "suite",
    max_examples=100,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What takes long in a process of its own, and is of a module that is collected, begins now (its `begin`)."""
    if not session.config.option.collectonly:
        modules = dict.fromkeys(getattr(item, "module", None) for item in session.items)
        for begin in dict.fromkeys(getattr(module, "begin", None) for module in modules):
            if begin is not None:
                begin()


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    value = int(os.environ.get("DRIFT_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    torch.manual_seed(value)
    request.node.user_properties.append(("seed", value))
    return value


@pytest.fixture
def loopback_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub without repositories, which the Hub's client takes for the real one; its caches are in `tmp_path`."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _cache_assets

    with LoopbackHub(tmp_path / "hub").serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        url = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in (constants, file_download):  # in the second before 1.0
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", url, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        yield hub


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = (yield).get_result()
    if report.failed:
        seeds = [value for name, value in item.user_properties if name == "seed"]
        report.sections.append(("seed", f"DRIFT_TEST_SEED={seeds[-1] if seeds else 'none'}"))
