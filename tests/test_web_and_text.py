"""Pages, Markdown, text and PDF as they come: odd encodings, deep elements, Vietnamese of before Unicode, files made
to do harm."""
import io
import json
import shutil
import subprocess
import unicodedata
import zipfile
from contextlib import suppress
from pathlib import Path
from time import process_time

import pytest
from conftest import processor_seconds
from docx import Document as WordFile
from fpdf import FPDF

from bgem3_nb import documents as d
from bgem3_nb.checks import check_rows
from bgem3_nb.documents import (DocumentError, Line, goes_on, html_blocks, join_lines, legacy_encoding, pdf_blocks,
                                read_document, read_documents, running_lines, to_unicode)
from bgem3_nb.rows import make_rows

REPO = Path(__file__).parent.parent
LAW = "Luật Lao động quy định người lao động được nghỉ phép năm mười hai ngày."
OLD = {"TCVN3": "LuËt Lao ®éng quy ®Þnh ng\u00adêi lao ®éng ®\u00adîc nghØ phÐp n¨m m\u00adêi hai ngµy.",
       "VNI": "Luaät Lao ñoäng quy ñònh ngöôøi lao ñoäng ñöôïc nghæ pheùp naêm möôøi hai ngaøy."}


def read(path, content):
    "The document of a file with this content."
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_document(path)


def lines(html): return [(b.text, b.level) for b in html_blocks(html)[0]]


# ---- pages: what is kept

def test_a_form_and_a_button_are_text(tmp_path):
    page = ("<form id=aspnetForm><h1>Điều 1</h1><p>Đoạn "
            "một.</p><select><option>Hà "
            "Nội</select></form><h2><button>Câu "
            "hỏi</button></h2><p>Đáp<button>Chép</button>án")
    assert lines(page) == [("Điều 1", 1), ("Đoạn một.", 0), ("Câu hỏi", 2), ("Đáp Chép án", 0)]
    assert read(tmp_path / "a.html", page).notes == ["left out: 6 characters in select"]


def test_menus_and_hidden_parts_are_counted(tmp_path):
    doc = read(
        tmp_path / "a.html",
        "<nav>Trang chủ</nav><div style='DISPLAY : none'>ẩn đi</div><footer>ACME</footer><script>var x</script><p>Chữ.")
    assert doc.text == "Chữ." and doc.notes == [
        "left out: 9 characters in nav", "left out: 5 characters in hidden parts", "left out: 4 characters in footer"]


@pytest.mark.parametrize("depth", [252, 253, 400, 1900])
def test_text_in_deep_elements_is_kept(depth):
    assert lines("<html><body>" + "<div>"*depth + "trong" + "</div>"*depth + "<h2>sau</h2><p>cuối") == [
        ("trong", 0), ("sau", 2), ("cuối", 0)]


def test_elements_too_deep_are_refused(tmp_path):
    with pytest.raises(DocumentError, match="more than 2,000 elements"):
        read(tmp_path / "a.html", "<b>"*5000 + "trong" + "</b>"*5000 + "<p>sau")


def test_a_table_that_arranges_the_page_is_read_in_order():
    page = ("<table width=760><tr><td>Trang chủ<br>Liên hệ</td><td><h1>Luật Lao động</h1><h2>Điều 1. Phạm "
            "vi</h2><p>Đoạn một.</p><p>Đoạn hai.</p>"
            "<ul><li>a</li></ul><table><tr><th>Bậc</th><th>Mức</th></tr><tr><td>1</td><td>12 "
            "triệu</td></tr></table></td></tr></table>")
    assert lines(page) == [("Trang chủ\nLiên hệ", 0), ("Luật Lao động", 1), ("Điều 1. Phạm vi", 2), ("Đoạn một.", 0),
                           ("Đoạn hai.", 0), ("- a", 0), ("Bậc | Mức", 0), ("1 | 12 triệu", 0)]
    assert [t for t, _ in lines("<table><tr><td colspan=2><p>một</p><p>hai</p></td></tr></table>")] == ["một", "hai"]


