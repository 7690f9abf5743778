"Documents from real files: PDF, Word, HTML, Markdown; files that cannot be read; chunks under edits; the company set."
import importlib.util
import json
import random
import sys
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from docx import Document as WordFile
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls
from fpdf import FPDF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from bgem3_nb.backbone import TextTokenizer, embedded_path
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.documents import (
    Document, DocumentError, Heading, chunk_document, count_tokens, read_chunks, split_span,
    read_document, read_documents, write_chunks)
from bgem3_nb.text import arabic_key, clean_text, text_key

REPO = Path(__file__).parent.parent
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
W = nsdecls("w")


class Pdf(FPDF):
    "Pages with a header and a footer, in a font with Vietnamese letters."
    def __init__(self, head="", foot=""):
        super().__init__(format=(148, 210))
        self.head, self.foot = head, foot
        for style, name in (("", "DejaVuSans.ttf"), ("B", "DejaVuSans-Bold.ttf")):
            self.add_font("DejaVu", style, FONTS / name)
        self.set_font("DejaVu", size=10)

    def header(self):
        if self.head: self.line_of(self.head.format(n=self.page_no()), 8)

    def footer(self):
        if self.foot:
            self.set_y(-12)
            self.line_of(self.foot.format(n=self.page_no()), 8)

    def line_of(self, text, size=10, style=""):
        self.set_font("DejaVu", style, size)
        self.multi_cell(0, 6, text, align="L", new_x="LMARGIN", new_y="NEXT")
        self.set_font("DejaVu", size=10)

    def save(self, path):
        self.output(str(path))
        return path


@pytest.fixture(scope="module")
def tokenizer(): return AutoTokenizer.from_pretrained(embedded_path(progress=False))


def prose(n, seed=0):
    "`n` sentences of different lengths."
    r, words = random.Random(seed), "một hai ba bốn năm sáu bảy tám chín mười nghỉ phép máy tính lương thưởng".split()
    return [" ".join(r.choice(words) for _ in range(r.randint(5, 30))).capitalize() + "." for _ in range(n)]


# ---- PDF

def test_pdf_headers_numbers_hyphens_and_headings(tmp_path):
    pdf = Pdf("ACME | Quy chế 2026", "Trang {n} trên 4")
    for n in range(1, 5):
        pdf.add_page()
        pdf.line_of(f"Điều {n}. Nghỉ loại {n}", 14, "B")
        pdf.line_of(prose(1, seed=9*n)[0] + " Nhân viên được nghỉ theo quy định này và phải gửi đơn bằng e-mail trước "
                                            "khi nghỉ, kèm thông tin bàn giao công vi-\nệc; người duyệt trả lời bằng "
                                            "e-\nmail trong hai ngày. " + prose(1, seed=n)[0])
    doc = read_document(pdf.save(tmp_path / "a.pdf"))
    assert [h.text for h in doc.headings] == [f"Điều {n}. Nghỉ loại {n}" for n in range(1, 5)]
    assert "ACME" not in doc.text and "Trang" not in doc.text
    assert any("ACME | Quy chế 2026" in note and "4 times" in note for note in doc.notes)
    assert doc.text.count("công việc; người duyệt trả lời bằng e-mail trong hai ngày.") == 4
    assert [doc.page(h.start) for h in doc.headings] == [1, 2, 3, 4] and len(doc.pages) == 4


def test_pdf_of_two_pages_keeps_lines_that_repeat(tmp_path):
    pdf = Pdf()
    for _ in range(2):
        pdf.add_page()
        pdf.line_of("Câu này đứng ở cả hai trang.")
    assert read_document(pdf.save(tmp_path / "a.pdf")).text.count("Câu này") == 2


def test_pdf_forms_keep_what_repeats_in_the_middle_of_the_page(tmp_path):
    pdf = Pdf("Mẫu 07 | tờ {n}")
    for name in ("An", "Bình", "Chi", "Dung"):
        pdf.add_page()
        pdf.set_y(60)
        pdf.line_of(f"Họ tên: {name}")
        pdf.line_of("Tôi cam kết giữ bí mật thông tin của công ty.")
        pdf.line_of("Ký tên")
    doc = read_document(pdf.save(tmp_path / "a.pdf"))
    assert doc.text.count("Tôi cam kết") == doc.text.count("Ký tên") == 4 and "Mẫu" not in doc.text
    assert doc.notes == ["page header or footer left out, 4 times: Mẫu 07 | tờ 1"]


