"""A chapter's process finds what the extra `book` brings, and no other package of this environment."""
import subprocess
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
from book import book_packages  # noqa: E402


def test_the_packages_of_the_book_are_followed_to_what_they_need():
    found = book_packages()
    asked = {"flagembedding", "peft", "ir-measures", "papermill", "qdrant-client"}
    through = {"huggingface-hub", "pytrec-eval-terrier", "nbclient", "jinja2"}
    assert asked | through <= found and not {"pytest", "nbdev", "tensorboard", "hypothesis"} & found
    assert all(name == canonicalize_name(name) for name in found)


def test_other_packages_are_hidden():
    lines = ["import sys", f"sys.path.insert(0, {str(ROOT / 'tools')!r})", "from book import hide_others",
             "hide_others()", "import yaml, tqdm.auto, packaging.version",
             "from importlib.util import find_spec", "assert find_spec('yaml') and not find_spec('pytest')",
             "try: import pytest", "except ModuleNotFoundError as e: print(e.name, 'book' in str(e))"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["pytest", "True"], done.stderr
