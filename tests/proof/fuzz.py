"""Fuzzing: no bytes on disk or on standard input crash, hang, or make anything allocate without bound.

The core is built once more with AddressSanitizer and UndefinedBehaviorSanitizer, with `fuzz_scan.pxi` in it, and kept in
`build/fuzz` until a source changes.  A child with that core runs one input after the other; if it dies, takes too long or
says that something is wrong, the input is written to a file, and a new child goes on behind it.

    python -m tests.proof.fuzz --target scan --seconds 60 [--seed N]        also: manifest, open, repair, import
    python -m tests.proof.fuzz --target scan --input FILE                   one input that was kept
    python -m tests.proof.fuzz --target scan --guided --seconds 600         clang's libFuzzer, guided by coverage

Without the sanitizers' runtime the ordinary core is used, for all targets but `scan`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tests.proof.fuzz_targets import Target

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "fuzz"
NAMES = ("scan", "manifest", "open", "repair", "import")
BATCH = 1024                # executions of `scan` between two looks at the clock
PATIENCE = 10               # seconds of processor time that one execution, or a batch, may take
MEMORY = 1 << 30            # bytes that a child may have
MOST_FINDINGS = 10
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
ENOUGH = 1 << 62


class Result(NamedTuple):
    """What a target counted, and what was found."""

    target: str
    executions: int
    findings: list[str]
    sanitized: bool


# -- the core with sanitizers -------------------------------------------------------------------------------------


class Core(NamedTuple):
    """Where a core for the fuzzer is: before others on Python's path, with a library that must be loaded first."""

    path: Path
    preload: str


def compiler(guided: bool) -> list[str]:
    return ["clang"] if guided else [os.environ.get("CC", "cc")]


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def runtime(cc: list[str]) -> str:
    """The library of AddressSanitizer that belongs to a compiler, or ""."""
    for name in ("libasan.so", f"libclang_rt.asan-{os.uname().machine}.so"):
        found = output_of([*cc, f"-print-file-name={name}"])
        if os.path.isabs(found) and os.path.exists(found):
            return found
    return ""


def build(*, guided: bool = False) -> Core | None:
    """The core for the fuzzer, built if a source has changed; None where there are no sanitizers.

    guided: by clang, with libFuzzer.
    """
    cc = compiler(guided)
    preload = runtime(cc)
    if not preload:
        return None
    directory = BUILD / ("guided" if guided else "plain")
    sources = [*sorted((ROOT / "ext").iterdir()), HERE / "fuzz_input.c", HERE / "fuzz_input.h", HERE / "fuzz_scan.pxi"]
    flags = [*SANITIZERS.split(), "-shared", "-fPIC", "-g", "-O2", "-std=gnu11", "-fno-strict-aliasing", "-w",
             "-fno-omit-frame-pointer", f"-I{sysconfig.get_paths()['include']}", f"-I{ROOT / 'ext'}", f"-I{HERE}"]
    if guided:
        flags += ["-fsanitize=fuzzer-no-link", "-shared-libasan", "-fno-sanitize=function"]
    facts = [sys.version, *cc, *flags, output_of([*cc, "--version"]), *(path.read_text() for path in sources if path.is_file())]
    stamp = hashlib.sha256("\0".join(facts).encode()).hexdigest()
    package = directory / "logkv"
    if not (directory / stamp).exists():
        shutil.rmtree(directory, ignore_errors=True)
        package.mkdir(parents=True)
        source, code = directory / "_core.pyx", directory / "_core.c"
        source.write_text((ROOT / "ext" / "_core.pyx").read_text() + (HERE / "fuzz_scan.pxi").read_text())
        subprocess.run([sys.executable, "-m", "cython", "-3", "-I", ROOT / "ext", "--module-name", "logkv._core", source,
                        "-o", code], check=True)
        inputs = directory / "fuzz_input.o"
        subprocess.run([*cc, "-c", "-O2", "-fPIC", "-w", f"-I{ROOT / 'ext'}", HERE / "fuzz_input.c", "-o", inputs,
                        *(["-DLOGKV_LIBFUZZER"] if guided else [])], check=True)
        last = [output_of([*cc, f"-print-file-name=libclang_rt.fuzzer_no_main-{os.uname().machine}.a"]), "-lstdc++", "-lm"]
        subprocess.run([*cc, *flags, code, inputs, *(last if guided else []), "-o", package / "_core.so"], check=True)
        (directory / stamp).touch()
    for path in (ROOT / "logkv").iterdir():             # the rest of the package as it is now
        link = package / path.name
        if path.suffix != ".so" and not link.is_symlink():
            link.symlink_to(path)
    return Core(directory, preload)


