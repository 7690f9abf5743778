"""A trimmed model gives the whole one's numbers on covered text, here and in the libraries that open it; a student of
fewer layers comes near its teacher, and its training goes on with the same bits."""
import json

import numpy as np
import pytest
import torch
from conftest import REPO  # noqa: F401
from tiny_run import tiny_model

from bgem3_nb.adapters import restrict_to_texts
from bgem3_nb.encoders import layer_stack
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.layers import DistilTrainer, head_losses, take_layers, unlabelled_texts
from bgem3_nb.model import ExpansionHead, ProjectionHead
from bgem3_nb.projection import M3WithHead
from bgem3_nb.smaller import coverage, trim_vocabulary
from bgem3_nb.text import set_steps
from bgem3_nb.training import M3TrainingArguments

TEXTS = ["Nhân viên được nghỉ mười hai ngày phép mỗi năm.", "nghi\u0309 phép", "", "  hai   dấu cách ",
         "</s> <mask> trong câu", "يا أيها الذين آمنوا", "photosynthesis 2024, 3.14 %"]


@pytest.fixture(scope="module")
def model(): return tiny_model()


def encode(model, texts=TEXTS):
    return M3Encoder(model, max_length=40, dtype=torch.float32, device="cpu", progress=False).encode(texts)


def check_same(a, b, big, small):
    for mode in ("dense", "multi"): np.testing.assert_allclose(getattr(a, mode), getattr(b, mode), atol=1e-6)
    np.testing.assert_array_equal(a.offsets, b.offsets)
    for i in range(len(a)):
        rows = [{e.tokenizer.convert_ids_to_tokens(t): w for t, w in zip(x.lexical[[i]].indices.tolist(),
                                                                         x.lexical[[i]].data.tolist())}
                for e, x in ((big, a), (small, b))]
        assert rows[0] == pytest.approx(rows[1], abs=1e-6)


def test_equal_on_covered_text_in_every_kind_of_model(model):
    narrow = M3WithHead(model, ProjectionHead(16, 8))
    for whole in (model, narrow):
        small = trim_vocabulary(whole, TEXTS, ["vi"])
        assert small.encoder.config.vocab_size < 15_000 and whole.encoder.config.vocab_size == 250_037
        check_same(encode(whole), encode(small), whole, small)
        assert coverage(whole, small, TEXTS) | {"tokens": 0} == {
            "texts": 7, "covered": 7, "tokens": 0, "unknown": 0, "texts_with_unknown": 0}


def test_an_expanding_head_keeps_its_terms(model):
    whole = tiny_model()
    whole.config.lexical, whole.config.lexical_terms = "expansion", 6
    whole.lexical_head = ExpansionHead(16, torch.arange(4, 250_000))
    restrict_to_texts(whole, TEXTS, 40)
    torch.nn.init.normal_(whole.lexical_head.bias)
    small = trim_vocabulary(whole, TEXTS)
    assert len(small.lexical_head.vocabulary) == len(whole.lexical_head.vocabulary)
    check_same(encode(whole), encode(small), whole, small)


def test_unknown_text_is_encoded_and_counted(model):
    small = trim_vocabulary(model, TEXTS, ["en"])
    found = coverage(model, small, ["Кошка спит", "the cat", TEXTS[0]])
    assert found["covered"] == 2 and found["texts_with_unknown"] == 1 and found["unknown"] >= 1
    out = encode(small, ["Кошка спит"])
    assert np.isfinite(out.dense).all() and small.tokenizer.unk_token_id not in out.lexical.indices
    with pytest.raises(ValueError, match="'xx' is not known"): trim_vocabulary(model, TEXTS, ["xx"])