def test_pdf_items_stay_apart_and_wrapped_lines_come_together(tmp_path):
    pdf = Pdf()
    pdf.add_page()
    long = ("Tiền lương được trả vào ngày cuối cùng của mỗi "
            "tháng và nếu ngày đó là ngày nghỉ thì được trả "
            "vào ngày làm việc liền trước, trừ khi hai bên "
            "có thỏa thuận khác bằng văn bản.")
    for text in (long, "a) lương tháng;", "b) tiền thưởng;", "1. Mục một", "- gạch đầu dòng"): pdf.line_of(text)
    lines = read_document(pdf.save(tmp_path / "a.pdf")).text.split("\n")
    assert lines == [long, "a) lương tháng;", "b) tiền thưởng;", "1. Mục một", "- gạch đầu dòng"]


def test_pdf_without_text_on_one_page_is_read_and_says_so(tmp_path):
    pdf = Pdf()
    pdf.add_page()
    pdf.line_of("Chữ")
    pdf.add_page()
    pdf.image(Image.new("RGB", (50, 50), "white"), w=50)
    pdf.add_page()
    pdf.line_of("Cuối")
    doc = read_document(pdf.save(tmp_path / "a.pdf"))
    assert doc.notes == ["no text on page 2"] and doc.page(doc.text.index("Cuối")) == 3


@pytest.mark.parametrize("method", ["NO_ENCRYPTION", "RC4", "AES_128", "AES_256"])
def test_pdf_with_passwords(tmp_path, method):
    from fpdf.enums import EncryptionMethod
    for name, password in (("open.pdf", ""), ("locked.pdf", "secret")):
        pdf = Pdf()
        pdf.add_page()
        pdf.line_of("Nội dung mật")
        pdf.set_encryption("owner", password, encryption_method=EncryptionMethod[method])
        pdf.save(tmp_path / name)
    assert read_document(tmp_path / "open.pdf").text == "Nội dung mật"          # only printing is restricted
    if method == "NO_ENCRYPTION":
        assert read_document(tmp_path / "locked.pdf").text == "Nội dung mật"
        return     # it has a password, and nothing is encrypted with it
    with pytest.raises(DocumentError, match="encrypted.*password.*save a copy without"):
        read_document(tmp_path / "locked.pdf")


# ---- Word