def test_a_row_of_data_keeps_its_cells_apart():
    page = ("<p>Bảng<table><tr><td><p>Nghỉ 12 "
            "ngày</p><p>Thưởng</p></td><td>13<br>triệu</td><td></td></tr><tr><td>a</td><td "
            "hidden>b</td><td>c</td></tr></table>sau")
    blocks = html_blocks(page)[0]
    assert [b.text for b in blocks] == ["Bảng", "Nghỉ 12 ngày Thưởng | 13 triệu | ", "a | c",
                                        "sau"] and [b.tight for b in blocks] == [False, False, True, False]


def test_list_items_keep_their_numbers():
    page = "<ol start=3><li>a<ol><li>x</li><li>y</li></ol></li><li value=9>b</li><li>c</li></ol><ul><li>d</ul>"
    assert [b.text for b in html_blocks(page)[0]] == ["3. a", "1. x", "2. y", "9. b", "10. c", "- d"]


def test_an_empty_main_part_gives_the_page():
    assert lines("<main id=app></main><article><p>Chữ.</article>") == [("Chữ.", 0)]


# ---- pages: their encoding

META = "<html><head>{}</head><body><p>" + LAW + "</body></html>"
PAGES = {"BOM before meta": META.format("<meta charset=windows-1258>").encode("utf-8-sig"),
         "in a comment": META.format("<!-- <meta charset=koi8-r> --><meta charset=utf-8>").encode(),
         "in a script": META.format("<script>var m = '<meta charset=koi8-r>'</script><script src=a.js "
                                    "charset=iso-8859-1></script>").encode(),
         "UTF-8 that says 1258": META.format("<meta charset=windows-1258>").encode(),
         "UTF-8 that says 1252": META.format("<meta charset=windows-1252>").encode(),
         "UTF-16 with BOM": META.format("<meta charset=utf-16>").encode("utf-16"),
         "UTF-16 in name only": META.format("<meta charset=utf-16le>").encode(),}


def cp1258(text):
    "windows-1258 has letters with one mark, and tones as marks of their own."
    out = ""
    for c in unicodedata.normalize("NFC", text):
        try:
            c.encode("cp1258")
            out += c
        except UnicodeEncodeError:
            base, tone = unicodedata.normalize("NFD", c)[:-1], unicodedata.normalize("NFD", c)[-1]
            out += ordered(base, tone)
    return out.encode("cp1258")


def ordered(base, tone):
    "The base as one letter, then the tone; of `ậ` the dot comes first when decomposed."
    if tone in "\u0302\u0306\u031b": base, tone = base[0] + tone, base[1:]
    return unicodedata.normalize("NFC", base) + tone


PAGES["meta"] = cp1258(META.format("<meta charset='windows-1258'>"))
PAGES["late meta"] = cp1258(META.format("<!--" + "x"*3000 + "--><meta http-equiv=Content-Type content='text/html; "
                                                            "charset=windows-1258'>"))
PAGES["none"] = cp1258(META.format(""))
PAGES["XML declaration"] = b"<?xml version='1.0' encoding='windows-1258'?>" + cp1258(META.format(""))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_read_in_its_encoding(tmp_path, name): assert read(tmp_path / "a.html", PAGES[name]).text == LAW


@pytest.mark.parametrize("name", ["iso-8859-1", "latin1", "us-ascii", "windows-1252"])
def test_names_mean_what_browsers_mean(tmp_path, name):
    assert read(tmp_path / "a.html",
                b"<meta charset=%s><p>\x93seek\x94 \x96 It\x92s\x85" % name.encode()).text == "“seek” – It’s…"


def test_arabic_in_its_windows_encoding(tmp_path):
    assert read(tmp_path / "a.html",
                "<meta charset=windows-1256><p>إنما الأعمال".encode("cp1256")).text == "إنما الأعمال"


def test_a_page_without_a_clear_encoding_is_refused(tmp_path):
    with pytest.raises(DocumentError, match="line 2: the text is not UTF-8"): read(tmp_path / "a.html", b"<p>\ncaf\xe9")
    with pytest.raises(DocumentError, match="not in the encoding it declares, shift_jis"):
        read(tmp_path / "a.html", b"<meta charset=sjis>\x81\xff\xff")


# ---- Markdown

def test_code_keeps_its_lines(tmp_path):
    doc = read(
        tmp_path / "a.md",
        "Chạy:\n\n```sh\nsudo apt install openvpn\nsudo openvpn {#a}\n```\n\n    một\n    hai\n\nmềm\nxuống dòng")
    assert doc.text == "Chạy:\n\nsudo apt install openvpn\nsudo openvpn {#a}\n\nmột\nhai\n\nmềm xuống dòng"


