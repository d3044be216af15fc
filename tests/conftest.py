"""Random inputs are fresh in every run; the seed is printed with a failure and can be given back as DRIFT_TEST_SEED."""

from __future__ import annotations

import os

import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU. Set before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    value = int(os.environ.get("DRIFT_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    torch.manual_seed(value)
    request.node.user_properties.append(("seed", value))
    return value


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = (yield).get_result()
    if report.failed:
        seeds = [value for name, value in item.user_properties if name == "seed"]
        report.sections.append(("seed", f"DRIFT_TEST_SEED={seeds[-1] if seeds else 'none'}"))