def test_saved_it_opens_everywhere(model, tmp_path):
    "With steps of normalisation, which stay in the tokenizer."
    whole = tiny_model()
    whole.config.normalize = ["arabic_marks", "digits"]
    set_steps(whole.tokenizer, whole.config.normalize)
    texts = [*TEXTS, "عَام ٢٠٢٤"]
    small = trim_vocabulary(whole, texts)
    small.save_pretrained(tmp_path / "small")
    again = M3Encoder.from_pretrained(tmp_path / "small", max_length=40, dtype=torch.float32, device="cpu",
                                      progress=False)
    a = encode(whole, texts)
    check_same(a, again.encode(texts), whole, again.model)
    assert again.model.config.normalize == whole.config.normalize
    plain = [t for t in texts if "</s>" not in t and "nghi\u0309" not in t and t]   # which others read in another way
    wanted = encode(whole, plain)
    import sentence_transformers as st
    there = st.SentenceTransformer(str(tmp_path / "small"), device="cpu").encode(plain)
    np.testing.assert_allclose(there, wanted.dense, atol=1e-5)
    sparse = st.SparseEncoder(str(tmp_path / "small" / "sparse"), device="cpu", trust_remote_code=True)
    mine = again.encode(plain)
    np.testing.assert_allclose(sparse.encode(plain).to_dense().numpy(), mine.lexical.toarray(), atol=1e-5)
    if hasattr(st, "MultiVectorEncoder"):
        multi = st.MultiVectorEncoder(str(tmp_path / "small" / "multi_vector"), device="cpu")
        for i, vectors in enumerate(multi.encode(plain)):
            np.testing.assert_allclose(vectors.numpy(), mine.vectors(i), atol=1e-5)
    flag = pytest.importorskip("FlagEmbedding").BGEM3FlagModel(
        str(tmp_path / "small"), use_fp16=False, devices=["cpu"], pooling_method="mean")
    found = flag.encode(plain, return_dense=True, return_sparse=True, return_colbert_vecs=True, max_length=40)
    np.testing.assert_allclose(found["dense_vecs"], wanted.dense, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([v[:] for v in found["colbert_vecs"]]), wanted.multi, atol=1e-5)
    np.testing.assert_allclose(sorted(w for d in found["lexical_weights"] for w in d.values()),
                               sorted(wanted.lexical.data), atol=1e-5)


LAW = REPO / "data" / "law_mini.jsonl"


def deep(layers=6):
    "A tiny model of several layers, which do something."
    whole = tiny_model()
    config = whole.encoder.config
    config.num_hidden_layers = layers
    torch.manual_seed(1)
    whole.encoder = type(whole.encoder)(config, add_pooling_layer=False)
    for name, p in whole.encoder.named_parameters():
        if "layer" in name and p.ndim > 1: torch.nn.init.normal_(p, std=.2)
    return whole.eval()


def test_layers_that_stay_are_the_teachers():
    whole = deep()
    small = take_layers(whole, [0, 3, 5])
    assert len(layer_stack(whole.encoder)) == 6 and small.encoder.config.num_hidden_layers == 3
    for a, b in zip(layer_stack(small.encoder), (layer_stack(whole.encoder)[i] for i in (0, 3, 5))):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    wrong = {"1 to 5": (6, 0), "rising": ([5, 0], [1, 1]), "from 0 to 5": ([0, 6], [])}
    for said, layers in ((said, layers) for said, of in wrong.items() for layers in of):
        with pytest.raises(ValueError, match=said): take_layers(whole, layers)


def distil(out, student, teacher, stop=0, **more):
    "Nine steps with a checkpoint after every third; `stop` ends the process of training there."
    args = M3TrainingArguments(**dict(
        output_dir=str(out), max_steps=9, per_device_train_batch_size=4, learning_rate=3e-3, save_steps=3,
        passage_length=24, warmup_steps=1, logging_steps=3, report_to="none", disable_tqdm=True, use_cpu=True,
        precision="fp32", seed=5) | more)
    trainer = DistilTrainer(student, teacher, args, unlabelled_texts(str(LAW), teacher.tokenizer, 12))
    if stop:
        from transformers import TrainerCallback
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop: raise KeyboardInterrupt
        trainer.add_callback(Stop())
    return trainer


def test_a_student_learns_all_heads_and_resumes_with_the_same_bits(tmp_path):
    teacher = deep()
    start = {k: v.clone() for k, v in teacher.state_dict().items()}
    whole = distil(tmp_path / "a", take_layers(teacher, 2), teacher)
    whole.train()
    log = [h for h in whole.state.log_history if "loss" in h]
    for mode in ("dense", "lexical", "multi"): assert log[-1][f"loss_{mode}"] < log[0][f"loss_{mode}"]
    assert all(torch.equal(start[k], v) for k, v in teacher.state_dict().items())
    with pytest.raises(KeyboardInterrupt): distil(tmp_path / "b", take_layers(teacher, 2), teacher, stop=7).train()
    again = distil(tmp_path / "b", take_layers(teacher, 2), teacher)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 9
    found = again.model.state_dict()
    assert all(torch.equal(found[k], v) for k, v in whole.model.state_dict().items())
    table = "encoder.embeddings.word_embeddings.weight"
    assert torch.equal(found[table], teacher.state_dict()[table])