def test_attributes_are_no_text(tmp_path):
    doc = read(tmp_path / "a.md", "# Nghỉ phép {#nghi-phep}\n\n## Năm {#nam .unnumbered}\n\n[Xem](a.md){.nut} `x{#y}` "
                                  "{: .note } tập {1, 2} {x = .5}\n")
    assert [
        h.text
        for h in doc.headings] == ["Nghỉ phép", "Năm"] and doc.text.split("\n\n")[2] == "Xem x{#y} tập {1, 2} {x = .5}"


def test_front_matter_keeps_what_is_written(tmp_path):
    doc = read(tmp_path / "a.md",
               "---\nid: 007\nversion: 1.10\nat: 12:30\nlanguage: no\nphone: 0912\nyear: 2024\nshare: 0.5\npublic: "
               "true\n"
                                  "none: ~\ndate: 2026-01-02\nbig: 123456789012345678901\nhex: 0x1F\ntags: [01, "
                                  "1]\n---\nx")
    assert doc.id == "007" and doc.metadata == {
        "version": "1.10", "at": "12:30", "language": "no", "phone": "0912", "year": 2024, "share": .5, "public": True,
        "none": None, "date": "2026-01-02", "big": "123456789012345678901", "hex": "0x1F", "tags": ["01", 1]}


def test_toml_front_matter(tmp_path):
    doc = read(tmp_path / "a.md",
               "+++\ntitle = 'Nghỉ phép'\nid = '007'\ndate = 2026-01-02\n[owner]\ntags = ['a']\n+++\nNội dung.")
    assert (doc.id, doc.title, doc.text) == ("007", "Nghỉ phép", "Nội dung.") and doc.metadata == {
        "date": "2026-01-02", "owner": {"tags": ["a"]}}
    with pytest.raises(DocumentError, match="line 3: the front matter is not TOML"):
        read(tmp_path / "a.md", "+++\na = 1\nb = \n+++\nx")


def laughs(names):
    "Front matter in which each name stands for nine times the one before."
    return "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a]*9)}]\n" for a, b in zip(names, names[1:]))


@pytest.mark.parametrize("few, many, reason", [
    (laughs("abc"), laughs("abcdefghi"), r"line 3: .*repeats a value by its name, \*a; write the value itself"),
    ("a: &a [b]\nb: *a", "a: &a [*a]", r"line \d: .*\*a"),
    ("a: " + "["*500, "a: " + "["*5000, "line 2: .*nested too deeply|not YAML")])
def test_front_matter_made_to_explode_is_refused_at_once(tmp_path, few, many, reason):
    "In about the time of one that would not explode; nine names of nine times each would take 9**6 times as long."
    def refuse(fields):
        with pytest.raises(DocumentError, match=reason): read(tmp_path / "a.md", f"---\n{fields}\n---\nx")
    assert processor_seconds(lambda: refuse(many)) < 100 * processor_seconds(lambda: refuse(few))


# ---- PDF

def one_page(path, rows):
    pdf = FPDF()
    pdf.add_page()
    pdf.set_font("Helvetica", size=11)
    for row in rows: pdf.cell(0, 7, row, new_x="LMARGIN", new_y="NEXT")
    pdf.output(str(path))
    return path


def test_a_form_of_one_page_loses_nothing(tmp_path):
    rows = ["Ngay: ........", "Ngay: ........", "Ngay: ........", "Ho ten: An", "Ky ten: ......", "Ky ten: ......",
            "Ky ten: ......"]
    doc = read_document(one_page(tmp_path / "a.pdf", rows))
    assert doc.text.count("Ngay:") == doc.text.count("Ky ten:") == 3 and doc.notes == []
    assert running_lines([[Line(row, height=.95) for row in rows[:3]]]) == [set()]


@pytest.mark.parametrize("pages, have, gone",
                         [(6, 3, True), (7, 3, False), (7, 4, True), (3, 3, True), (3, 2, False), (2, 2, False)])
