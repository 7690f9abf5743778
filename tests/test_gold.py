"""The gold sets: every answer exists, no question is there twice or copied from its answer, labels are right, and what
the rental searches accept is computed anew."""
import importlib.util
import json
import re
from collections import Counter

import pytest

from bgem3_nb.evaluation import ARABIC_LETTERS, ARABIC_SIGNS
from bgem3_nb.text import fold
from conftest import REPO

GOLD = REPO / "data" / "gold"
SETS = ("quran", "hadith", "law", "company", "rental")
DIFFICULTIES = {"easy", "medium", "hard"}
ARABIC = re.compile("[\u0621-\u064a]")
VIETNAMESE = re.compile("[ăâđêôơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ]", re.I)


def script(name):
    "A script of data/gold as a module."
    spec = importlib.util.spec_from_file_location(name, GOLD / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(name): return [json.loads(line) for line in (GOLD / name).read_text(encoding="utf-8").splitlines()]


def plain(text):
    "The words of a text between blanks, without vowel signs, punctuation and spelling variants of Arabic letters."
    text = ARABIC_SIGNS.sub("", fold(text)).translate(ARABIC_LETTERS).casefold()
    return " ".join(["", *re.findall(r"\w+", text), ""])


@pytest.fixture(scope="module")
def corpora():
    "The corpus of each set, id to text, read once."
    measure, read = script("measure"), {}

    def corpus(name):
        if name not in read:
            try: read[name] = measure.corpus(name)
            except ImportError as e: pytest.skip(str(e))
        return read[name]
    return corpus


def of_category(name): return Counter(q["category"] for q in lines(f"{name}.jsonl"))


def test_there_are_as_many_questions_as_promised():
    quran, hadith, law = map(of_category, ("quran", "hadith", "law"))
    assert (quran + hadith).total() >= 80
    for category in ("exact_quotation", "partial_quotation", "theme", "indirect_wording", "english_to_arabic"):
        assert (quran + hadith)[category] >= 10, category
    assert law["everyday"] >= 60 and law["document_number"] >= 10 and law["article_number"] >= 10
    assert of_category("company").total() >= 16 and of_category("rental").total() >= 100


@pytest.mark.parametrize("name", SETS)
def test_records_are_complete(name):
    keys = {"query", "relevant", "category", "language", "difficulty", "query_type"}
    for q in lines(f"{name}.jsonl"):
        assert q.keys() - {"accept"} == keys and ("accept" in q) == (name == "rental"), q
        assert all(isinstance(q[k], str) and q[k] == q[k].strip() != "" for k in keys - {"relevant"}), q
        assert q["difficulty"] in DIFFICULTIES and q["query"] == fold(q["query"]), q


@pytest.mark.parametrize("name", SETS)
def test_no_question_is_there_twice(name):
    times = Counter(plain(q["query"]) for q in lines(f"{name}.jsonl"))
    assert [q for q, n in times.items() if n > 1] == []


@pytest.mark.parametrize("name", SETS)
def test_every_answer_exists_and_so_do_its_twins(name, corpora):
    passages = corpora(name)
    twins = {}
    for id, text in passages.items(): twins.setdefault(fold(text), set()).add(id)
    for q in lines(f"{name}.jsonl"):
        assert q["relevant"] and len(set(q["relevant"])) == len(q["relevant"]), q
        assert set(q["relevant"]) <= passages.keys(), (q["query"], set(q["relevant"]) - passages.keys())
        if isinstance(q["relevant"], dict):
            assert set(q["relevant"].values()) <= {1, 2} and 2 in q["relevant"].values(), q
        for id in q["relevant"]:
            unmarked = twins[fold(passages[id])] - set(q["relevant"])
            assert not unmarked, (q["query"], unmarked, "has the text of a passage that is marked")


@pytest.mark.parametrize("name", SETS)
def test_languages_are_what_they_are_called(name):
    for q in lines(f"{name}.jsonl"):
        arabic, vietnamese = ARABIC.search(q["query"]), VIETNAMESE.search(q["query"])
        if q["language"] == "ar": assert arabic and not re.search("[A-Za-z]", q["query"]), q
        elif q["language"] == "en": assert q["query"].isascii() and q["category"] == "english_to_arabic", q
        else:
            assert q["language"] == "vi" and not arabic and name in ("law", "company", "rental"), q
            without = q["category"] == "no_diacritics"
            assert not (without and vietnamese), q
            assert vietnamese or without or name == "rental" or q["query_type"] == "number", q
        assert (q["language"] == "vi") == (name in ("law", "company", "rental")), q


@pytest.mark.parametrize("name", SETS)
def test_only_quotations_are_copied(name, corpora):
    passages = corpora(name)
    texts = {plain(text) for text in passages.values()}
    for q in lines(f"{name}.jsonl"):
        query = plain(q["query"])
        answers = [plain(passages[id]) for id in q["relevant"] if name == "rental" or q["relevant"][id] == 2]
        if q["category"] == "exact_quotation": assert query in answers, q
        elif q["category"] == "partial_quotation": assert query not in texts and any(query in a for a in answers), q
        else: assert query not in texts and not any(query in a for a in answers), q


def test_rental_answers_follow_from_the_conditions():
    rental = script("rental")
    texts = rental.listings()
    assert [(r["_id"], r["text"]) for r in lines("rental_corpus.jsonl")] == list(texts.items())
    corpus = {id: rental.fields(text) for id, text in texts.items()}
    known = set().union(*corpus.values())
    for q in lines("rental.jsonl"):
        assert {re.sub("_(min|max)$", "", k) for k in q["accept"]} <= known and "place" in q["accept"], q
        assert len(q["accept"]) >= 2 and q["relevant"] == rental.relevant(q["accept"], corpus), q
        assert len(q["relevant"]) <= 12, q


def test_rental_fields_are_read_from_every_form_of_a_listing():
    rental = script("rental")
    texts = ("Studio 32m² Quận 7, giá 5.5tr, wc chung, tầng 3, gần chợ",
             "Cho thuê studio Quận 7, 32m², tầng 3, giá 5tr5, wc chung",
             "Quận 7: studio rộng 32m², wc chung, giá 5,5 triệu, tầng 3")
    for text in texts:
        found = rental.fields(text)
        assert found | {"near": ""} == {"kind": "studio", "place": "Quận 7", "area": 32, "price": 5.5,
                                        "wc riêng": False, "floor": 3, "near": ""}
        assert rental.accepts({"place": ["Quận 1", "Quận 7"], "price_max": 5.5, "floor": 3, "wc riêng": False}, found)
        for amiss in ({"price_max": 5.4}, {"price_min": 5.6}, {"wc riêng": True}, {"máy lạnh": True},
                      {"máy lạnh": False}, {"place": "Quận 1"}):
            assert not rental.accepts(amiss, found), amiss
    with pytest.raises(ValueError, match="hồ bơi"): rental.fields("Studio 32m² Quận 7, hồ bơi, giá 5tr")


def test_the_page_counts_what_is_there():
    page = (GOLD / "README.md").read_text(encoding="utf-8")
    for name in SETS:
        n = len(lines(f"{name}.jsonl"))
        assert re.search(rf"^\| `{name}\.jsonl` \| {n} \|", page, re.M), (name, n)
        for category, n in of_category(name).items():
            assert re.search(rf"^\| {name} \| {category} \| {n} \|", page, re.M), (name, category, n)