def test_targets_of_an_expanding_head(tmp_path):
    whole = deep(3)
    whole.config.lexical, whole.config.lexical_terms = "expansion", 6
    whole.lexical_head = ExpansionHead(16, torch.arange(4, 250_000))
    restrict_to_texts(whole, TEXTS, 40)
    student = take_layers(whole, 1)
    torch.nn.init.normal_(student.lexical_head.bias)
    ids = whole.tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    with torch.no_grad(): a, b = (m(ids["input_ids"], ids["attention_mask"]) for m in (student, whole))
    wide = [torch.zeros(2, 250_037).scatter_(1, o.ids, o.lexical) for o in (a, b)]
    wanted = (wide[0] - wide[1]).square().sum() / wide[1].square().sum()
    assert head_losses(a, b)["lexical"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert head_losses(b, b)["lexical"].item() == 0


def test_texts_of_every_kind(tmp_path, model):
    rows = unlabelled_texts(str(LAW), model.tokenizer, 5)
    assert [len(rows[s]) for s in ("queries", "passages")] == [5, 5]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.jsonl").write_text("".join(LAW.open(encoding="utf-8").readlines()[:3]), encoding="utf-8")
    assert len(unlabelled_texts(str(tmp_path / "run"), model.tokenizer)["queries"]) == 3
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Nghỉ phép\n\nMười hai ngày mỗi năm.\n", encoding="utf-8")
    assert "Mười hai" in unlabelled_texts(str(tmp_path / "docs"), model.tokenizer)["passages"][0]
    (tmp_path / "bad.jsonl").write_text('{"id": "1", "text": 3}\n', encoding="utf-8")
    for source, said in ((str(tmp_path / "bad.jsonl"), "bad.jsonl.*line 1"), ("lawquerry", "no source")):
        with pytest.raises(ValueError, match=said): unlabelled_texts(source, model.tokenizer)


def test_the_job_in_a_chain(tmp_path, launch):
    "A dry run writes no model; then a chain distils and judges the student; a finished step is not run again."
    deep(4).save_pretrained(tmp_path / "teacher")
    few = [{"data": str(LAW), "max_queries": 3, "max_passages": 8}]
    step = {"job": "distil", "source": str(LAW), "model": "teacher", "max_rows": 12, "sets": few, "panel": [],
            "layers": 2, "steps": 3, "batch_size": 4, "lexical_warm_up": 2, "passage_length": 24, "search_length": 24}
    judge = {"job": "evaluate", "models": ["$distil"], "sets": few, "modes": ["dense"], "search_length": 24,
             "max_rows": 3}
    (tmp_path / "chain.yaml").write_text(json.dumps({"steps": [step, judge]}))
    def distil_job(out, **changed):
        values = {k: v for k, v in step.items() if k != "job"} | changed
        said = [x for k, v in values.items() for x in ("-p", k, v if isinstance(v, str) else json.dumps(v))]
        return launch("distil", *said, "--out", out, "--no-progress")
    dry = distil_job("dry", dry_run=True)
    assert dry.returncode == 0 and "minutes to train" in dry.stdout, dry.stderr[-2000:]
    assert not (tmp_path / "dry" / "model").exists()
    wrong = distil_job("wrong", layers=9)
    assert wrong.returncode == 1 and "layers is 9" in wrong.stderr and "Traceback" not in wrong.stderr
    done = launch("run", "chain.yaml", "--out", "run", "--no-progress")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "run" / "distil" / "metrics.json").read_text(encoding="utf-8"))
    assert len(found["costs"]) == 5 and all(len(of) == 4 for by in found["nDCG@10"].values() for of in by.values())
    small = M3Encoder.from_pretrained(tmp_path / "run" / "distil" / "model", progress=False)
    assert small.model.encoder.config.num_hidden_layers == 2 and small.model.encoder.config.vocab_size < 40_000
    assert "done before" in launch("run", "chain.yaml", "--out", "run", "--no-progress").stderr
