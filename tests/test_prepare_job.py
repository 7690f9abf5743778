"The job `prepare`: every row accounted for, strict runs that stop, dry runs that ask nobody."
import json

from conftest import REPO
from test_queries import server  # noqa: F401 (a fixture)


def rows(path):
    with open(path, encoding="utf-8") as f: return [json.loads(line) for line in f]


def test_dirty_data_from_two_formats(tmp_path, launch):
    "Bad rows, repeated queries, contradictions and targets: what is written, rejected, merged and left out adds up."
    good = [{"query": f"what is {i}", "pos": [f"the answer number {i} is {i * 7919}"], "language": "en",
             "query_type": "ab"[i % 4 == 0], "domain": "d"} for i in range(60)]
    bad = [{"query": "x", "pos": [""]}, {"query": "y"}, {"query": "what is left", "pos": ["p"], "neg": ["p"]}]
    every = [*good, *bad, good[0] | {"pos": ["another answer to nought"]}]
    text = "".join(json.dumps(r) + "\n" for r in every) + '{"query": "half'
    (tmp_path/"one.jsonl").write_text(text)
    lines = [f"ما هو {i},الجواب رقم {i} هو {i * 6007},ar\n" for i in range(30)]
    (tmp_path/"two.csv").write_text("question,answer,language\n" + "".join(lines))
    done = launch("prepare", "-p", "data", f'["{tmp_path}/one.jsonl", "{tmp_path}/two.csv"]', "-p", "test", "0.1",
                  "-p", "targets", '{"language": {"ar": 0.5}}', "-p", "labels", '{"domain": "d"}',
                  "-p", "fill_language", "false", "--out", "run", "--no-progress")
    assert done.returncode == 0, done.stderr
    out = tmp_path/"run"
    stats = json.loads((out/"prepare_stats.json").read_text())
    rejected = rows(out/"rejected.jsonl")
    parts = {name: rows(out/f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert [(r["line"], r["field"]) for r in rejected[:3]] == [(61, "pos"), (62, "pos"), (65, "")]
    assert [r["row"]["query"] for r in rejected[3:]] == ["what is left"]
    assert [f["in"] for f in stats["files"].values()] == [65, 30]
    assert {s["step"].split()[0]: s["rows"] for s in stats["steps"]}["merge"] == -1
    assert sum(s["rows"] for s in stats["steps"]) == sum(map(len, parts.values())) == sum(stats["rows"].values())
    languages = [r["language"] for r in parts["train"]]
    assert abs(languages.count("ar") / len(languages) - .5) <= .01
    assert not {r["query"] for r in parts["train"]} & {r["query"] for r in parts["test"] + parts["valid"]}
    assert {r["source"] for r in parts["train"]} == {"one", "two"}
    assert not [p.name for p in out.rglob("*.tmp")]


def test_strict_stops_at_the_first_bad_row(tmp_path, launch):
    (tmp_path/"rows.jsonl").write_text('{"query": "a", "pos": "b"}\n{"query": "a", "pos": 5}\n')
    done = launch("prepare", "-p", "data", str(tmp_path/"rows.jsonl"), "-p", "strict", "true", "--out", "run",
                  "--no-progress")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in ("rows.jsonl, line 2, field 'pos'", "found int '5'"): assert part in done.stderr, done.stderr
    left = sorted(p.name for p in (tmp_path/"run").iterdir() if p.name != ".lock")
    assert left == ["prepare.failed.ipynb", "run.json"]


def test_a_dry_run_asks_nobody(tmp_path, launch):
    endpoint = {"model": "any", "base_url": "http://127.0.0.1:9/v1", "price_in": 1.0, "price_out": 2.0, "key_env": ""}
    done = launch("prepare", "-p", "data", str(REPO/"data"/"company"), "-p", "write_queries", "llm",
                  "-p", "dry_run", "true", "-p", "query_options", '{"language": "vi"}',
                  "-p", "endpoint", json.dumps(endpoint), "--out", "run", "--no-progress")
    assert done.returncode == 0, done.stderr
    assert "A dry run: nothing was asked" in done.stdout
    assert (tmp_path/"run"/"queries"/"prompts.jsonl").is_file()
    assert not (tmp_path/"run"/"train.jsonl").exists()


def test_a_key_never_reaches_the_disk(tmp_path, launch):
    "As a value, a name of a variable, in a URL, in a file: refused before a notebook is written, and not repeated."
    secret = "sk-" + "a1B2" * 8
    (tmp_path/"mine.yaml").write_text(f"write_queries: llm\nendpoint:\n  model: m\n  api_key: {secret}\n")
    endpoints = [json.dumps({"model": "m", "api_key": secret}), f'{{"api_key": "{secret}"',
                 json.dumps({"key_env": secret}), json.dumps({"base_url": f"https://me:{secret}@127.0.0.1/v1"})]
    for words in (*(["-p", "endpoint", e] for e in endpoints), ["-p", "model", secret], ["-f", "mine.yaml"]):
        done = launch("prepare", *words, "--out", "run")
        assert done.returncode == 1, words
        assert "key" in done.stderr, (words, done.stderr)
        assert secret not in done.stdout + done.stderr, words
        assert done.stderr.count("\n") == 1, (words, done.stderr)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml"]
    assert "mine.yaml, line 2: api_key" in done.stderr


def test_the_projects_own_data_from_anywhere(tmp_path, launch):
    "The job's defaults, in an empty directory; a file of that name where one stands comes first."
    plan = launch("prepare", "--dry-run").stdout
    assert f"'{REPO}/data/company'" in plan
    assert "default (the project's own data)" in plan
    (tmp_path/"data"/"company").mkdir(parents=True)
    assert "'data/company' " in launch("prepare", "--dry-run").stdout


def test_what_defaults_and_parameter_files_name_is_in_the_wheel(tmp_path, monkeypatch):
    "Every file `data/…` that a job's default or a parameter file names is found from anywhere, and setup.py packs it."
    import ast
    from bgem3_nb.jobs import JobError, find_jobs, plan_job
    monkeypatch.chdir(tmp_path)
    assigned = [n for n in ast.parse((REPO/"setup.py").read_text()).body if isinstance(n, ast.Assign)]
    [patterns] = [ast.literal_eval(n.value) for n in assigned if ast.unparse(n.targets[0]) == "JOB_FILES"]
    packed = {f for p in patterns["data"] for f in (REPO/"data").glob(p)}
    def texts(value):
        if isinstance(value, dict): value = list(value.values())
        if isinstance(value, list): return [t for v in value for t in texts(v)]
        return [value] if isinstance(value, str) else []
    found = set()
    for name in find_jobs():
        for file in [None, *sorted((REPO/"params").glob("*.yaml"))]:
            try: plan = plan_job(name, [str(file)] if file else [])
            except JobError: continue                                            # a file of another job
            named = [t for k, v in plan.values.items() if k != "out" for t in texts(v)]
            assert not [t for t in named if t.startswith("data/")], (name, file, named)
            found |= {t for t in named if t.startswith(str(REPO/"data"))}
    names = ("company", "company/documents", "law_mini.jsonl", "rental/listings.json")
    assert {str(REPO/"data"/n) for n in names} <= found
    for path in found: assert any(f == REPO/path or str(f).startswith(path + "/") for f in packed), path


def test_forcing_with_other_settings_leaves_no_old_test(tmp_path, launch):
    "The rows of the old test are in the new training rows: beside them, it would be no test."
    law = str(REPO/"data"/"law_mini.jsonl")
    words = ["prepare", "-f", "prepare_smoke", "--out", "run", "--no-progress", "-p", "data", law]
    done = launch(*words, "-p", "test", "0.3")
    assert done.returncode == 0, done.stderr
    held_out = {r["query"] for r in rows(tmp_path/"run"/"test.jsonl")}
    done = launch(*words, "-p", "test", "0", "--force")
    assert done.returncode == 0, done.stderr
    trained = {r["query"] for name in ("train", "valid") for r in rows(tmp_path/"run"/f"{name}.jsonl")}
    assert held_out
    assert held_out <= trained
    assert not (tmp_path/"run"/"test.jsonl").exists()


def test_a_dollar_in_a_label(tmp_path, launch):
    "It begins no formula in a figure."
    lines = [{"query": f"what is {i}", "pos": [f"the answer number {i} is {i * 7919}"],
              "domain": ["$x", "a$b$", r"$\frac$"][i % 3]} for i in range(30)]
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    done = launch("prepare", "-p", "data", "rows.jsonl", "-p", "fill_language", "false", "-p", "near", "0",
                  "-p", "targets", '{domain: {"$x": 0.5}}', "--out", "run", "--no-progress")
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"run"/"balance.png").is_file()


def test_the_islamic_targets_are_met_with_queries_by_rules(tmp_path, launch):
    "Half Arabic, a fifth conceptual, a quarter from the Quran: the parameter file, with fewer rows of each source."
    done = launch("prepare", "-f", "prepare_islamic", "-p", "max_rows", "1500", "-p", "total", "400", "-p", "near", "0",
                  "-p", "test", "0", "-p", "fill_language", "false", "--out", "run", "--no-progress")
    assert done.returncode == 0, done.stderr
    train = rows(tmp_path/"run"/"train.jsonl")
    share = lambda column, value: sum(r[column] == value for r in train) / len(train)
    assert len(train) == 400
    assert (share("language", "ar"), share("query_type", "conceptual"), share("source", "quran")) == (.5, .2, .25)


def test_queries_for_rows_without_a_corpus_and_for_passages_alone(tmp_path, launch):
    law = str(REPO/"data"/"law_mini.jsonl")
    (tmp_path/"only").mkdir()
    lines = [{"text": f"Người lao động thử việc {i} ngày được hưởng tiền thưởng và lương tháng thứ {i}."}
             for i in range(30)]
    (tmp_path/"only"/"a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for data, types in ((law, "[thematic]"), ("only", "[conceptual, thematic]")):
        done = launch("prepare", "-p", "data", data, "-p", "write_queries", "rules", "-p", "query_options",
                      f"{{types: {types}, max_pos: 40}}", "-p", "near", "0", "--out", f"run_{types[1:4]}",
                      "--no-progress", "-p", "valid", "0", "-p", "labels", "{language: vi}")
        assert done.returncode == 0, done.stderr
        assert "write_queries needs passages" not in done.stderr
        assert any(r["query_type"] == "thematic" for r in rows(tmp_path/f"run_{types[1:4]}"/"train.jsonl"))


def test_a_model_writes_queries_for_a_source(server, tmp_path, launch):
    "The passages of the Quran's rows go to an endpoint, a real HTTP server; what it wrote joins the rows."
    endpoint = {"model": "m", "base_url": server.url, "key_env": "", "price_in": 0, "price_out": 0}
    done = launch("prepare", "-p", "data", "quran", "-p", "max_rows", "12", "-p", "write_queries", "llm", "-p", "near",
                  "0", "-p", "endpoint", json.dumps(endpoint), "-p", "query_options",
                  '{"types": ["question", "keywords"], "language": "ar"}', "-p", "valid", "0", "--out", "run",
                  "--no-progress")
    assert done.returncode == 0, done.stderr
    train = rows(tmp_path/"run"/"train.jsonl")
    asked = {text for text, *_ in server.seen}
    assert asked and asked <= {p for r in train for p in r["pos"]}
    written = {r["query"] for r in train if r["query_type"] in ("question", "keywords")}
    possible = {f"{kind} about {text}" for text in asked for kind in ("question", "keywords")}
    assert len(possible) / 2 < len(written) and written <= possible   # not those that repeat a verse
    assert any(r["query_type"] not in ("question", "keywords") for r in train)      # the source's own rows stay
