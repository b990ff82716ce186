"""What is pinned, by which hashes, and under which licences."""

import importlib.metadata
import subprocess
import sys

import pytest
import supply_chain
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def test_every_release_in_the_lock_is_pinned_by_hashes():
    for name, pins in supply_chain.locked().items():
        for version, _, hashes in pins:
            assert version, name
            assert hashes and all(h.startswith("sha256:") and len(h) == 7 + 64 for h in hashes), f"{name} {version}"
    lock = supply_chain.LOCK.read_text()
    assert "://" not in lock and "--index" not in lock, "a lock names releases, not where they are fetched"


def test_the_lock_has_what_the_project_asks_for():
    """For each Python that it runs on one release, of the range that setup.py and pyproject.toml give."""
    lock = supply_chain.locked()
    for line in [
        *supply_chain.to_run(),
        *supply_chain.to_develop(),
        *supply_chain.project()["build-system"]["requires"],
    ]:
        requirement = Requirement(line)
        pins = lock[canonicalize_name(requirement.name)]
        for python in PYTHONS:
            here = {"python_version": python, "python_full_version": f"{python}.0"}
            (version,) = {v for v, marker, _ in pins if marker is None or marker.evaluate(here)}
            assert requirement.specifier.contains(version), (
                f"{line}: the lock has {version} for Python {python}; `make lock`"
            )


def test_no_release_in_the_lock_is_for_a_python_that_it_does_not_support():
    """By what the releases that are installed here say of themselves."""
    for name, pins in supply_chain.locked().items():
        for version, marker, _ in pins:
            try:
                about = importlib.metadata.metadata(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            if about["Version"] != version or not about["Requires-Python"]:
                continue
            for python in PYTHONS:
                here = {"python_version": python, "python_full_version": f"{python}.99"}
                if marker is None or marker.evaluate(here):
                    assert SpecifierSet(about["Requires-Python"]).contains(f"{python}.99"), (
                        f"{name} {version} for Python {python}; `make lock`"
                    )


def test_everything_that_is_needed_here_is_locked():
    missing = set(supply_chain.needed()) - set(supply_chain.locked())
    assert not missing, "`make lock`"


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="the page is of Python 3.11; others need a few packages more"
)
def test_the_licences_of_all_of_them_are_listed():
    listed = [line.split(" | ") for line in supply_chain.LICENCES.read_text().splitlines() if line.startswith("| ")][1:]
    versions = {name.removeprefix("| "): version for name, version, *_ in listed}
    assert sorted(versions) == supply_chain.needed(), "`make lock`"
    for name, version in versions.items():
        assert version in [pin[0] for pin in supply_chain.locked()[name]], name


def test_an_unknown_licence_is_an_error(monkeypatch):
    monkeypatch.setattr(supply_chain.importlib.metadata, "metadata", lambda name: _Message())
    with pytest.raises(LookupError, match=r"thing: no licence known for .*Our own words"):
        supply_chain.licence("thing")


class _Message:
    def get(self, key):
        return {"License": "Our own words"}.get(key)

    def get_all(self, key):
        return None


def test_what_is_installed_fits_together():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
