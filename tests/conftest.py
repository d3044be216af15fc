"""Random inputs are fresh in every run; a failure prints the seed. Set DRIFT_TEST_SEED to repeat it.

Hypothesis prints the failing example, and a decorator that repeats it: `@reproduce_failure(...)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from loopback import LoopbackHub

# Without a GPU, Triton's kernels run in its interpreter. Set before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests' tensors are small: on a busy machine, threads that wait for each other take many times as long. Tests that
# need several threads set them (problems.threads).
torch.set_num_threads(1)

# No test depends on the machine's speed: there is no deadline, and generating examples may be slow. Function-scoped
# fixtures are a folder and the seed, which all examples may share. Random values in an example are drawn, and printed
# with it, or come from a drawn seed.
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
    """Start the slow background processes (`begin`) of the collected modules."""
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
    """An empty Hub that the Hub's client uses instead of the real one; its caches are in `tmp_path`."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _cache_assets

    with LoopbackHub(tmp_path / "hub").serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        url = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in (constants, file_download):  # before 1.0 in the second
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
