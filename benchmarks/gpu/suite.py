"""Everything that needs a GPU, in one command that ends in minutes: python -m benchmarks.gpu OUT (make gpu OUT=folder)

Builds in place, tests, checks for races and invalid accesses, measures, profiles. OUT gets at most 8 files: gpu.json
(how the stages ended, the targets, all rows), log.txt, plots, and the output of ncu. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .stages import FAILED, OK, Outcome, Stage, run_stages
from .targets import TARGETS, describe

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 480.0  # seconds
PARITY = ("tests/test_parity.py", "tests/test_bias.py")
TESTED = ("optimizer", "capturable", "triton", "cuda", "state", "grad_scaler", "backward")
TESTS = tuple(f"tests/test_{name}.py" for name in TESTED)
LIBRARIES = ("bitsandbytes", "torchao", "optimi", "flashoptim", "apex", "transformer_engine")

# Describes the GPU. Runs in a separate process, so that this one creates no context on it.
_FIND_GPU = """
import json, sys
try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"{sys.executable} has no torch")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU here")
major, minor = torch.cuda.get_device_capability()
print(json.dumps({"arch": f"{major}{minor}", "free": torch.cuda.mem_get_info()[0]}))
"""


class NoGpuError(RuntimeError):
    """There is no GPU to run on."""


def find_gpu() -> dict[str, Any]:
    """Return the architecture of the GPU, such as "90", and its free bytes.

    Raises NoGpuError, with the reason in one line.
    """
    done = subprocess.run([sys.executable, "-c", _FIND_GPU], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoGpuError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def size(free: int, layers: int, full_bytes: float, bytes_per_param: int) -> list[str]:
    """Options for the first `layers` at full width if `full_bytes` are free, else for a narrowed model that fits."""
    if free >= full_bytes:
        return ["--layers", str(layers)]
    return ["--params", str(free // bytes_per_param)]


def runs(free: int) -> dict[str, list[str]]:
    """The arguments of benchmarks.step for each run, by its name in the rows. Bytes per parameter:
    lineup.kept_bytes."""
    ours, everything = ["cuda"], ["fused", "foreach", "foreach_bias", "hook", "cuda", "triton"]
    narrow = ["--params", str(min(256_000_000, free // 290))]
    seven, three = ["--model", "qwen2.5-vl-7b"], ["--model", "qwen2.5-vl-3b"]
    modes = ["fp32 states", "bf16 states", "bf16 states, stochastic", "fp32 states, master", "int8 states, master"]
    modes += ["int8 states, stochastic, int8 prior", "bf16 states, host prior"]
    libraries = ["bnb", "bnb_8bit", "torchao", "torchao_8bit", "optimi", "flashoptim", "apex", "te"]
    return {
        "7b": [
            *seven,
            *size(free, 1, 78e9, 70),
            *("--scaling", "absolute"),
            *("--contenders", "foreach_bias", "hook", *ours),
        ],
        "tiny": ["--model", "tiny", "--reps", "50", "--contenders", *everything],
        "modes": [*seven, *narrow, "--scaling", "absolute", "--modes", *modes, "--contenders", *ours],
        "7b-all": [
            *seven,
            *narrow,
            *("--scaling", "none", "absolute", "gradnorm", "adaptive_cosine", "decoupled"),
            *("--contenders", *everything),
        ],
        "7b-clip": [
            *seven,
            *narrow,
            *("--clip", "yes", "--scaling", "none", "absolute", "adaptive_cosine"),
            *("--contenders", "foreach_bias", "hook", *ours),
        ],
        "3b": [
            *three,
            *size(free, 2, 70e9, 140),
            *("--scaling", "absolute", "gradnorm", "adaptive_cosine"),
            *("--contenders", "foreach_bias", "compiled", *ours),
        ],
        "libraries": [
            *three,
            *size(free, 2, 70e9, 140),
            *("--scaling", "none"),
            *("--contenders", "foreach", *libraries, *ours),
        ],
    }


# The time limit of each run in seconds, and the plots that it writes to OUT.
RUN_SECONDS = {"7b": 80, "tiny": 40, "modes": 50, "7b-all": 80, "7b-clip": 50, "3b": 120, "libraries": 90}
PLOTS = {"7b": ["--plot", "--roofline"], "modes": ["--plot"], "7b-all": ["--plot"], "3b": ["--plot"]}


def make_stages(out: Path, work: Path, arch: str, free: int) -> list[Stage]:
    """The stages in the order that they run: first those that others need, last those that matter least."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    build_env = {"DRIFT_KERNELS_CUDA": "1", "DRIFT_KERNELS_CUDA_ARCHS": arch}
    stages = [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 180, build_env),
        Stage("parity", [*pytest, *PARITY], 100, needs=("build",)),
        Stage("tests", [*pytest, *TESTS], 100, needs=("build",)),
    ]
    for name, options in runs(free).items():
        files = ["--json", str(work / f"{name}.json")]
        for option in PLOTS.get(name, []):
            files += [option, str(out / f"{name}{'-roofline' if option == '--roofline' else ''}.png")]
        command = [python, "-m", "benchmarks.step", "--device", "cuda", *options, *files]
        missing = None
        if name == "libraries" and not any(importlib.util.find_spec(library) for library in LIBRARIES):
            missing = f"none of {', '.join(LIBRARIES)} is installed"
        stages.append(Stage(name, command, RUN_SECONDS[name], needs=("build", "parity"), missing=missing))
    stages += [_sanitizer(tool) for tool in ("memcheck", "racecheck")]
    return [*stages, _profile(out)]


