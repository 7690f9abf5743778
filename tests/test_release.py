"""`make release`: what it refuses, and that a release that fails changes nothing. `tools/test.py release` makes a whole
one."""
import subprocess
import sys
from shutil import copy

import pytest
from conftest import REPO

VERSIONED = ("settings.ini", "CITATION.cff", "CHANGELOG.md")


@pytest.fixture
def repository(tmp_path):
    "A repository with the files that a release changes, at version 0.1.0, and a function that runs git in it."
    def git(*words):
        author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()
    (tmp_path / "tools").mkdir()
    copy(REPO / "tools" / "release.py", tmp_path / "tools")
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nversion = 0.1.0\n")
    (tmp_path / "CITATION.cff").write_text("version: 0.1.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n")      # lacks the heading of what is unreleased
    git("init", "-q")
    git("add", "--all")
    git("commit", "-q", "-m", "before")
    git("tag", "v0.3.0")
    return tmp_path, git


def release(folder, *words):
    return subprocess.run([sys.executable, "tools/release.py", *words], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("words, why", [
    ([], "say which version: make release VERSION="),
    (["next"], "'next' is no version"),
    (["v0.2.0"], "write 'v0.2.0' as '0.2.0'"),
    (["0.0.9"], "0.0.9 is before 0.1.0, which settings.ini states"),
    (["0.3.0"], "the tag v0.3.0 exists; choose a later version"),
])
def test_a_version_that_cannot_be_released(repository, words, why):
    folder, git = repository
    done = release(folder, *words)
    assert done.returncode == 1
    assert why in done.stderr and "Traceback" not in done.stderr
    assert git("status", "--porcelain") == ""


def test_what_is_not_committed_is_no_release(repository):
    folder, git = repository
    (folder / "new.py").write_text("")
    done = release(folder, "0.2.0")
    assert done.returncode == 1 and "commit or remove these first:\n?? new.py" in done.stderr


def test_a_release_that_fails_leaves_the_files_as_they_were(repository):
    folder, git = repository
    before = {name: (folder / name).read_bytes() for name in VERSIONED}
    done = release(folder, "0.2.0")
    assert done.returncode == 1 and "CHANGELOG.md: 0 lines match '^## Unreleased$'" in done.stderr
    assert {name: (folder / name).read_bytes() for name in VERSIONED} == before
    assert (git("status", "--porcelain"), git("tag")) == ("", "v0.3.0")
