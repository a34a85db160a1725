"""The core under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer: tests of `raw` run on
builds of their own.

Loads and stores with a mask are calls, which no sanitizer watches; those tests/guarded.py holds to their bounds.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cuda_core
import pytest

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "c++")


def run(*command: object, cwd: Path | None = None, expect: int = 0, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == expect, (done.stdout + done.stderr)[-8000:]
    return done.stdout + done.stderr


def runtime(name: str) -> str:
    path = run(CXX, f"-print-file-name={name}").strip()
    if not os.path.isabs(path):
        pytest.skip(f"{CXX} comes without {name}")
    return path


@dataclass(frozen=True)
class Sanitizer:
    """`runtimes`: what Python itself must find already there; `marks`: what instrumented code calls."""

    flags: str
    runtimes: tuple[str, ...]
    options: dict[str, str]
    marks: bytes
    patterns: tuple[str, ...]  # of suites

    @property
    def suites(self) -> list[str]:
        return sorted(file.name for pattern in self.patterns for file in Path(__file__).parent.glob(f"{pattern}.py"))


# libstdc++ too, or exceptions cannot be intercepted. Python keeps memory until it exits, which is no leak of ours.
ADDRESS = Sanitizer(
    "address,undefined",
    ("libasan.so", "libstdc++.so"),
    {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    b"__asan_report_store",
    ("test_raw*", "test_saved*", "test_numerics*", "test_determinism_raw", "test_plan", "test_fuzz"),
)
# Of the suites, those that run kernels on several threads. Locks of Python, NumPy and BLAS are not seen.
THREAD = Sanitizer(
    "thread",
    ("libtsan.so",),
    {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1"},
    b"__tsan_write",
    ("test_determinism_raw", "test_raw_large", "test_saved*"),
)
SANITIZERS = {"address": ADDRESS, "thread": THREAD}


def instrument(sanitizer: Sanitizer, folder: Path) -> Path:
    """The package, whose `_core` is instrumented, and the tests."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.py")
    for part in ("fusedconvbn", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    cmake = [sys.executable, "-m", "cmake"]
    options = {
        "FUSEDCONVBN_SANITIZE": sanitizer.flags,
        "FUSEDCONVBN_TF": "OFF",
        "FUSEDCONVBN_OUTPUT": folder / "fusedconvbn",
        "Python_EXECUTABLE": sys.executable,
    }
    run(*cmake, "-S", ROOT, "-B", folder / "build", *[f"-D{name}={value}" for name, value in options.items()])
    run(*cmake, "--build", folder / "build", "-j", os.cpu_count())
    return folder


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory):
    """The folder of a sanitizer; each is built once."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = instrument(SANITIZERS[name], tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


def run_instrumented(sanitizer: Sanitizer, folder: Path, *arguments: object) -> str:
    return run(
        *[sys.executable, *arguments],
        cwd=folder,
        LD_PRELOAD=" ".join(map(runtime, sanitizer.runtimes)),
        PYTHONPATH=str(folder),  # before this package, which may be installed
        **sanitizer.options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SANITIZERS)
def test_the_core_is_instrumented(instrumented, name):
    """Else the next tests would pass whatever the core does."""
    sanitizer, folder = SANITIZERS[name], instrumented(name)
    script = "import fusedconvbn._core, sys; print(fusedconvbn._core.__file__); print(open('/proc/self/maps').read())"
    loaded = run_instrumented(sanitizer, folder, "-c", script)
    assert loaded.startswith(str(folder))
    assert all(f"lib{part}san" in loaded for part in {"address": ("a", "ub"), "thread": ("t",)}[name])
    assert sanitizer.marks in next(folder.glob("fusedconvbn/_core*.so")).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "suite"), [(name, suite) for name, sanitizer in SANITIZERS.items() for suite in sanitizer.suites]
)
def test_suite(instrumented, name, suite):
    """Without what is slow already, and without comparisons with TensorFlow, whose own code is not at stake."""
    sanitizer, folder = SANITIZERS[name], instrumented(name)
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not stock and not tensorflow"]
    arguments += ["--capture=sys", "--rootdir", folder]  # or a report would be lost with the process
    printed = run_instrumented(sanitizer, folder, *arguments, folder / "tests" / suite)
    if suite == "test_numerics_thirds.py" and "this machine has no amx" in printed:
        pytest.skip("this machine has no amx")
    assert " passed" in printed


def test_cuda_kernels_on_the_host(tmp_path):
    """Under AddressSanitizer, which knows of the fibers, on the cases of `make test`, forward and backward."""
    library = cuda_core.build_host(tmp_path, FUSEDCONVBN_SANITIZE=ADDRESS.flags)
    assert ADDRESS.marks in library.read_bytes()
    printed = run(
        *[sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "--capture=sys"],
        *["tests/test_cuda_host.py", "-k", "test_forward or test_backward or test_tiles or pixels or anywhere"],
        cwd=ROOT,
        LD_PRELOAD=" ".join(map(runtime, ADDRESS.runtimes)),
        FUSEDCONVBN_CUDA_HOST=str(library),
        **ADDRESS.options,
    )
    assert " passed" in printed


RACE = """
#include "python/thread_pool.h"
int main() {
  fusedconvbn::python::ThreadPool pool(4);
  int64_t shared = 0, own[4] = {};
  pool.run(100000, [&](int64_t, int worker) { ++RACING; });
  return static_cast<int>(shared + own[0] - shared - own[0]);
}
"""


# Callers in two pools, which meet helpers that look for work, that give up just then, and none. A job reads and writes
# memory of its caller, who waits for it; it must be done once, on a thread of the caller's pool.
HELPERS = """
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <memory>
#include <thread>