def test_a_header_is_on_half_of_the_pages_and_on_three(pages, have, gone):
    sheets = [[Line("ACME" if n < have else f"khác {'abcdefg'[n]}", height=.95), Line(f"chữ {'abcdefg'[n]}", height=.5)]
              for n in range(pages)]
    assert running_lines(sheets) == [{0} if gone and n < have else set() for n in range(pages)]


def test_more_space_than_usual_ends_a_paragraph(tmp_path):
    pdf = FPDF()
    pdf.add_page()
    pdf.set_font("Helvetica", size=11)
    for n, row in enumerate(["Mot dong dai duoc viet tiep o dong sau va con dai hon nua", "thi thuong viet tiep.",
                             "Doan hai bat dau o day va cung dai nhu doan truoc, that", "the."]):
        if n == 2: pdf.ln(6)
        pdf.cell(0, 5, row, new_x="LMARGIN", new_y="NEXT")
    pdf.output(str(tmp_path / "a.pdf"))
    assert [len(part.split()) for part in read_document(tmp_path / "a.pdf").text.split("\n\n")] == [18, 14]


def test_numbers_too_long_for_python_are_read():
    assert "1"*20_000 in pdf_blocks([[Line("1"*20_000, height=.95)]]*3)[1]


def test_pdf_in_tcvn3_is_unicode(tmp_path):
    doc = read_document(one_page(tmp_path / "a.pdf", [OLD["TCVN3"], "Hµ Néi"]))
    assert doc.text == f"{LAW} Hà Nội" and "TCVN3" in doc.notes[-1]


# ---- Vietnamese of before Unicode

ALPHABET = "aàảãáạăằẳẵắặâầẩẫấậeèẻẽéẹêềểễếệiìỉĩíịoòỏõóọôồổỗốộơờởỡớợuùủũúụưừửữứựyỳỷỹýỵđ"


@pytest.mark.skipif(not shutil.which("iconv") or "TCVN5712-1" not in subprocess.run(
    ["iconv", "-l"], capture_output=True, text=True).stdout, reason="iconv has no TCVN here")
def test_the_table_is_that_of_glibc():
    for old, new in d.TCVN3.items():
        said = subprocess.run(["iconv", "-f", "TCVN5712-1", "-t", "UTF-8"], input=bytes([old]), capture_output=True,
                              check=True).stdout.decode()
        assert unicodedata.normalize("NFC", said) == chr(new)


def tcvn3(text):
    "What a TCVN3 keyboard would have typed: capitals with marks are small ones."
    back = {new: old for old, new in d.TCVN3.items()}
    back |= {ord(chr(new).upper()): old for new, old in [*back.items()] if ord(chr(new).upper()) not in back}
    return unicodedata.normalize("NFC", text).translate(back)


def test_every_letter_has_its_place():
    assert {chr(c) for c in d.TCVN3.values()} == {c for c in ALPHABET if not c.isascii()} | set("ĂÂÊÔƠƯĐ")
    vni = ("a aø aû aõ aù aï aê aè aú aü aé aë aâ aà aå aã aá aä e eø eû eõ eù eï eâ eà eå eã eá eä i ì æ ó í ò o oø "
           "oû oõ où oï oâ oà oå oã oá oä ô ôø ôû ôõ ôù ôï u uø uû uõ uù uï ö öø öû öõ öù öï y yø yû yõ yù î ñ")
    assert to_unicode(vni, "VNI").split() == list(ALPHABET) and to_unicode(vni.upper(),
                                                                           "VNI").split() == list(ALPHABET.upper())


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("kind", ["a.txt", "a.md", "a.html"])
def test_old_text_becomes_unicode(tmp_path, name, kind):
    assert legacy_encoding(OLD[name]) == name
    doc = read(tmp_path / kind, OLD[name])
    assert doc.text == LAW and doc.notes == [f"the text was in {name}, from before Unicode, and has been converted"]
    # as the program of that time wrote it
    assert read(tmp_path / kind, OLD[name].encode("latin-1")).text == LAW


def test_a_minus_in_a_word_of_a_pdf_is_a_letter():
    assert to_unicode("n\u2212íc, ®Çu t\u2212, \u2212íc \u03bc, 5 \u2212 3",
                      "TCVN3") == "nước, đầu tư, ước à, 5 \u2212 3"
    assert d.hyphen_words("n-íc t- C«ng-nghiÖp - 5-3") == "n\u00adíc t\u00ad C«ng-nghiÖp - 5-3"


