"""Builds the CPU kernels with sanitizers, without CUDA or Python in it, and runs tests/fuzz_cpu.cc over them.

    python tests/sanitize_cpu.py [--cases N] [--seed N] [--build DIR]

AddressSanitizer with leak detection and UndefinedBehaviorSanitizer; the first finding ends the run. The kernels are those
of this processor's own instruction set. Fresh memory is filled with NaN, so that results show what is read before it was
written. Needs g++ or clang++ (CXX) with its sanitizers; the build takes minutes, and DIR keeps it for the next run.
"""

import argparse
import concurrent.futures
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"
# Of what Eigen's convolutions expand to, UndefinedBehaviorSanitizer alone would make ten minutes of compilation.
ADDRESS_ONLY = ("primitives_conv",)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1:max_malloc_fill_size=1073741824:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def sources():
    """The CPU kernels: all C++ files but those of the GPU's engines."""
    files = sorted(KERNELS.rglob("*.cc"))
    return [path for path in files if path.parent.name not in ("cudnn", "wmma")] + [ROOT / "tests" / "fuzz_cpu.cc"]


def compile_command(source, target):
    """The compiler's command line for one source."""
    tensorflow = pathlib.Path(importlib.util.find_spec("tensorflow").origin).parent / "include"
    sanitizers = "address" if source.stem in ADDRESS_ONLY else "address,undefined"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g1", "-march=native", "-fno-omit-frame-pointer"]
    command += ["-Wall", "-Wextra", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{KERNELS}"]
    if source.stem.startswith("primitives_"):  # as in CMakeLists.txt, but for one instruction set, which takes the name
        command += ["-w", f"-isystem{tensorflow}", "-DEIGEN_MAX_ALIGN_BYTES=64", "-DUNET_FAST_ISA=baseline"]
        command += [f"-DUNET_FAST_EIGEN=Eigen_{source.stem}"]
    return [*command, "-c", str(source), "-o", str(target)]


def build(folder):
    """Compiles and links in `folder`, what has not changed excepted; the path of the program.

    Raises:
        subprocess.CalledProcessError: the compiler's message is on standard error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    newest_header = max(path.stat().st_mtime for path in KERNELS.rglob("*.h"))
    objects, stale = [], []
    for source in sources():
        target = folder / f"{source.parent.name}_{source.stem}.o"
        objects.append(target)
        if not target.exists() or target.stat().st_mtime < max(newest_header, source.stat().st_mtime):
            stale.append(compile_command(source, target))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for done in threads.map(lambda command: subprocess.run(command, check=True), stale):
            del done
    program = folder / "fuzz_cpu"
    link = [os.environ.get("CXX", "g++"), "-fsanitize=address,undefined", *map(str, objects), "-pthread"]
    subprocess.run([*link, "-o", str(program)], check=True)
    return program


def run(program, cases, seed):
    """The finished process of `cases` random cases; its standard output ends in a summary."""
    environment = {**os.environ, **OPTIONS}
    return subprocess.run(
        [str(program), str(cases), str(seed)], env=environment, capture_output=True, text=True, check=False
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="random cases (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each has the next one (default 0)")
    parser.add_argument("--build", type=pathlib.Path, help="folder to build in and keep (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            program = build(arguments.build or pathlib.Path(temporary))
        except (subprocess.CalledProcessError, OSError) as error:
            return f"expected a C++ compiler with sanitizers, got: {error}; set CXX to one"
        done = run(program, arguments.cases, arguments.seed)
    print(done.stdout, done.stderr, sep="", end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