def _sanitizer(tool: str) -> Stage:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    return Stage(
        tool,
        [*command, sys.executable, "-m", "benchmarks.gpu.sanitize"],
        75,
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # one allocation per tensor, so that memcheck knows its bounds
        needs=("build",),
        missing=_not_on_path("compute-sanitizer"),
        refusals=("Device not supported", "Unable to find injection library"),
    )


def _profile(out: Path) -> Stage:
    metrics = (
        "gpu__time_duration.sum",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "sm__warps_active.avg.pct_of_peak_sustained_active",
        "launch__registers_per_thread",
    )
    kernels = "regex:^(update|sum|total)$"  # of csrc/cuda/kernels.cu
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", kernels]
    command += ["--metrics", ",".join(metrics)]
    return Stage(
        "ncu",
        [*command, "--log-file", str(out / "ncu.txt"), sys.executable, "-m", "benchmarks.gpu.profile_step"],
        60,
        needs=("build",),
        missing=_not_on_path("ncu"),
        refusals=("ERR_NVGPUCTRPERM", "Failed to initialize the profiler"),
    )


def _not_on_path(program: str) -> str | None:
    return None if shutil.which(program) else f"{program} is not on PATH"


def collect_rows(work: Path) -> list[dict[str, Any]]:
    """Return the rows of all runs so far, each with the name of its run."""
    return [{"run": name, **row} for name in RUN_SECONDS for row in _rows_of(work / f"{name}.json")]


def _rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def write_results(out: Path, work: Path, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Write gpu.json; return the targets with their measurements."""
    rows = collect_rows(work)
    targets = [target.check(rows) for target in TARGETS]
    results = {"stages": [asdict(outcome) for outcome in outcomes], "targets": targets, "rows": rows}
    (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    return targets


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results; created if it does not exist")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS", help="time for all stages (default: %(default)g)"
    )
    args = parser.parse_args(argv)
    try:
        gpu = find_gpu()
    except NoGpuError as error:
        print(f"No GPU run: {error}", file=sys.stderr)
        return 1
    # Each stage has its own process group: SIGTERM must end this process by an exception, which then kills the group.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def ended(outcomes: list[Outcome]) -> None:
            print(outcomes[-1], flush=True)
            write_results(out, work, outcomes)

        stages = make_stages(out, work, gpu["arch"], gpu["free"])
        outcomes = run_stages(stages, args.budget, log, ROOT, ended)
        targets = write_results(out, work, outcomes)
    print(summary(outcomes, targets, log))
    return 1 if any(outcome.status == FAILED for outcome in outcomes) else 0


def summary(outcomes: list[Outcome], targets: list[dict[str, Any]], log: Path) -> str:
    """The stages, the end of the log if one failed, and the targets with their measurements."""
    parts = [str(outcome) for outcome in outcomes]
    if any(outcome.status == FAILED for outcome in outcomes):
        parts = [*log.read_text(errors="replace").splitlines()[-30:], "", *parts]
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in (OK, FAILED)}
    parts += ["", *map(describe, targets), "", f"{counts[OK]} stages ok, {counts[FAILED]} failed; all output: {log}"]
    return "\n".join(parts)