def test_real_law_goes_there_and_back():
    texts = [t for r in map(json.loads, (REPO / "data/law_mini.jsonl").open(encoding="utf-8")) for t in r["pos"]
             if len(t) > 100]
    assert len(texts) > 90 and all(legacy_encoding(tcvn3(t)) == "TCVN3" and legacy_encoding(t) is None for t in texts)
    assert all(to_unicode(tcvn3(t), "TCVN3").lower() == unicodedata.normalize("NFC", t).lower() for t in texts)


@pytest.mark.parametrize("text",
                         ["L'été dernier, nous étions à la plage, où êtes-vous allés après? Ça va, François, déjà à "
                          "l'hôtel, crêpe et pâté.",
    "Über die Brücke fährt der größte Bär, schön, süß, Äpfel, Öl, für, können, müssen",
                          "på, får, går, sår, når, år, må, også, få, så, då, rød, grød",
    "Não há razão: ações, à, você, três, também, coração, é, até, avó, avô, mãe",
                          "El niño comió en el jardín, está, mañana, año, corazón, pingüino, él",
    "Það er mjög gott veður í dag og ég ætla að fara út á eftir; þú ert hér", "«A» © 2026 ® 5 µm ½ ¼ ¾ § ª º ¶ · ±",
                          LAW, "nghỉ lễ"])
def test_other_languages_are_left_alone(text): assert legacy_encoding(text) is None and to_unicode(text) == text


def test_capitals_come_back_where_the_line_or_the_word_has_them():
    assert to_unicode("CéNG HOµ X· HéI CHñ NGHÜA VIÖT NAM\nHµ Néi, UBND tØnh Phó Thä",
                      "TCVN3") == "CỘNG HOÀ XÃ HỘI CHỦ NGHĨA VIỆT NAM\nHà Nội, UBND tỉnh Phú Thọ"


def word(path, runs, style=None):
    "A Word file of one paragraph; runs: (text, font)."
    file = WordFile()
    if style: file.styles["Normal"].font.name = style
    paragraph = file.add_paragraph()
    for text, font in runs:
        run = paragraph.add_run(text)
        if font: run.font.name = font
    file.save(path)
    return path


@pytest.mark.parametrize("runs, style, text", [
    # too short for statistics
    ([("§iÒu 1. ", ".VnTime"), ("nghØ", ".VnTimeH"), (" 5 µm ®", "Arial")], None, "Điều 1. NGHỈ 5 µm ®"),
    ([("ng\u00adêi", None)], ".VnTime", "người"), ([("nga", "VNI-Times"), ("øy", "VNI-Times")], None, "ngày"),
    ([("Điều 1 đã được gõ lại", ".VnTime")], None, "Điều 1 đã được gõ lại")])
def test_word_tells_the_encoding_by_the_font(tmp_path, runs, style, text):
    doc = read_document(word(tmp_path / "a.docx", runs, style))
    assert doc.text == text and len(doc.notes) == (0 if "gõ" in text else 1)


def test_the_checks_warn_of_old_text():
    rows = make_rows([
        {"query": "nghỉ phép", "pos": [OLD["TCVN3"]], "language": "vi"},
        {"query": "lương", "pos": [LAW], "neg": [OLD["VNI"]], "language": "vi"},
        {"query": "été", "pos": ["L'été à la plage, où êtes-vous allés après? déjà, très"], "language": "fr"}])
    report = check_rows(rows, near=0, identify=False)
    assert [(f["row"], f["what"].split(": ")[1]) for f in report.findings()
            if f["kind"] == "legacy_encoding"] == [(1, "pos is in TCVN3"), (2, "neg is in VNI")]
    assert any(w.startswith("legacy_encoding, 2 rows") and "to_unicode" in w for w in report.warnings)


# ---- files made to do harm

def packed(path, body):
    "A Word file with this body."
    empty = io.BytesIO()
    WordFile().save(empty)
    with zipfile.ZipFile(empty) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, part.replace(b"<w:body>", b"<w:body>" + body) if name == "word/document.xml" else part)
    return path


@pytest.mark.parametrize("mb, reason", [(70, "unpacks to 70 MB of text, and at most 64 are read"),
                                        (30, r"unpacks to \d+ times its size, and at most 200")])
