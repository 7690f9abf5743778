"""What an installation of the extra `book` has: all that a page's first cell installs on Colab."""
import importlib.util
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def book_packages():
    "The names of the packages that `book` brings, with those that they need."
    config = ConfigParser(delimiters=["="], inline_comment_prefixes=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    lists = [v for k, v in config["DEFAULT"].items() if k.endswith("requirements") and k != "dev_requirements"]
    todo, known = [Requirement(r) for names in lists for r in names.split()], {}
    while todo:
        wanted = todo.pop()
        name, extras = canonicalize_name(wanted.name), wanted.extras | {""}
        new = extras - known.get(name, set())
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}) or not new: continue
        known[name] = known.get(name, set()) | new
        try: needs = [Requirement(r) for r in requires(name) or ()]
        except PackageNotFoundError: continue           # not installed here
        for r in needs:
            if r.marker and not any(r.marker.evaluate({"extra": e}) for e in new): continue
            r.marker = None
            todo.append(r)
    return set(known)


class Hidden:
    "A finder by which this process does not find the modules of other packages, but those that it has loaded already."
    def __init__(self):
        book = book_packages() | {"bgem3-nb", "pip", "setuptools"}
        owners = {module: {canonicalize_name(d) for d in found} for module, found in packages_distributions().items()}
        self.names = {module for module, found in owners.items() if not found & book} - set(sys.modules)

    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}: it is not in the extra `book`, "
                                      "which is all that this page has on Colab", name=name)


def hide_others():
    "From now on, let this process import and find what `book` brings, and nothing else that is installed."
    hidden, find_spec = Hidden(), importlib.util.find_spec
    sys.meta_path.insert(0, hidden)
    importlib.util.find_spec = lambda name, package=None: (
        None if name in hidden.names else find_spec(name, package))