def test_word_keeps_what_a_reader_sees(tmp_path):
    word = WordFile()
    word.sections[0].header.paragraphs[0].text = "Đầu trang"
    word.add_paragraph("Sổ tay", style="Title")
    word.add_heading("Chương I", 1)
    word.add_heading("Mục 1", 2)
    p = word.add_paragraph("Nghỉ ")
    p._p.append(parse_xml(f'<w:ins {W} w:id="1" w:author="a"><w:r><w:t>phép</w:t></w:r></w:ins>'))
    p._p.append(parse_xml(f'<w:del {W} w:id="2" w:author="a"><w:r><w:delText>không lương</w:delText></w:r></w:del>'))
    word.element.body.insert(-1, parse_xml(f"<w:sdt {W}><w:sdtContent><w:p><w:r><w:t>Trong ô</w:t><w:br/><w:t>hai "
                                           f"dòng</w:t></w:r></w:p></w:sdtContent></w:sdt>"))
    table = word.add_table(2, 2)
    for i, text in enumerate(("Năm", "Ngày", "5", "13")): table.cell(i // 2, i % 2).text = text
    box = (f'<w:r {W} '
           f'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"><mc:AlternateContent><mc:Choice '
           f'Requires="wps"><w:p><w:r><w:t> (khung)</w:t></w:r></w:p></mc:Choice><mc:Fallback><w:p><w:r><w:t> '
           f'(khung)</w:t></w:r></w:p></mc:Fallback></mc:AlternateContent></w:r>')
    p._p.append(parse_xml(box))                                              # a text box is written twice in the file
    word.add_paragraph("một", style="List Bullet")
    word.add_paragraph("hai", style="List Bullet")
    word.save(tmp_path / "a.docx")
    doc = read_document(tmp_path / "a.docx")
    assert doc.text == ("Sổ tay\n\nChương I\n\nMục 1\n\nNghỉ phép (khung)\n\nTrong ô\nhai dòng\n\n"
                        "Năm | Ngày\n5 | 13\nmột\nhai")
    assert doc.title == "Sổ tay" and doc.path(len(doc.text) - 1) == ["Chương I", "Mục 1"]


def test_word_with_a_password_is_named(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
    with pytest.raises(DocumentError, match="encrypted, or an old .doc"): read_document(tmp_path / "a.docx")


# ---- HTML, Markdown, text

def test_html_in_the_encoding_it_declares(tmp_path):
    page = '<html><head><meta charset="windows-1252"></head><body><h1>Café</h1>naïve</body></html>'
    (tmp_path / "a.html").write_bytes(page.encode("cp1252"))
    assert read_document(tmp_path / "a.html").text == "Café\n\nnaïve"
    (tmp_path / "b.html").write_bytes(page.replace("windows-1252", "utf-8").encode("cp1252"))
    with pytest.raises(DocumentError, match="encoding it declares, utf-8"): read_document(tmp_path / "b.html")


def test_markdown_front_matter_goes_through_to_chunks(tmp_path, tokenizer):
    (tmp_path / "a.md").write_text("---\nid: HR-7\ntitle: Quy định\ndate: 2026-01-02\ntags: [x]\n---\n# Khác\n\n| a | "
                                   "b |\n|---|---|\n| 1 | 2 |\n\n3. ba\n4. bốn\n", encoding="utf-8")
    doc = read_documents(tmp_path, {"*.md": {"access_level": "public", "tags": ["y"]}}, progress=False).documents[0]
    assert (doc.id, doc.title) == ("HR-7", "Quy định") and doc.text == "Khác\n\na | b\n1 | 2\n3. ba\n4. bốn"
    assert chunk_document(doc, tokenizer)[0].metadata == {"date": "2026-01-02", "tags": ["y"], "access_level": "public"}


@pytest.mark.parametrize("name, content, reason", [
    ("a.md", b"---\nx: [1\n---\n",
     "line .*front matter is not YAML"), ("a.md", b"---\n- 1\n---\nx", "must be lines of"),
    ("a.md", b"---\ntitle: x\n---\n",
     "no text"), ("a.txt", b"ok\nc\xf4ng", "line 2.*UTF-8"), ("a.txt", b" \n", "no text"), ("a.txt", b"", "0 bytes"),
    ("a.html", b"<nav>x</nav>", "no text"), ("a.pdf", b"%PDF-1.4\n", "damaged"), ("a.pdf", b"hello", "damaged"), (
        "a.docx", b"PK\x03\x04", "damaged"),
    ("a.doc", b"x", "unknown format '.doc'"), ("b.DOC", b"x", "save it as .docx"), ("a", b"x", "unknown format ''")])
def test_what_cannot_be_read_says_why(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=reason): read_document(tmp_path / name)
    reading = read_documents(tmp_path, progress=False)
    assert not reading.documents and list(reading.skipped) == [name] and str(tmp_path) not in reading.skipped[name]


def test_image_only_and_blank_pdfs_are_told_apart(tmp_path):
    scan = Pdf()
    scan.add_page()
    scan.image(Image.new("RGB", (50, 50), "white"), w=50)
    scan.save(tmp_path / "scan.pdf")
    blank = Pdf()
    blank.add_page()
    blank.save(tmp_path / "blank.pdf")
    skipped = read_documents(tmp_path, progress=False).skipped
    assert "image-only: no text, 1 pictures on 1 pages" in skipped["scan.pdf"] and "OCR" in skipped["scan.pdf"]
    assert skipped["blank.pdf"] == "empty: no text on its 1 pages"


def test_a_missing_parser_names_the_extra(tmp_path, monkeypatch):
    for name, module in (("a.pdf", "pypdfium2"), ("a.docx", "docx"), ("a.html", "lxml.html"), ("a.md", "markdown_it")):
        (tmp_path / name).write_bytes(b"x")
        with monkeypatch.context() as m:
            m.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=r"bgem3_nb\[documents\]"):
                read_documents(tmp_path / name, progress=False)


def test_a_folder_adds_up(tmp_path):
    for name in ("b/2.md", "a.md", "b/.hidden.md", ".git/x.md", "b/~$lock.docx", "c.xyz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    reading = read_documents(tmp_path, progress=False)
    assert [d.id for d in reading.documents] == ["a.md", "b/2.md"] and list(reading.skipped) == ["c.xyz"]
    report = reading.report([])
    assert report["files"] == report["read"] + len(report["skipped"]) == 3
    (tmp_path / "a.md").write_text("---\nid: b/2.md\n---\nx")
    with pytest.raises(ValueError, match="two documents have the id 'b/2.md'"): read_documents(tmp_path, progress=False)
    with pytest.raises(ValueError, match="no file fits the pattern 'hr/"):
        read_documents(tmp_path, {"hr/*": {}}, progress=False)


# ---- text and keys

@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("أإآٱةىیﻻـّٰ \n\u00ad\u0301\ufb01e\u0323"))))
def test_cleaning_and_keys_are_stable(text):
    clean = clean_text(text)
    assert clean_text(clean) == clean
    assert text_key(text_key(text)) == text_key(text) and arabic_key(arabic_key(text)) == arabic_key(text)


