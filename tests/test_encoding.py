"""The encoder against the reference, against itself in other company, and when memory or a process is lost."""
import inspect
import os
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from bgem3_nb.encoding import (FAMILIAR, WINDOW, Embeddings, EncoderPool, M3Encoder, check_texts, is_out_of_memory)

WORDS = {
    "vi": "Người lao động làm việc đủ mười hai tháng thì được nghỉ hằng năm hưởng nguyên lương theo "
          "hợp đồng; thuyền trưởng chỉ huy tàu biển.",
    "ar": "إنما الأعمال بالنيات وإنما لكل امرئ ما نوى فمن كانت هجرته إلى الله ورسوله فهجرته إلى "
          "الله ورسوله",
    "en": "An employee who has worked for twelve months is entitled to annual leave with full pay, "
          "unless the contract says otherwise.",
    "zh": "劳动者 连续 工作 一年 以上的， 享受 带薪 年休假。 具体 办法 由 国务院 规定。 用人单位 应当 依法",
    "ru": "Работник имеет право на ежегодный оплачиваемый отпуск продолжительностью двадцать восемь "
          "календарных дней; договор может это изменить.",
    "hi": "कर्मचारी को बारह महीने काम करने के बाद वेतन सहित वार्षिक अवकाश का अधिकार है और अनुबंध "
          "इसे बढ़ा सकता है",
    "ja": "労働者は 六か月間 継続勤務 すると 年次有給休暇 を 取得 できる。 使用者は これを 与え なければ ならない。",
    "de": "Arbeitnehmer haben nach zwölf Monaten Anspruch auf bezahlten Jahresurlaub, sofern der "
          "Vertrag nichts Günstigeres vorsieht.",
    "sw": "Mfanyakazi aliyefanya kazi kwa miezi kumi na miwili ana haki ya likizo ya mwaka yenye "
          "malipo kamili kulingana na mkataba.",
}


@pytest.fixture(scope="module")
def encoder():
    return M3Encoder.from_pretrained("embedded", new_heads="identity", dtype=torch.float32, progress=False)


def random_texts(encoder, count, seed):
    "Texts in nine languages, of 1 to more than 512 tokens, their words drawn at random."
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 510, 511, 600, *rng.integers(1, 511, count - 5)]
    languages = list(WORDS.values())
    words = lambda i, n: rng.choice(languages[i % 9].split(), max(1, int(n / (1.3 + .7 * rng.random()))))
    return [" ".join(words(i, n)) for i, n in enumerate(lengths)]


def test_equals_the_reference(encoder, tmp_path):
    from FlagEmbedding import BGEM3FlagModel
    encoder.model.save_pretrained(tmp_path)
    flag = BGEM3FlagModel(str(tmp_path), use_fp16=False, devices="cpu", pooling_method="mean")
    texts = random_texts(encoder, 27, seed=3)
    lengths = [len(i) for i in encoder.tokenize(texts)]
    assert min(lengths) <= 4
    assert max(lengths) == 512
    theirs = flag.encode(texts, batch_size=4, max_length=512, return_dense=True, return_sparse=True,
                         return_colbert_vecs=True)
    theirs, ours = Embeddings.from_dict(theirs, encoder.model.encoder.config.vocab_size), encoder.encode(texts)
    assert abs(ours.dense - theirs.dense).max() < 1e-4
    assert (ours.offsets == theirs.offsets).all()
    assert abs(ours.multi - theirs.multi).max() < 1e-4
    assert abs(ours.lexical - theirs.lexical).max() < 1e-4
    assert ours.lexical.nnz == theirs.lexical.nnz


ALPHABET = st.sampled_from([w for text in WORDS.values() for w in text.split()] + ["", " ", "\u0000", "🙂", "x" * 40])


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.lists(ALPHABET, max_size=30).map(" ".join), min_size=1, max_size=6),
       budget=st.integers(1, 300))
def test_the_other_texts_of_a_batch_change_nothing(encoder, texts, budget):
    other = M3Encoder(encoder.model, dtype=torch.float32, batch_tokens=budget, progress=False)
    together = other.encode(texts)
    assert len(together) == len(texts)
    for i, text in enumerate(texts):
        alone = encoder.encode([text])
        assert np.allclose(alone.dense[0], together.dense[i], atol=1e-5)
        assert np.allclose(alone.multi, together.vectors(i), atol=1e-5)
        assert abs(alone.lexical - together.lexical[[i]]).max() < 1e-5


