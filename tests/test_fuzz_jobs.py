"""Whatever is written in a parameter file or after `-p`: a sentence, never a traceback of another kind."""
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bgem3_nb.jobs import Fields, JobError, Place, Unsure, fit_value, from_text, plan_job, read_params

PARAMETERS = '''steps: int = 3             # how many
lr: float | None = None    # learning rate
data: str | list[str] = "x"  # files
test: float | list[str] = 0.0  # a share, or labels
loss: "Literal['plain', 'unified']" = "plain"  # which
labels: "Fields['rows.LABELS']" = {}  # of rows that have none
stages: "dict[Literal['a', 'b'], {'rate': float, 'on': bool, 'most': int | None, 'modes': list[str]}]" = {}  # settings
anything: dict = {}        # of the source
out: str = "data/runs/toy"  # where the results go'''
NAMES = ["steps", "lr", "data", "test", "loss", "labels", "stages", "anything", "out"]
TYPES = [int, float | None, str | list[str], float | list[str], Literal["plain", "unified"], Fields("rows.LABELS"),
         dict[Literal["a", "b"], {"rate": float, "on": bool}], dict, str, bool, list, list[int], Any,
         dict[str, dict[str, float]]]
SOME = settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))

# Pieces of which YAML is made, and what has gone wrong before.
PIECES = ("no yes on off ~ null true .nan .inf 1e-5 1e999 010 0x1F 12:30 2024-13-45 2024-05-01 <<: = !!binary !!int "
          "!!float !!bool !!set !!python/object &a *a ? - : , # | > % @ ` \\x \\uD800 \t \x00 \ufeff").split(" ")
PIECES += ["9" * 5000, "[" * 1200, "{a: " * 300, "'", '"', "[", "]", "{", "}", "\n", "\n  ", " ", ": ", "- ", "~/x",
           "~nobody/x", "a" * 300, "Bộ luật", *NAMES]
words = st.sampled_from(PIECES)
texts = st.lists(words | st.text(max_size=12), max_size=14).map("".join)
plain_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
plain_values |= st.sampled_from(["no", "1e-5", "~/x", "a", "b", "rate", "on", "domain"])
keys = st.text(max_size=4) | st.sampled_from(["a", "b", "rate", "modes", "domain"])

def nested(inner): return st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
values = st.recursive(plain_values, nested, max_leaves=12)


def plain(value):
    "Whether a value is what JSON can hold, and can be written to a file."
    if isinstance(value, dict): return all(map(plain, value.items()))
    if isinstance(value, (list, tuple)): return all(map(plain, value))
    if isinstance(value, str): value.encode()
    return value is None or isinstance(value, (bool, int, float, str)) and not isinstance(value, Unsure)


@pytest.fixture
def toy(job, tmp_path, monkeypatch):
    monkeypatch.setenv("BGEM3_NB_JOBS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    job("50_toy", PARAMETERS)
    return tmp_path


def check_plan(**how):
    try: plan = plan_job("toy", **how)
    except JobError as e: assert str(e) and len(str(e).splitlines()) == 1, str(e)
    else: assert all(map(plain, plan.values.values())), plan.values


def test_files(toy):
    path = toy / "fuzz.yaml"
    @SOME
    @given(texts | st.builds("{}: {}".format, st.sampled_from(NAMES), texts))
    def fuzz(text):
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try: found = read_params(path)
        except JobError as e: assert str(e).startswith(f"{path}")
        else: assert all(isinstance(where, Place) for _, where in found.values())
        check_plan(files=[str(path)])
    fuzz()


def test_files_of_values(toy):
    "What YAML itself has written is read back, or refused in a sentence."
    import yaml
    path = toy / "fuzz.yaml"
    @SOME
    @given(st.dictionaries(st.sampled_from(NAMES), values, max_size=4))
    def fuzz(given):
        path.write_text(yaml.safe_dump(given, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        check_plan(files=[str(path)])
    fuzz()


def test_files_of_bytes(toy):
    path = toy / "fuzz.json"
    @SOME
    @given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda b: b'{"steps": ' + b))
    def fuzz(data):
        path.write_bytes(data)
        check_plan(files=[str(path)])
    fuzz()


def test_words(toy):
    @SOME
    @given(st.lists(st.tuples(st.sampled_from(NAMES) | texts, texts), max_size=3), st.none() | texts)
    @example([], "~\0")
    def fuzz(words, out): check_plan(words=words, out=out)
    fuzz()


def test_names_of_files(toy):
    @SOME
    @given(texts)
    def fuzz(name): check_plan(files=[name])
    fuzz()


def test_text_of_every_type():
    @SOME
    @given(texts, st.sampled_from(TYPES))
    def fuzz(text, type_):
        try: value = from_text(text, type_)
        except ValueError as e: assert str(e)
        else: assert type_ is str or plain(value)
    fuzz()


def test_values_of_every_type():
    "A value that fits still fits when it is checked again, and is the same."
    @SOME
    @given(values, st.sampled_from(TYPES))
    def fuzz(value, type_):
        try: found = fit_value(value, type_)
        except ValueError as e: assert str(e)
        else: assert repr(fit_value(found, type_)) == repr(found)
    fuzz()