def test_a_word_file_that_explodes_is_refused(tmp_path, mb, reason):
    path = packed(tmp_path / "a.docx", (b"<w:p><w:r><w:t>" + b"A"*1000 + b"</w:t></w:r></w:p>")*(mb*1008))
    def refuse():
        with pytest.raises(DocumentError, match=reason): read_document(path)
    def unpack():
        with zipfile.ZipFile(path) as file: file.read("word/document.xml")
    assert path.stat().st_size < 500_000
    assert processor_seconds(refuse) < processor_seconds(unpack) / 4       # before anything is unpacked


def test_a_long_word_file_is_read_in_good_time(tmp_path):
    "Seeking the style of each paragraph alone takes python-docx several times as long."
    path = packed(tmp_path / "a.docx",
                  "".join(f"<w:p><w:r><w:t>Đoạn {n*7919}</w:t></w:r></w:p>" for n in range(1_000)).encode())
    assert read_document(path).text.count("\n\n") == 999
    def styles(): return [p.style.name for p in WordFile(path).paragraphs]
    assert processor_seconds(lambda: read_document(path)) < processor_seconds(styles)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    folder, outside = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text("mật")
    (folder / "a.txt").write_text("chữ")
    for name, target in (("link.txt", outside / "secret.txt"), ("up.txt", "../out/secret.txt"), ("inside.txt", "a.txt"),
                         ("folder", outside), ("loop", folder), ("lost.txt", "none.txt")):
        (folder / name).symlink_to(target)
    reading = read_documents(folder, progress=False)
    assert [doc.id for doc in reading.documents] == ["a.txt", "inside.txt"] and all(
        doc.text == "chữ" for doc in reading.documents)
    assert {name: why.split(",")[0] for name, why in reading.skipped.items() if name != "lost.txt"} == {
        "link.txt": "a link to a file outside of the folder", "up.txt": "a link to a file outside of the folder",
        "folder": "a link to a folder", "loop": "a link to a folder"}
    # what the caller names is read
    (tmp_path / "here").symlink_to(folder)
    assert len(read_documents(tmp_path / "here", progress=False).documents) == 2 and read_documents(
        folder / "link.txt", progress=False).documents[0].text == "mật"


N = 20_000
HARD = [".", "a", " ", ". ", "-", "a-", "1", "1.", "(", "[", "*", "_", "`", ">", "{#a", "<", "<!--", "<script ",
        "<meta ", "<div>", "<ol><li>a", "<li>a", "<table><tr><td>", "\n", "\n ", "\f", "µ¶", "I", "Điều ", "![", "&",
        "|", "\\", "*a_ ", "<?", "---\n", "+++\n", "a\u0301"]


@pytest.fixture(scope="module")
def counting():
    "Seconds in which this machine counts to a hundred million: what takes quadratic time needs more."
    start = process_time()
    for _ in range(100_000_000): pass
    return process_time() - start


@pytest.mark.parametrize("piece", HARD)
def test_twenty_thousand_of_anything_take_no_time(tmp_path, piece, counting):
    text = (piece*N)[:N]
    calls = [
        lambda: goes_on((Line(text), 0), Line("b"), 0, 100, True),
        lambda: join_lines(text, "b", set()),
        lambda: join_lines(text + "-", "b" + text, set()),
        lambda: pdf_blocks([[Line(text), Line("b")]*3]*4),
        lambda: to_unicode(text),
        *(lambda k=k: read(tmp_path / f"a.{k}", text) for k in ("md", "html", "txt")),
    ]
    for call in calls:
        start = process_time()
        with suppress(DocumentError): call()
        assert process_time() - start < counting


def test_line_ends_are_seen_as_before():
    def last(text): return goes_on((Line(text), 0), Line("tiếp"), 0, 100, True)
    assert [last(t) for t in ("xong.", "xong.»", "xong!) ", "chưa xong", "3.5 triệu", "a, b,", "…", "")] == [
        False, False, False, True, True, True, False, True]
    assert [join_lines(*p, set()) for p in (("infor-", "mation"), ("2-", "b"), ("_-", "b"), ("x1a-", "b"))] == [
        "information", "2- b", "_- b", "x1ab"]