def test_key_sees_through_vowels_but_not_through_letters():
    assert arabic_key("قَالَ رَسُولُ ٱللَّهِ ﷺ") == arabic_key("قال رسول الله ﷺ")
    assert arabic_key("بِسْمِ اللَّهِ") != arabic_key("بسم الرحمن") and text_key("ma") != text_key("má")


# ---- chunks

@pytest.mark.parametrize("seed", range(3))
def test_chunks_cover_the_text_within_their_sizes(tokenizer, seed):
    text, headings = "", []
    for i, sentence in enumerate(prose(150, seed)):
        if i % 17 == 5:
            headings.append(Heading(len(text) + 2, 1 + i % 2, f"Mục {i}"))
            text += f"\n\nMục {i}"
        text += ("\n\n" if i % 4 == 0 or i % 17 == 5 else " ") * bool(text) + sentence
    doc = Document("d", "d", text, headings)
    chunks = chunk_document(doc, tokenizer)
    assert all(200 <= c.tokens <= 500 and c.text == text[c.start:c.end] for c in chunks)
    assert [c.tokens for c in chunks] == [len(tokenizer(c.text, add_special_tokens=False)["input_ids"]) for c in chunks]
    covered = set().union(*(range(c.start, c.end) for c in chunks))
    assert all(i in covered for i, c in enumerate(text) if not c.isspace())
    assert len({c.id for c in chunks}) == len(chunks) and [
        c.id for c in chunk_document(doc, tokenizer)] == [c.id for c in chunks]
    begins = [c.start in {h.start for h in headings} for c in chunks[1:]]
    assert sum(begins) >= len(begins) / 2                                    # most begin at a heading
    overlaps = [a.end - b.start for a, b in zip(chunks, chunks[1:])]
    assert all((o <= 0) == fresh or o <= 0 for o, fresh in zip(overlaps, begins))


def test_tokens_are_counted_as_the_encoder_reads_them(tokenizer):
    reader, texts = TextTokenizer(tokenizer), ["a <pad> b </s> c",
                                               unicodedata.normalize("NFD", "Điều thứ bảy mươi tám, nghỉ phép năm.")]
    for text in texts:
        assert count_tokens([text], tokenizer) == [len(reader([text])[0][0]) - 2]
        parts = split_span(text, (0, len(text)), tokenizer, 4)
        assert len(parts) > 1 and "".join(text[a:b] for a, b in parts).replace(" ", "") == text.replace(" ", "")
        assert max(count_tokens([text[a:b] for a, b in parts], tokenizer)) <= 4
    assert count_tokens(["<pad>"], tokenizer)[0] > 1


def test_an_edit_changes_nearby_ids_only(tokenizer):
    sentences = prose(500)
    ids = lambda parts: [c.id for c in chunk_document(Document("d", "d", " ".join(parts)), tokenizer)]
    old = ids(sentences)
    for at in (0, 250, 499):
        for new in (ids([*sentences[:at], "Thêm một câu mới.", *sentences[at:]]),
                    ids([*sentences[:at], *sentences[at + 1:]])):
            lost = [i for i, id in enumerate(old) if id not in new]
            assert 1 <= len(lost) <= 5 and lost[-1] - lost[0] < 5 and abs(lost[0] - at*len(old)/500) < 5


def test_ids_belong_to_the_document_and_repeated_text_has_its_own(tokenizer):
    same = " ".join(prose(12))                                               # one chunk each time
    doc = Document("a", "a", "\n\n".join(["Đầu", same, "Đầu", same]),
                   [Heading(0, 1, "Đầu"), Heading(len(same) + 7, 1, "Đầu")])
    ids = [c.id for c in chunk_document(doc, tokenizer, max_tokens=450)]
    assert len(ids) == 2 and ids[1] == ids[0] + "-2"
    assert not set(ids) & {
        c.id for c in chunk_document(Document("b", "b", doc.text, doc.headings), tokenizer, max_tokens=450)}


@pytest.mark.parametrize("text", ["từ " * 3000, "好" * 3000, "x" * 9000, "a.b;" * 2000],
                         ids=["words", "chinese", "letters", "marks"])
