"""What unet_fast is built from, run with and developed with, by the lock and what is installed.

python tests/supply_chain.py requirements    # all that is asked for, a line each, for `make lock`
python tests/supply_chain.py licences        # docs/licences.md
"""

import ast
import contextlib
import importlib.metadata
import pathlib
import re
import sys

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = pathlib.Path(__file__).parent.parent
LOCK = ROOT / "requirements-dev.lock"
LICENCES = ROOT / "docs" / "licences.md"
# SPDX identifiers of what packages say in words, in the old field or in a classifier, and of those that say nothing there.
SPDX = {
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "mit license": "MIT",
    "python software foundation license": "PSF-2.0",
}
BY_THEIR_FILES = {"namex": "Apache-2.0", "cmake": "Apache-2.0 AND BSD-3-Clause"}


def project():
    """pyproject.toml, a dict."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def to_run():
    """What is needed to run, of the newest TensorFlow: a list of requirements."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and [target.id for target in statement.targets] == ["REQUIREMENTS"]:
            (tensorflow,) = (line for line in project()["build-system"]["requires"] if line.startswith("tensorflow"))
            return [tensorflow, *ast.literal_eval(statement.value)]
    raise LookupError("setup.py: no list REQUIREMENTS")


def to_develop():
    """What is needed to export and to develop beside that: a list of requirements."""
    extras = project()["project"]["optional-dependencies"]
    return [line for extra in ("export", "dev") for line in extras[extra] if not line.startswith("unet_fast")]


def locked():
    """The lock: a dict from a package's normalised name to a list of (version, marker or None, hashes), one a line that pins it."""
    found = {}
    for entry in re.split(r"\n(?=\S)", LOCK.read_text().strip()):
        head, *hashes = re.split(r" \\\n\s+--hash=", entry)
        requirement = Requirement(head)
        (specifier,) = requirement.specifier
        pin = specifier.version, requirement.marker, hashes
        found.setdefault(canonicalize_name(requirement.name), []).append(pin)
    return found


def needed(develop=True, build=True):
    """Names of everything that the project and what it needs ask for in this environment, sorted.

    Args:
        develop, build: whether what is needed to develop and to build counts, beside what is needed to run.
    """
    wanted = [Requirement(line) for line in to_run()]
    wanted += [Requirement(line) for line in project()["build-system"]["requires"] if build]
    wanted += [Requirement(line) for line in to_develop() if develop]
    names, environment = set(), default_environment()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        active = [environment | {"extra": extra} for extra in ("", *requirement.extras)]
        if requirement.marker and not any(requirement.marker.evaluate(each) for each in active):
            continue
        if (name, frozenset(requirement.extras)) in names:
            continue
        names.add((name, frozenset(requirement.extras)))
        for line in importlib.metadata.requires(name) or ():
            below = Requirement(line)
            if below.marker is None or any(below.marker.evaluate(each) for each in active):
                below.marker = None
                wanted.append(below)
    return sorted({name for name, _ in names})


def licence(name):
    """SPDX expression of an installed package's licence.

    Raises:
        LookupError: it says none that is known here; the message has what it says.
    """
    if name in BY_THEIR_FILES:
        return BY_THEIR_FILES[name]
    about = importlib.metadata.metadata(name)
    said = [about.get("License-Expression") or "", about.get("License") or ""]
    said += [
        line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or () if line.startswith("License :: OSI")
    ]
    for words in said:
        with contextlib.suppress(InvalidLicenseExpression):
            return canonicalize_license_expression(SPDX.get(words.lower(), words))
    raise LookupError(f"{name}: no licence known for {said}; see its files and add it to SPDX or BY_THEIR_FILES")


def table():
    """docs/licences.md."""
    pins = locked()
    uses = {name: "to develop" for name in needed()}
    uses |= {name: "to build" for name in needed(develop=False)}
    uses |= {name: "to run" for name in needed(develop=False, build=False)}
    lines = [
        "# Licences",
        "",
        "unet_fast is Apache-2.0. What it is run with and developed with, and the licences that these packages declare",
        "(`make lock` writes this page). None of them is part of unet_fast's own source distribution or wheel, whose",
        "`_native` and `_ops.so` hold code of the headers of pybind11 (BSD-3-Clause), Eigen (MPL-2.0), TensorFlow (Apache-2.0) and",
        "cuDNN's frontend (MIT) and, where built for GPUs, NVIDIA's static CUDA runtime.",
        "",
        "| package | version | licence | needed |",
        "|---|---|---|---|",
    ]
    for name, use in sorted(uses.items()):
        version = importlib.metadata.version(name)
        if version not in [pin[0] for pin in pins.get(name, ())]:
            raise LookupError(f"{name} {version} is installed, but the lock has {pins.get(name)}; `make` installs that")
        lines.append(f"| {name} | {version} | {licence(name)} | {use} |")
    return "\n".join(lines) + "\n"


def main():
    if sys.argv[1:] == ["requirements"]:
        print(*to_run(), *to_develop(), *project()["build-system"]["requires"], sep="\n")
    elif sys.argv[1:] == ["licences"]:
        print(table(), end="")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
