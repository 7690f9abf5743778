"""Build bgem3_nb from settings.ini, the one source of metadata."""
import re
import sys
from configparser import ConfigParser
from pathlib import Path
from shutil import copyfile

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], inline_comment_prefixes=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def requirements(key): return cfg.get(key, "").split()


def long_description():
    "README.md with the links of the repository's page made absolute, since a package index shows it elsewhere."
    base = f"{cfg['git_url']}/blob/{cfg['branch']}/"
    return re.sub(r"\]\((?!\w+:|#)", f"]({base}", (here / "README.md").read_text(encoding="utf-8"))


extras = {k.removesuffix("_requirements"): requirements(k) for k in cfg if k.endswith("_requirements")}
extras["all"] = sorted({r for k, needs in extras.items() if k not in ("book", "dev") for r in needs})
extras["book"] = sorted({*extras["book"], *extras["all"]})
extras["dev"] = sorted({*extras["dev"], *extras["book"]})


JOB_FILES = {"params": ["*.yaml"], "chains": ["*.yaml"],   # and the data that defaults and parameter files name
             "data": ["law_mini.jsonl", "company/**/*.[jm]*", "rental/*.json", "gold/*.json*"]}


def job_notebooks():
    "The notebooks that `bgem3-job` would list, by the same test: a cell tagged `parameters`."
    sys.path.insert(0, str(here))
    from bgem3_nb.jobs import is_job
    return [f for f in (here / "nbs").glob("*.ipynb") if is_job(f)]


class BuildWithJobs(build_py):
    "Put the job notebooks, their parameter files and the small data sets into the wheel, where `bgem3-job` finds them."
    def run(self):
        super().run()
        files = [f for folder, patterns in JOB_FILES.items() for p in patterns for f in (here / folder).glob(p)]
        for src in sorted([*job_notebooks(), *files]):
            dst = Path(self.build_lib) / cfg["lib_name"] / "job_files" / src.relative_to(here)
            dst.parent.mkdir(parents=True, exist_ok=True)
            copyfile(src, dst)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license=cfg["license"].upper(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    package_data={cfg["lib_name"]: ["py.typed"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": requirements("console_scripts"),
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    cmdclass={"build_py": BuildWithJobs},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers",
                 "Natural Language :: English"]
    + [f"Programming Language :: Python :: 3.{v}" for v in range(10, 14)],
    zip_safe=False,
)