#include "host/idle_helpers.h"

using fusedconvbn::host::IdleHelpers;
using Job = IdleHelpers::Job;

thread_local const void* current_pool = nullptr;
long racing = 0;

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    schedule(nullptr);
    for (std::thread& thread : threads_) thread.join();
  }
  void schedule(Job job) {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(std::move(job));
    ready_.notify_all();
  }

 private:
  void work() {
    current_pool = this;
    while (const Job job = next()) job();
  }
  Job next() {  // an empty one ends all threads, so it stays
    std::unique_lock<std::mutex> lock(mutex_);
    ready_.wait(lock, [this] { return !jobs_.empty(); });
    Job job = jobs_.front();
    if (job) jobs_.pop_front();
    return job;
  }
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Job> jobs_;
  std::vector<std::thread> threads_;
};

struct Call {
  long given, made = 0, times = 0;
  std::atomic<bool> done{false};
};

void call(Pool* pool, long given) {
  const auto call = std::make_shared<Call>();
  call->given = given;
  Job job = [call, pool] {
    if (current_pool != pool) std::abort();
    call->made = call->given + 1;
    ++call->times;
    RACING;
    call->done.store(true);
  };
  IdleHelpers* const idle = IdleHelpers::global();
  if (!idle->hand_over(pool, &job))
    pool->schedule([idle, pool, job] { idle->help(pool, job); });
  while (!call->done.load()) std::this_thread::yield();
  if (call->made != given + 1 || call->times != 1) std::abort();
}

int main() {
  Pool pools[] = {Pool(2), Pool(2)};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&, caller] {
      for (long i = 0; i < 2000; ++i) {
        call(&pools[caller % 2], i);
        std::this_thread::sleep_for(std::chrono::microseconds(i * (caller + 7) % 130));  // up to twice their patience
      }
    });
  for (std::thread& caller : callers) caller.join();
}
"""


def run_with_threads_watched(folder: Path, source: str, racing: str, expect: int) -> None:
    """A program made with ThreadSanitizer, whose exit code is 66 where it sees a race."""
    (folder / "race.cc").write_text(source)
    options = ["-std=c++17", "-g", "-O1", "-fsanitize=thread", f"-DRACING={racing}", f"-I{ROOT / 'csrc'}"]
    run(CXX, *options, folder / "race.cc", "-o", folder / "race")
    printed = run(folder / "race", expect=expect)
    assert ("data race" in printed) == (expect != 0)


@pytest.mark.slow
@pytest.mark.parametrize(("racing", "expect"), [("own[worker]", 0), ("shared", 66)])
def test_bodies_of_the_thread_pool_that_race_are_reported(tmp_path, racing, expect):
    """The pool of `raw` runs bodies at once, and ThreadSanitizer sees them: else it would find nothing in kernels."""
    run_with_threads_watched(tmp_path, RACE, racing, expect)


@pytest.mark.slow
@pytest.mark.parametrize(("racing", "expect"), [("", 0), ("++racing", 66)])
def test_idle_helpers(tmp_path, racing, expect):
    """Jobs that race themselves are reported: calls do meet."""
    run_with_threads_watched(tmp_path, HELPERS, racing, expect)