MEMORY = """
import resource, torch
from bgem3_nb.encoding import M3Encoder
class Watched(M3Encoder):
    def run_within_memory(self, batch, work, budget):
        try: return super().run_within_memory(batch, work, budget)
        finally: budgets.append(budget.tokens)
budgets = []
encoder = Watched.from_pretrained("embedded", new_heads="identity", device="cpu", dtype=torch.float32,
                                  batch_tokens=200_000, progress=False)
texts = ["một hai ba bốn năm sáu " * 60 + str(i) for i in range(60)]
small = M3Encoder(encoder.model, device="cpu", dtype=torch.float32, batch_tokens=1024, progress=False).encode(texts)
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + {spare} * 2**20,) * 2)
large = encoder.encode(texts)
assert budgets[-1] < 200_000 == encoder.batch_tokens, (budgets, encoder.batch_tokens)      # of this call alone
assert abs(small.dense - large.dense).max() < 1e-5
print("halved to", budgets[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits on the address space are Linux's")
def test_true_lack_of_memory_halves_the_budget(env):
    # glibc sets 128 MB of addresses aside for each thread that allocates, which is most of what is spare
    one = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", MEMORY.replace("{spare}", "150")], env={**env, **one},
                          capture_output=True, text=True, timeout=600)
    assert "halved to" in done.stdout, done.stderr[-6000:]


def test_other_errors_are_shown_as_they_are(encoder):
    class Broken(torch.nn.Module):
        def forward(self, hidden): raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    whole, encoder.model.multi_head = encoder.model.multi_head, Broken()
    budget = encoder.batch_tokens
    try:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"): encoder.encode(["a", "b"])
    finally: encoder.model.multi_head = whole
    assert encoder.batch_tokens == budget
    assert torch.get_num_threads() >= 1
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))     # oneDNN without memory
    late = "CUDA error: out of memory\nCUDA kernel errors might be reported later"
    assert is_out_of_memory(RuntimeError(late))                               # as a full GPU said it
    assert len(encoder.encode(["a", "b"])) == 2


def same(a, b):
    "Whether two embeddings are equal, bit for bit."
    arrays = lambda e: [e.dense, e.multi, e.offsets, e.lexical.data, e.lexical.indices, e.lexical.indptr]
    return a.lexical.shape == b.lexical.shape and all(map(np.array_equal, arrays(a), arrays(b)))


@pytest.mark.filterwarnings("ignore:.*were truncated")
@pytest.mark.parametrize("packed", [True, False])
def test_threads_get_what_one_thread_gets(encoder, packed):
    "A web server: six threads, three lengths, a model that is in training, and others who use its tokenizer."
    mine = M3Encoder(encoder.model, dtype=torch.float32, progress=False)
    if not packed: mine.packed = None
    sets, lengths = [random_texts(encoder, 6, seed=s)[2:6] for s in range(2)], (12, 24, 40)
    before = torch.get_num_threads()
    wanted = {(i, n): mine.encode(sets[i], max_length=n) for i in range(2) for n in lengths}
    assert len({w.offsets[-1] for w in wanted.values()}) == 3       # every text is longer than all three lengths
    encoder.model.train()
    def client(k):
        for j in range(20 if packed else 6):
            i, n = (j + k) % 2, lengths[k % 3]
            encoder.tokenizer(sets[i], truncation=True, max_length=5, padding=True)
            assert same(mine.encode(sets[i], max_length=n), wanted[i, n]), (k, j)
            assert encoder.model.training, (k, j)
    try:
        with ThreadPoolExecutor(6) as clients: list(clients.map(client, range(6)))
    finally: encoder.model.eval()
    with ThreadPoolExecutor(1) as fresh: other = fresh.submit(torch.get_num_threads).result()
    assert torch.get_num_threads() == other == before


def test_any_sequence_of_texts_at_any_length(encoder, monkeypatch):
    "A window of texts and one more: the second window of a Series or an array was none."
    column = pd.Series(["câu"] * WINDOW + ["khác"], index=range(7, WINDOW + 8))
    whole = encoder.encode(column, outputs=("lexical",)).lexical
    few = encoder.encode(["câu", "câu", "khác"], outputs=("lexical",)).lexical
    assert abs(whole[[0, WINDOW - 1, WINDOW]] - few).max() < 1e-5
    monkeypatch.setattr("bgem3_nb.encoding.WINDOW", 8)
    texts = [f"câu {i}" for i in range(17)]
    wanted, ids = encoder.encode(texts), encoder.tokenize(texts)
    table = pd.DataFrame({"text": texts}, index=range(7, 24))
    for given in (tuple(texts), table["text"], table["text"].astype("string"), np.array(texts),
                  np.array(texts, object), (t for t in texts)):
        assert same(encoder.encode(given), wanted)
    for given in (table["text"], iter(texts)): assert encoder.tokenize(given) == ids
    for given, said in ((table, "not DataFrame"), (np.array([texts]), "not ndarray"), ({"a": "b"}, "not dict"),
                        (b"a", "not bytes"), (3, "not int"),
                        (pd.Series(["a", None]), "text 1 is"),
                        (pd.Series(["a", None], dtype="string"), "text 1 is")):
        with pytest.raises(ValueError, match=said): encoder.encode(given)
    with pytest.raises(ValueError, match=r"write \[text\]"): encoder.tokenize("a")


def test_texts_are_read_once_and_a_list_is_not_copied(encoder):
    "A generator is asked for every text once; a list is used as it is."
    asked = []
    def texts():
        for i in range(3):
            asked.append(i)
            yield f"câu {i}"
    once = texts()
    found = encoder.encode(once, outputs=("dense",))
    assert asked == [0, 1, 2] and next(once, None) is None
    given = ["câu 0", "câu 1", "câu 2"]
    assert check_texts(given) is given
    assert np.array_equal(found.dense, encoder.encode(given, outputs=("dense",)).dense)
    assert given == ["câu 0", "câu 1", "câu 2"]


@pytest.fixture(scope="module")
def sentence_transformer(encoder, tmp_path_factory):
    "The same checkpoint, opened by sentence-transformers."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    path = tmp_path_factory.mktemp("st")
    encoder.model.save_pretrained(path)
    layers = Transformer(str(path), max_seq_length=512), Pooling(384, "mean"), Normalize()
    return SentenceTransformer(modules=layers, device="cpu")


TEXTS = ["Người lao động được nghỉ hằng năm.", "Who commands a ship?", "", "إنما الأعمال بالنيات"]


@pytest.mark.parametrize("arguments", [
    {"convert_to_numpy": True}, {"convert_to_tensor": True}, {"convert_to_tensor": True, "convert_to_numpy": False},
    {"convert_to_numpy": True, "batch_size": 2, "show_progress_bar": False, "normalize_embeddings": True},
    {"convert_to_numpy": True, "prompt": "query: ", "prompt_name": None, "output_value": "sentence_embedding",
     "precision": "float32", "device": None, "truncate_dim": None}])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[0], ""])
def test_encode_gives_what_sentence_transformers_gives(encoder, sentence_transformer, texts, arguments):
    "Type, shape, type of numbers, device and numbers, for one text and for several."
    ours, theirs = encoder.encode(texts, **arguments), sentence_transformer.encode(texts, **arguments)
    assert type(ours) is type(theirs) and ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if isinstance(ours, torch.Tensor): assert ours.device == theirs.device
    assert abs(np.asarray(ours) - np.asarray(theirs)).max() < 1e-5
    if isinstance(texts, str) and arguments == {"convert_to_numpy": True}:      # which is the default for one text
        assert np.array_equal(encoder.encode(texts), ours)


def test_similarity_is_that_of_sentence_transformers(encoder, sentence_transformer):
    rows = encoder.encode(TEXTS, convert_to_numpy=True)
    for a, b in ((rows, rows[:2]), (rows[0], rows), (torch.from_numpy(rows), rows * 3), ([*rows], [*rows[1:]]),
                 (rows[0], rows[1])):
        ours, theirs = encoder.similarity(a, b), sentence_transformer.similarity(a, b)
        assert type(ours) is type(theirs) and ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert abs(ours - theirs).max() < 1e-6
    assert torch.equal(encoder.similarity(encoder.encode(TEXTS), rows), encoder.similarity(rows, rows))


def test_every_argument_of_the_others_is_known(sentence_transformer):
    """What sentence-transformers and FlagEmbedding take is an argument of ours, or refused by our name before anything
    is computed."""
    from FlagEmbedding import BGEM3FlagModel
    ours = inspect.signature(M3Encoder.encode).parameters
    for function in (sentence_transformer.encode, BGEM3FlagModel.encode, BGEM3FlagModel.encode_queries,
                     BGEM3FlagModel.encode_corpus):
        names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        assert [n for n in names if n not in ours and n not in FAMILIAR and n != "self"] == []
    with pytest.raises(TypeError, match="EncoderPool"):
        M3Encoder.from_pretrained("nowhere", devices=["cuda:0", "cuda:1"])


def test_batch_size_is_the_most_texts_of_a_batch(encoder):
    sizes, texts = [], [f"câu {i}" for i in range(50)]
    class Watched(M3Encoder):
        def run_within_memory(self, batch, work, budget):
            sizes.append(len(batch))
            return super().run_within_memory(batch, work, budget)
    mine = Watched(encoder.model, dtype=torch.float32, progress=False)
    found = [mine.encode(texts, batch_size=n, outputs=("dense",)).dense for n in (None, 7, 1)]
    assert sizes == [50] + [7] * 7 + [1] * 51
    for dense in found[1:]: assert abs(dense - found[0]).max() < 1e-5


@pytest.mark.parametrize("wanted,texts", [(True, 3), (None, 3), (False, 80), (None, 80)])
def test_the_progress_bar_is_shown_where_it_is_asked_for(encoder, capsys, wanted, texts):
    mine = M3Encoder(encoder.model, dtype=torch.float32, progress=wanted is not True)
    mine.encode(["câu"] * texts, outputs=("dense",), show_progress_bar=wanted)
    assert ("text/s" in capsys.readouterr().err) == (wanted or wanted is None and texts == 80)


@pytest.mark.parametrize("count,progress", [(1, False), (1, True), (80, False), (80, True)])
def test_truncation_is_said_once(encoder, count, progress, monkeypatch):
    monkeypatch.setattr("bgem3_nb.encoding.WINDOW", 32)       # 80 texts are three windows
    texts = ["một hai ba bốn năm sáu bảy"] + ["ba"] * (count - 1)
    mine = M3Encoder(encoder.model, dtype=torch.float32, max_length=5, progress=progress)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for encode in (mine.encode, mine.encode_passages): encode(texts, prompt="", outputs=("dense",))
        mine.encode(["ba"] * count, outputs=("dense",))        # exactly five tokens or fewer: nothing is lost
    warning = (f"1 of {count:,} texts are longer than 5 tokens and were truncated; "
               "raise max_length as far as the model reads, or split them")
    assert [str(w.message) for w in said] == [warning] * 2
    assert said[0].filename == __file__


def test_a_pool_gives_the_same_and_says_when_a_process_dies(encoder):
    texts = random_texts(encoder, 30, seed=5) * 10    # more than one part
    with EncoderPool(encoder.model, ["cpu", "cpu"], dtype=torch.float32, max_length=16, progress=False) as pool:
        one, two = encoder.encode(texts, max_length=16), pool.encode(texts)
        assert np.allclose(one.dense, two.dense, atol=1e-5)
        assert (one.offsets == two.offsets).all()
        assert abs(one.lexical - two.lexical).max() < 1e-5
        assert len(pool.encode([])) == 0
        alone = pool.encode(texts[0], batch_size=4, convert_to_tensor=True)
        assert alone.shape == (384,) and abs(alone.numpy() - one.dense[0]).max() < 1e-5
        assert pool.similarity(alone, one).shape == (1, 300)
        said = f"{sum(len(i) > 16 for i in encoder.tokenize(texts))} of 300 texts are longer than 16 tokens"
        with pytest.warns(UserWarning, match=said): pool.encode(pd.Series(texts))
        with pytest.raises(ValueError, match="text 1 is int"): pool.encode(["a", 3])
        with pytest.raises(ValueError, match="positions for 3 to 512"):    # raised in the process, shown here
            pool.encode(["a"], max_length=9999)
        victim = next(iter(pool.executor._processes))
        threading.Timer(.3, os.kill, (victim, signal.SIGKILL)).start()
        with pytest.raises(RuntimeError, match="a process of the pool died"):
            for _ in range(200): pool.encode(texts)
    with EncoderPool(encoder.model, ["nowhere:0"], dtype=torch.float32, progress=False) as pool:
        with pytest.raises(RuntimeError, match="nowhere"): pool.encode(["a"])