def test_a_sentence_without_end_is_cut_too(tokenizer, text):
    chunks = chunk_document(Document("d", "d", text), tokenizer)
    assert all(c.tokens <= 520 for c in chunks) and len(chunks) > 3          # a cut inside a word can add a token
    assert "".join(c.text[max(0, p.end - c.start if p else 0):]
                   for p, c in zip([None, *chunks], chunks)).replace(" ", "") == text.replace(" ", "")


def test_chunks_survive_a_file(tmp_path, tokenizer):
    chunks = chunk_document(Document("d", "t", " ".join(prose(60)), pages=[0, 500], metadata={"tags": ["x"]}),
                            tokenizer)
    write_chunks(chunks, tmp_path / "c.jsonl")
    assert read_chunks(tmp_path / "c.jsonl") == chunks and [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]
    (tmp_path / "c.jsonl").write_text('\n{"id": "x"}\n')
    with pytest.raises(ValueError, match="c.jsonl, line 2: not a chunk"): read_chunks(tmp_path / "c.jsonl")


# ---- the company set

def rows(name):
    return [json.loads(line) for line in (REPO / "data/company" / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def build():
    spec = importlib.util.spec_from_file_location("build", REPO / "data/company/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_company_set_is_what_build_makes(build, tokenizer, monkeypatch):
    monkeypatch.setattr(build, "tokenizer", lambda: tokenizer)
    # only negatives depend on them
    monkeypatch.setattr(build, "scores", lambda queries, chunks: np.zeros((len(queries), len(chunks)), np.float32))
    files = build.build()
    assert files["document_metadata.json"] == json.loads((REPO / "data/company/document_metadata.json").read_text(
        encoding="utf-8"))
    for name in ("positive_pairs.jsonl", "eval_pairs.jsonl"): assert files[name] == rows(name)
    assert files["hard_negatives.jsonl"] == []


def test_company_negatives_have_real_scores():
    some, encoder = rows("hard_negatives.jsonl")[::30], M3Encoder.from_pretrained(
        "embedded", new_heads="identity", progress=False)
    q = encoder.encode_queries([r["query"] for r in some], outputs=("dense",)).dense
    positive, negative = (encoder.encode_passages([r[name] for r in some], outputs=("dense",)).dense
                          for name in ("positive", "hard_negative"))
    assert np.allclose((q*negative).sum(1), [r["negative_score"] for r in some], atol=.003)
    assert ((q*negative).sum(1) < (q*positive).sum(1) + 1e-4).all()


def test_company_set_hangs_together():
    pairs, negatives, evaluation = (rows(n)
                                    for n in ("positive_pairs.jsonl", "hard_negatives.jsonl", "eval_pairs.jsonl"))
    documents = json.loads((REPO / "data/company/document_metadata.json").read_text(encoding="utf-8"))["documents"]
    chunks = {c["chunk_id"]: c["text"] for d in documents for c in d["chunks"]}
    assert len(chunks) >= 40
    assert len(pairs) >= 120
    assert len(evaluation) >= 40
    assert .5*len(pairs) < len(negatives) < len(pairs)
    assert {tuple(r) for r in pairs} == {("query", "positive", "query_type", "domain")}
    assert {tuple(r) for r in negatives} == {("query", "positive", "hard_negative", "negative_score")} and {
        tuple(r) for r in evaluation} == {("query", "positive", "chunk_id")}
    assert all({"department", "access_level", "document_type", "tags", "chunks"} <= set(d) for d in documents)
    assert all(chunks[r["chunk_id"]] == r["positive"]
               for r in evaluation) and {r["positive"] for r in pairs} == set(chunks.values())
    assert all(r["hard_negative"] in chunks.values() and r["hard_negative"] != r["positive"] for r in negatives)
    assert not {r["query"] for r in pairs} & {
        r["query"] for r in evaluation} and {r["query"] for r in negatives} < {r["query"] for r in pairs}


def test_a_law_with_the_icelandic_letter_has_its_headings(tmp_path):
    (tmp_path/"a.txt").write_text("\u00d0iều 1. Phạm vi\n1. Khoản một.\n\n\u00d0iều 2. Tên\nNội dung.\n",
                                  encoding="utf-8")
    doc = read_document(tmp_path/"a.txt")
    assert [h.text for h in doc.headings] == ["\u00d0iều 1. Phạm vi", "\u00d0iều 2. Tên"]
    assert [c.text for c in doc.clauses] == ["Khoản 1"]
