"""Make a release: set the version, build the sdist and the wheel, check them, commit and tag. Nothing is pushed.

    make release VERSION=0.2.0                  also installs and uses both packages in environments of their own
    python tools/release.py --check 0.2.0       whether a release can begin

The version is set in settings.ini, from which nbdev writes it into bgem3_nb/__init__.py, in CITATION.cff, and as the
heading over what CHANGELOG.md lists as unreleased. When anything fails, these files are as they were before.
"""
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from datetime import date
from pathlib import Path

from packaging.metadata import Metadata
from packaging.version import InvalidVersion, Version

root = Path(__file__).resolve().parent.parent
NEEDED = ("LICENSE", "CHANGELOG.md", "CITATION.cff", "settings.ini")   # in the sdist, beside the package


class ReleaseError(Exception):
    "Why there is no release, and what to do."


def git(*words):
    "What git prints."
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def replace_once(name, pattern, new):
    "Replace the one place of a file where the pattern matches."
    path = root / name
    text, found = re.subn(pattern, lambda m: new, path.read_text(encoding="utf-8"), flags=re.M)
    if found != 1: raise ReleaseError(f"{name}: {found} lines match {pattern!r}, and there must be one")
    path.write_text(text, encoding="utf-8")


def current():
    "The version that settings.ini states."
    return Version(re.search(r"^version = (.+)$", (root / "settings.ini").read_text(encoding="utf-8"), re.M)[1])


def check_start(version):
    "Whether a release can begin: a version after the current one, no such tag, nothing uncommitted."
    try: wanted = Version(version)
    except InvalidVersion: raise ReleaseError(f"{version!r} is no version; write three numbers: 0.2.0") from None
    if str(wanted) != version: raise ReleaseError(f"write {version!r} as {str(wanted)!r}")
    if wanted < current(): raise ReleaseError(f"{version} is before {current()}, which settings.ini states")
    if git("tag", "--list", f"v{version}"): raise ReleaseError(f"the tag v{version} exists; choose a later version")
    if changed := git("status", "--porcelain"): raise ReleaseError(f"commit or remove these first:\n{changed}")


def set_version(version):
    "Write the version to every file that states it."
    replace_once("settings.ini", r"^version = .+$", f"version = {version}")
    replace_once("CITATION.cff", r"^version: .+$", f"version: {version}")
    replace_once("CHANGELOG.md", r"^## Unreleased$", f"## Unreleased\n\n## {version}, {date.today()}")
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=root, check=True)


def build():
    "The paths of the sdist and of the wheel that is made from it."
    dist = root / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", dist], cwd=root, check=True, stdout=subprocess.DEVNULL)
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


def check_metadata(name, raw, version):
    "What an index would refuse or show wrongly: invalid fields, another version, no description."
    stated = Metadata.from_email(raw, validate=True)
    if str(stated.version) != version: raise ReleaseError(f"{name} states version {stated.version}, not {version}")
    if not stated.description or stated.description_content_type != "text/markdown":
        raise ReleaseError(f"{name} has no description in Markdown; see setup.py")


def check_packages(sdist, wheel, version):
    "The metadata of both, and the files without which they cannot be used."
    with tarfile.open(sdist) as archive:
        top, names = sdist.name.removesuffix(".tar.gz"), set(archive.getnames())
        check_metadata(sdist.name, archive.extractfile(f"{top}/PKG-INFO").read(), version)
    with zipfile.ZipFile(wheel) as archive:
        [about] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        check_metadata(wheel.name, archive.read(about), version)
        init = archive.read("bgem3_nb/__init__.py").decode("utf-8")
        names |= set(archive.namelist())
    if f'__version__ = "{version}"' not in init: raise ReleaseError(f"{wheel.name}: __init__.py has another version")
    needed = {f"{top}/{n}" for n in NEEDED} | {"bgem3_nb/py.typed"}
    if missing := needed - names:
        raise ReleaseError(f"missing from {sdist.name} or {wheel.name}: {', '.join(sorted(missing))}; see MANIFEST.in")


def release(version):
    "Everything but the push; a failure puts the files back."
    check_start(version)
    try:
        set_version(version)
        sdist, wheel = build()
        check_packages(sdist, wheel, version)
        git("commit", "--all", "--message", f"Release {version}")
    except BaseException:
        git("checkout", "HEAD", "--", ".")
        raise
    git("tag", "--annotate", f"v{version}", "--message", f"Release {version}")
    files = " ".join(str(f.relative_to(root)) for f in (sdist, wheel))
    print(f"{version} is committed and tagged, and nothing is pushed. To publish it:\n"
          f"    git push origin HEAD v{version}\n    twine upload {files}")


def main():
    versions = [word for word in sys.argv[1:] if word != "--check"]
    if len(versions) != 1: sys.exit("say which version: make release VERSION=0.2.0")
    try: (check_start if "--check" in sys.argv else release)(*versions)
    except ReleaseError as e: sys.exit(f"no release: {e}")
    except subprocess.CalledProcessError as e: sys.exit(f"no release: {e}\n{e.stderr or ''}")


if __name__ == "__main__": main()
