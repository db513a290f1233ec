"""A Python that can import only what `bench gpu` needs: torch, lightning, timm, transformers, hydra, dall_e."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

WANTED = (
    *("torch", "lightning", "timm", "transformers", "hydra-core", "omegaconf", "antlr4-python3-runtime", "simplejpeg"),
    *("requests", "attrs"),  # what dall-e imports; it asks for more
)
ALONE = ("dall-e", "beit-pretrain", "setuptools")

HOOK = """
import sys
from importlib import metadata
from importlib.machinery import PathFinder

REFUSED, ABSENT = frozenset({modules!r}), frozenset({distributions!r})
from_name = metadata.Distribution.from_name


class Lean(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in REFUSED else PathFinder.find_spec(name, path, target)


def installed(name):
    if name.lower().replace("_", "-").replace(".", "-") in ABSENT:
        raise metadata.PackageNotFoundError(name)
    return from_name(name)


sys.meta_path[sys.meta_path.index(PathFinder)] = Lean
metadata.Distribution.from_name = installed
"""


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def with_dependencies(names: tuple[str, ...]) -> set[str]:
    """Names of installed distributions and of all their requirements."""
    found: set[str] = set()
    waiting = [(name, frozenset[str]()) for name in names]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(normal(name))
        for requirement in map(Requirement, requirements):
            wanted = [{"extra": extra} for extra in ("", *extras)]
            if requirement.marker is None or any(requirement.marker.evaluate(each) for each in wanted):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found


def refused() -> tuple[list[str], list[str]]:
    """Installed top-level modules and distributions that such a machine would lack."""
    kept = with_dependencies(WANTED) | set(ALONE)
    owners = {module: {normal(name) for name in names} for module, names in metadata.packages_distributions().items()}
    here = {name for names in owners.values() for name in names}
    return sorted(module for module, names in owners.items() if not names & kept), sorted(here - kept)


def lean_python(folder: Path) -> dict[str, str]:
    """Environment variables that block all other imports."""
    folder.mkdir(exist_ok=True)
    modules, distributions = refused()
    (folder / "sitecustomize.py").write_text(HOOK.format(modules=modules, distributions=distributions))
    source = Path(__file__).parents[1] / "src"
    return {"PYTHONPATH": f"{folder}:{source}"}