def environment(core: Core | None) -> dict[str, str]:
    """Of a child."""
    found = dict(os.environ, PYTHONSAFEPATH="1", PYTHONPATH=str(ROOT))
    if core is not None:
        found |= {
            "PYTHONPATH": f"{core.path}{os.pathsep}{ROOT}", "LD_PRELOAD": core.preload, "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": f"detect_leaks=0:max_allocation_size_mb={MEMORY >> 22}:hard_rss_limit_mb={MEMORY >> 20}:"
                            "allocator_may_return_null=0:handle_abort=1:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    return found


# -- the child ----------------------------------------------------------------------------------------------------


def limit_time(seconds: float) -> None:
    """Of the processor, from now on; then SIGPROF ends the process."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def make_target(name: str, directory: str, seed: int) -> Target:
    from tests.proof.fuzz_targets import TARGETS

    warnings.simplefilter("ignore")         # of what a background thread could not do
    return TARGETS[name](directory, seed)


def work(name: str, directory: str, seed: int, first: int, count: int, seconds: float, shared: int) -> None:
    """Executions from `first` on.  Two numbers are shared: which one is under way, and how many were done."""
    import logkv._core

    until = time.monotonic() + seconds
    progress = memoryview(mmap.mmap(shared, mmap.PAGESIZE)).cast("Q")
    target = make_target(name, directory, seed)
    if not hasattr(logkv._core, "Fuzz"):
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    number, stop = first, first + count
    run_batch = getattr(target, "run_batch", None)
    while number < stop and time.monotonic() < until:
        limit_time(PATIENCE)
        if run_batch is not None:
            size = min(BATCH, stop - number)
            run_batch(number, size, progress)
        else:
            size = 1
            progress[0] = number
            target.run(target.make(number))
        number += size
        progress[1] += size
    limit_time(0)


def one_input(name: str, directory: str, seed: int, number: int | None, data: bytes) -> bytes:
    """Runs an input, or makes the one with a number and returns it."""
    target = make_target(name, directory, seed)
    if number is not None:
        return target.make(number)
    limit_time(PATIENCE)
    target.run(data)
    return data


def guide(directory: str, seed: int, seconds: float) -> int:
    """libFuzzer, with a corpus that is kept."""
    from logkv import _core
    from tests.proof.fuzz_targets import Scan

    target = Scan(directory, seed)
    corpus, findings = BUILD / "corpus", BUILD / "findings"
    for path in (corpus, findings):
        path.mkdir(parents=True, exist_ok=True)
    for data in target.seeds:
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    status: int = _core.run_guided(target.core, [argument.encode() for argument in (          # type: ignore[attr-defined]
        "fuzz", f"-max_total_time={int(seconds)}", f"-seed={seed}", "-max_len=49176", f"-timeout={PATIENCE}",
        f"-artifact_prefix={findings}/scan-guided-", "-print_final_stats=1", str(corpus))])
    return status


# -- the parent ---------------------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.proof.fuzz", *map(str, arguments)]


def why(status: int, said: str) -> str:
    """In one line."""
    if status == -signal.SIGPROF:
        return f"more than {PATIENCE} s of processor time"
    for line in said.splitlines():
        if "ERROR: AddressSanitizer" in line or "runtime error:" in line or "rss limit" in line:
            return line.strip()
    lines = [line for line in said.splitlines() if line and not line.startswith(" ")]
    return lines[-1] if lines else f"the process ended with {status}"


def keep(core: Core | None, target: str, seed: int, number: int) -> str:
    """Writes an input to a file; how it is run again."""
    findings = BUILD / "findings"
    findings.mkdir(parents=True, exist_ok=True)
    path = findings / f"{target}-{seed}-{number}"
    subprocess.run(command("--target", target, "--seed", seed, "--make", number, "--input", path), env=environment(core),
                   cwd=ROOT, check=True)
    return f"python -m tests.proof.fuzz --target {target} --input {path.relative_to(ROOT)}"


def run(directory: str, seconds: float, seed: int = 1, target: str = "scan", executions: int = ENOUGH, *,
        sanitized: bool = True) -> Result:
    """Executions of a target, for so many seconds, or that many; they are those with the numbers 0, 1, 2, ... of the seed.

    sanitized: with the core that is built for it, if that can be.  Raises RuntimeError where a target cannot be run.
    """
    core = build() if sanitized else None
    if target == "repair" and importlib.util.find_spec("logkv.repair") is None:
        return Result(target, 0, [], core is not None)
    until = time.monotonic() + seconds
    findings: list[str] = []
    first = done = 0
    while first < executions and time.monotonic() < until and len(findings) < MOST_FINDINGS:
        with tempfile.TemporaryDirectory(dir=directory) as place, tempfile.TemporaryFile(dir=directory) as shared, \
                tempfile.TemporaryFile(dir=directory) as said:
            shared.truncate(mmap.PAGESIZE)
            progress = memoryview(mmap.mmap(shared.fileno(), mmap.PAGESIZE)).cast("Q")
            progress[0] = ENOUGH
            status = subprocess.run(
                command("--target", target, "--seed", seed, "--first", first, "--count", executions - first, "--seconds",
                        max(0.0, until - time.monotonic()), "--dir", place, "--shared", shared.fileno()),
                env=environment(core), cwd=ROOT, stderr=said, pass_fds=[shared.fileno()]).returncode
            number = progress[0]
            said.seek(0)
            text = said.read().decode(errors="replace")
        if status and number == ENOUGH:
            raise RuntimeError(f"the target {target} did not begin: {text[-1000:]}")
        if not status:
            done += progress[1]
            break
        done += number + 1 - first
        first = number + 1
        findings.append(f"{target}, execution {number} of seed {seed}: {why(status, text)}; again: "
                        f"{keep(core, target, seed, number)}")
    return Result(target, done, findings, core is not None)


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="python -m tests.proof.fuzz", description="Any bytes, and what comes of them.")
    words.add_argument("--target", choices=NAMES, action="append", help="again for more; all of them without it")
    words.add_argument("--seconds", type=float, default=60.0, help="for each target")
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--input", help="runs this file's bytes, and nothing else")
    words.add_argument("--guided", action="store_true", help="libFuzzer, for the target scan; needs clang")
    words.add_argument("--dir", default="/dev/shm" if os.path.isdir("/dev/shm") else None, help="for temporary stores")
    for name in ("first", "count", "shared", "make"):           # what the parent tells a child
        words.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    return words


def again(arguments: list[str], core: Core | None) -> int:
    """The same command in a child with another core."""
    return subprocess.run(command(*arguments), env=environment(core) | {"LOGKV_FUZZ_CHILD": "1"}, cwd=ROOT).returncode


def main() -> int:
    wanted = parser().parse_args()
    targets: list[str] = wanted.target or list(NAMES)
    if wanted.shared is not None:
        work(targets[0], wanted.dir, wanted.seed, wanted.first, wanted.count, wanted.seconds, wanted.shared)
        return 0
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        if wanted.make is not None:
            Path(wanted.input).write_bytes(one_input(targets[0], directory, wanted.seed, wanted.make, b""))
            return 0
        if (wanted.input or wanted.guided) and "LOGKV_FUZZ_CHILD" not in os.environ:
            core = build(guided=wanted.guided)
            if core is None and wanted.guided:
                print("this needs clang and its runtime (Debian: clang, libclang-rt-14-dev)", file=sys.stderr)
                return 2
            return again(sys.argv[1:], core)
        if wanted.input:
            one_input(targets[0], directory, wanted.seed, None, Path(wanted.input).read_bytes())
            return 0
        if wanted.guided:
            return guide(directory, wanted.seed, wanted.seconds)
        findings = []
        for target in targets:
            result = run(directory, wanted.seconds, wanted.seed, target)
            findings += result.findings
            how = "with sanitizers" if result.sanitized else "without sanitizers"
            print(f"{target:<10}{result.executions:>14,} executions {how}, {len(result.findings)} findings", flush=True)
    print("\n".join(findings), end="\n" if findings else "", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
