"""Word files as they are in offices, and the parts of laws and of books of hadith in every format."""
import importlib.util
import re
from pathlib import Path

import matplotlib
import pytest
from conftest import processor_seconds
from docx import Document as WordFile
from fpdf import FPDF

from bgem3_nb.documents import (Block, Document, Heading, assemble, chunk_document, clauses, html_blocks,
                                part_of, read_document, structured)

spec = importlib.util.spec_from_file_location("word_readers", Path(__file__).parents[1] / "benchmarks/word_readers.py")
word = importlib.util.module_from_spec(spec)
spec.loader.exec_module(word)
p, table, level, numbered, write_docx = word.p, word.table, word.level, word.numbered, word.write_docx


def read(tmp_path, body, **parts):
    return read_document(write_docx(tmp_path / "a.docx", body, **parts))


# ---- What Word shows

@pytest.mark.parametrize("case", word.CASES)
def test_the_table_of_the_chapter(tmp_path, case):
    assert word.result("ours", case, tmp_path) == "+"


def test_rows_paragraphs_and_tables_in_a_cell(tmp_path):
    inner = table([p("Bậc 1"), p("12 triệu")], [p("Bậc 2"), p("14 triệu")])
    doc = read(tmp_path, table([p("Kế toán") + p("Trưởng phòng"), inner + p("")], [p("Phép"), p("12 ngày")]))
    assert doc.text == "Kế toán Trưởng phòng | Bậc 1, 12 triệu; Bậc 2, 14 triệu\nPhép | 12 ngày"


def test_a_merged_cell_stands_in_each_of_its_rows(tmp_path):
    merged = lambda text, how: f'<w:tcPr><w:vMerge w:val="{how}"/></w:tcPr>' + p(text)
    wide = '<w:tcPr><w:gridSpan w:val="2"/></w:tcPr>' + p("Nghỉ trưa")
    doc = read(tmp_path, table([merged("Ca sáng", "restart"), p("6h")], [merged("", "continue"), p("7h")], [wide]))
    assert doc.text == "Ca sáng | 6h\nCa sáng | 7h\nNghỉ trưa"


def test_a_table_that_only_lays_out_the_page_keeps_paragraphs_and_headings(tmp_path):
    style = '<w:style w:type="paragraph" w:styleId="H"><w:name w:val="heading 1"/></w:style>'
    doc = read(tmp_path, table([p("Nội quy", '<w:pStyle w:val="H"/>') + p("Vào lúc 8 giờ.")]), styles=style)
    assert doc.text == "Nội quy\n\nVào lúc 8 giờ." and doc.headings == [Heading(0, 1, "Nội quy")]


def numbering(*levels, more="", override=""):
    return (f'<w:abstractNum w:abstractNumId="1">{"".join(levels)}</w:abstractNum>{more}'
            f'<w:num w:numId="1"><w:abstractNumId w:val="1"/></w:num>'
            f'<w:num w:numId="2"><w:abstractNumId w:val="1"/>{override}</w:num>')


@pytest.mark.parametrize("form, want", [
    ("decimal", "1 2 27 28"), ("lowerLetter", "a b aa bb"), ("upperRoman", "I II XXVII XXVIII"),
    ("lowerRoman", "i ii xxvii xxviii"), ("decimalZero", "01 02 27 28"), ("arabicAbjad", "أ ب ظ غ"),
    ("somethingNew", "1 2 27 28")])
def test_number_formats(tmp_path, form, want):
    doc = read(tmp_path, "".join(p("x", numbered(1, 0)) for _ in range(28)), numbering=numbering(level(0, form, "%1:")))
    lines = doc.text.split("\n")
    assert [lines[i].removesuffix(": x") for i in (0, 1, 26, 27)] == want.split()


def test_levels_restart_under_their_parent_and_show_it(tmp_path):
    levels = level(0, "upperRoman", "%1."), level(1, "decimal", "%1.%2"), level(2, "decimal", "%1.%2.%3", "<w:isLgl/>")
    doc = read(tmp_path, "".join(p("x", numbered(1, i)) for i in (0, 1, 2, 2, 1, 2, 0, 1)),
               numbering=numbering(*levels))
    assert doc.text.split("\n") == "I. x,I.1 x,1.1.1 x,1.1.2 x,I.2 x,1.2.1 x,II. x,II.1 x".split(",")


def test_a_level_that_never_restarts(tmp_path):
    levels = level(0, "decimal", "Chương %1."), level(1, "decimal", "Điều %2.", '<w:lvlRestart w:val="0"/>')
    doc = read(tmp_path, "".join(p("X", numbered(1, i)) for i in (0, 1, 1, 0, 1)), numbering=numbering(*levels))
    assert [h.text for h in doc.headings] == ["Chương 1. X", "Điều 1. X", "Điều 2. X", "Chương 2. X", "Điều 3. X"]


def test_lists_of_one_kind_count_on_unless_they_say_where_to_start(tmp_path):
    body = p("x", numbered(1, 0)) + p("y", numbered(2, 0)) + p("z", numbered(1, 0))
    assert read(tmp_path, body, numbering=numbering(level(0, "decimal", "%1."))).text == "1. x\n2. y\n3. z"
    again = '<w:lvlOverride w:ilvl="0"><w:startOverride w:val="5"/></w:lvlOverride>'
    assert read(tmp_path, body,
                numbering=numbering(level(0, "decimal", "%1."), override=again)).text == "1. x\n5. y\n6. z"
    other = f'<w:lvlOverride w:ilvl="0">{level(0, "lowerLetter", "%1)")}</w:lvlOverride>'
    assert read(tmp_path, body,
                numbering=numbering(level(0, "decimal", "%1."), override=other)).text == "1. x\nb) y\n3. z"


def test_numbers_of_styles_and_of_list_styles(tmp_path):
    style = ('<w:style w:type="paragraph" w:styleId="A"><w:name w:val="Khoản"/><w:pPr><w:numPr><w:numId '
             'w:val="1"/></w:numPr></w:pPr></w:style>'
             '<w:style w:type="paragraph" w:styleId="B"><w:name w:val="Điểm"/><w:basedOn w:val="A"/></w:style>'
             '<w:style w:type="numbering" w:styleId="L"><w:name w:val="L"/><w:pPr><w:numPr><w:numId '
             'w:val="1"/></w:numPr></w:pPr></w:style>')
    levels = level(0, "decimal", "%1.", '<w:pStyle w:val="A"/>'), level(1, "lowerLetter", "%2)",
                                                                        '<w:pStyle w:val="B"/>')
    linked = ('<w:abstractNum w:abstractNumId="2"><w:numStyleLink w:val="L"/></w:abstractNum>'
              '<w:num w:numId="3"><w:abstractNumId w:val="2"/></w:num>')
    of = lambda s: f'<w:pStyle w:val="{s}"/>'
    none = '<w:numPr><w:numId w:val="0"/></w:numPr>'
    body = p("x", of("A")) + p("y", of("B")) + p("không", of("A") + none) + p("z", numbered(3, 0))
    assert read(tmp_path, body, styles=style,
                numbering=numbering(*levels, more=linked)).text == "1. x\na) y\n\nkhông\n2. z"


def test_empty_and_deleted_paragraphs_of_a_list(tmp_path):
    gone = (f'<w:p><w:pPr>{numbered(1, 0)}</w:pPr><w:del '
            f'w:id="1" '
            f'w:author="a"><w:r><w:delText>cũ</w:delText></w:r></w:del></w:p>')
    body = p("x", numbered(1, 0)) + gone + p("", numbered(1, 0)) + p("y", numbered(1, 0))
    assert read(tmp_path, body, numbering=numbering(level(0, "decimal", "%1."))).text == "1. x\n3. y"


def test_bullets_have_no_number(tmp_path):
    assert read(tmp_path, p("x", numbered(1, 0)), numbering=numbering(level(0, "bullet", "\uf0b7"))).text == "x"


def test_notes_stand_behind_their_paragraph_and_not_in_the_heading(tmp_path):
    style = '<w:style w:type="paragraph" w:styleId="H"><w:name w:val="heading 1"/></w:style>'
    mark = '<w:r><w:footnoteReference w:id="2"/></w:r>'
    body = p("Điều 5. Kỳ hạn", '<w:pStyle w:val="H"/>').replace(
        "</w:p>", mark + "</w:p>") + p("Ba năm").replace("</w:p>", mark + "</w:p>") + p("Hết.")
    doc = read(tmp_path, body, styles=style,
               footnotes=f'<w:footnote w:id="2">{p("Được sửa đổi")}{p("năm 2024.")}</w:footnote>')
    assert doc.text == "Điều 5. Kỳ hạn[1]\n[1] Được sửa đổi năm 2024.\n\nBa năm[2]\n[2] Được sửa đổi năm 2024.\n\nHết."
    assert doc.headings == [Heading(0, 1, "Điều 5. Kỳ hạn")]


def test_what_is_left_out_is_said(tmp_path):
    style = '<w:style w:type="character" w:styleId="V"><w:name w:val="V"/><w:rPr><w:vanish/></w:rPr></w:style>'
    sign = '<w:p><w:r><w:sym w:font="Webdings" w:char="F021"/><w:t>a</w:t></w:r></w:p>'
    doc = read(tmp_path, p("thấy") + p("ẩn", run='<w:rStyle w:val="V"/>') + p(
        "hiện", run='<w:rStyle w:val="V"/><w:vanish w:val="0"/>') + sign, styles=style)
    assert doc.text == "thấy\n\nhiện\n\na"
    assert doc.notes == ["hidden text left out: 2 characters",
                         "1 signs of the font 'Webdings' left out: they are not known"]


@pytest.mark.parametrize("font, code, sign", [("Symbol", "F0B3", "≥"), ("Symbol", "F0A3", "≤"), ("Symbol", "F062", "β"),
                                              ("Wingdings", "F0FE", "☑"), ("Wingdings", "F0A8", "☐"),
                                              ("Arial", "2265", "≥")])
def test_signs_and_letters_of_symbol_fonts(tmp_path, font, code, sign):
    assert read(tmp_path, f'<w:p><w:r><w:sym w:font="{font}" w:char="{code}"/></w:r></w:p>').text == sign
    if code.startswith("F0"): assert read(tmp_path, p(f"&#x{code};", run=f'<w:rFonts w:ascii="{font}"/>')).text == sign


def test_a_deleted_paragraph_mark_and_a_deleted_row(tmp_path):
    joined = p("Nghỉ", '<w:rPr><w:del w:id="1" w:author="a"/></w:rPr>') + p("phép")
    row = table([p("x")], [p("y")]).replace("<w:tr>", '<w:tr><w:trPr><w:del w:id="2" w:author="a"/></w:trPr>', 1)
    assert read(tmp_path, joined + row).text == "Nghỉ phép\n\ny"


def test_old_check_boxes(tmp_path):
    def box(on):
        check = f'<w:checkBox><w:default w:val="0"/>{on}</w:checkBox>'
        return f'<w:r><w:fldChar w:fldCharType="begin"><w:ffData>{check}</w:ffData></w:fldChar></w:r>'
    text = lambda t: f"<w:r><w:t>{t}</w:t></w:r>"
    assert read(tmp_path, f'<w:p>{box("<w:checked/>")}{text("Nam")}{box("")}{text("Nữ")}</w:p>').text == "☑ Nam ☐ Nữ"


def test_a_file_whose_picture_is_missing_is_read(tmp_path):
    file = WordFile()
    file.add_paragraph("Có chữ.")
    from PIL import Image
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file.add_picture(str(tmp_path / "a.png"))
    file.save(tmp_path / "a.docx")
    import zipfile
    with zipfile.ZipFile(tmp_path / "a.docx") as old, zipfile.ZipFile(tmp_path / "b.docx", "w") as new:
        for name in old.namelist():
            if not name.endswith(".png"): new.writestr(name, old.read(name))
    assert read_document(tmp_path / "b.docx").text == "Có chữ."


def test_bold_paragraphs_and_styles_with_other_names_are_headings(tmp_path):
    styles = ('<w:style w:type="paragraph" w:styleId="H1"><w:name w:val="heading 1"/></w:style>'
              '<w:style w:type="paragraph" w:styleId="X"><w:name w:val="Đề mục"/><w:basedOn w:val="H1"/></w:style>'
              '<w:style w:type="paragraph" w:styleId="O"><w:name w:val="Mục riêng"/><w:pPr><w:outlineLvl '
              'w:val="1"/></w:pPr></w:style>')
    body = (p("Sổ tay", '<w:pStyle w:val="X"/>') + p("Chung", '<w:pStyle w:val="O"/>')
            + p("Một câu thường, dài hơn.") + p("Lưu ý", run="<w:b/>") + p("Một câu nữa, cũng dài hơn.")
            + p("Câu in đậm này là một câu.", run="<w:b/>"))
    assert [(h.level, h.text)
            for h in read(tmp_path, body, styles=styles).headings] == [(1, "Sổ tay"), (2, "Chung"), (3, "Lưu ý")]


# ---- Parts of a law

LAW = ["QUỐC HỘI", "BỘ LUẬT", "LAO ĐỘNG", "Căn cứ Hiến pháp;", "Phần thứ nhất", "NHỮNG QUY ĐỊNH CHUNG", "Chương I",
       "PHẠM VI", "Điều 1. Phạm vi điều chỉnh", "Bộ luật này quy định tiêu chuẩn lao động, theo Điều 5 của Luật khác.",
       "Điều 2. Đối tượng áp dụng", "1. Người lao động:", "a) Người học nghề;", "b) Người tập nghề.",
       "2. Người sử dụng lao động.", "Chương II", "HỢP ĐỒNG", "Mục 1. GIAO KẾT", "Điều 3. Hình thức hợp đồng",
       "Bằng văn bản."]
PATH = ["BỘ LUẬT LAO ĐỘNG", "Phần thứ nhất NHỮNG QUY ĐỊNH CHUNG", "Chương II HỢP ĐỒNG", "Mục 1. GIAO KẾT",
        "Điều 3. Hình thức hợp đồng"]
BOLD = [line for line in LAW if line.isupper() or re.match("(Phần|Chương|Mục|Điều) ", line)]


def law_docx(path): write_docx(path, "".join(p(line, run="<w:b/>" if line in BOLD else "") for line in LAW))
def law_plain(path): write_docx(path, "".join(p(line) for line in LAW))
def law_txt(path): path.write_text("\n".join(LAW), encoding="utf-8")
def law_html(path):
    path.write_text('<meta charset="utf-8">' + "".join(f"<p><b>{line}</b></p>" if line in BOLD else f"<p>{line}</p>"
                                                       for line in LAW), encoding="utf-8")
def law_md(path):
    path.write_text("\n\n".join(LAW).replace("\n\n1. ", "\n\n1\\. ").replace("\n\n2. ", "\n\n2\\. "), encoding="utf-8")


def law_pdf(path):
    pdf, fonts = FPDF(format="A5"), Path(matplotlib.get_data_path()) / "fonts/ttf"
    pdf.add_font("D", "", fonts / "DejaVuSans.ttf")
    pdf.add_font("D", "B", fonts / "DejaVuSans-Bold.ttf")
    pdf.add_page()
    for line in LAW:
        pdf.set_font("D", "B" if line in BOLD else "", 9)
        pdf.multi_cell(0, 6, line, align="L", new_x="LMARGIN", new_y="NEXT")
    pdf.output(str(path))


@pytest.mark.parametrize("name, write", [("a.docx", law_docx), ("b.docx", law_plain), ("a.txt", law_txt),
                                         ("a.html", law_html), ("a.md", law_md), ("a.pdf", law_pdf)])
def test_a_law_has_the_same_headings_in_every_format(tmp_path, name, write):
    write(tmp_path / name)
    doc = read_document(tmp_path / name)
    assert doc.path(doc.text.index("Bằng văn bản")) == PATH
    assert [h.text for h in doc.headings if h.text != "QUỐC HỘI"] == [
        PATH[0], PATH[1], "Chương I PHẠM VI", "Điều 1. Phạm vi điều chỉnh", "Điều 2. Đối tượng áp dụng", *PATH[2:]]
    assert {h.level for h in doc.headings if h.text.startswith("Điều")} == {5} and doc.title == "BỘ LUẬT LAO ĐỘNG"
    at = doc.text.index("b) Người tập nghề")
    assert doc.path(at)[-2:] == ["Điều 2. Đối tượng áp dụng", "Khoản 1"] or doc.path(at)[-3:] == [
        "Điều 2. Đối tượng áp dụng", "Khoản 1", "Điểm a"]
    assert doc.path(at + 3)[-2:] == ["Khoản 1", "Điểm b"] and doc.path(doc.text.index("2. Người sử"))[-1] != "Khoản 2"


@pytest.mark.parametrize("line",
                         ["Điều 5 của Bộ luật này quy định khác.", "Điều 7, Điều 8 và Điều 9",
                          "Mục 1 Chương XI của Bộ luật này.", "Mục II. Chương này", "Phần mềm quản lý",
                          "Điều kiện làm việc",
                                  "Chương trình đào tạo", "Điều 5 | 10 triệu", "Mục vi phạm", "كتاب الله وسنة نبيه.",
                          "كِتَابٌ مَرْقُومٌ", "فَصَلِّ لِرَبِّكَ وَانْحَرْ", "الكتاب المقدس", "باب المسجد مفتوح.",
                          "Party of one", "Sections 3 and 4",
                                  "Điều 1. Phạm vi điều chỉnh .......... 5", "Chương I QUY ĐỊNH CHUNG\t12"])
def test_sentences_that_only_speak_of_a_part_are_no_headings(line):
    assert part_of(line) is None


@pytest.mark.parametrize("line, rank, heading", [
    ("PHẦN THỨ NHẤT", 1, None), ("Phần thứ mười một", 1, None), (
        "Chương XIV:PHIÊN TÒA", 2,
        None), ("CHƯƠNG 2 - LƯƠNG", 2, None), ("Tiểu mục 3. THẾ CHẤP", 4, None), ("Điều 12a. Tên", 5, None),
    ("Điều 22. Phụ lục hợp đồng lao động", 5, None), (
        "Điều 3. Quyết định này có hiệu lực kể từ ngày ký.", 5,
        "Điều 3."), ("Article 5. Scope", 5, None), ("PHỤ LỤC II", 1, None), ("Phụ lục", 1, None),
    ("كتاب الإيمان", 1, None), ("كِتَابُ بَدْءِ الْوَحْيِ", 1, None), ("الباب الأول: في النية", 2, None), (
        "٢ - باب ما جاء في العلم", 2, None), ("بَابٌ", 2, None), ("فصل في الصيام", 3, None),
    ("الحديث ٥", 5, None), ("الحديث الحادي عشر", 5, None), ("حديث رقم 12: إنما الأعمال", 5, None),
    ("المادة ٥ - التعاريف", 5, None)])
def test_lines_that_begin_a_part(line, rank, heading):
    part = part_of(line)
    assert part.rank == rank and line[:part.end] == (heading or line)


def test_a_book_of_hadith_keeps_its_path(tmp_path):
    (tmp_path / "a.txt").write_text("كتاب الإيمان\n\nباب أمور الإيمان\n\n8 - حدثنا عبد الله بن محمد قال حدثنا أبو "
                                    "عامر.\n\n9 - حدثنا آدم.\n\nباب المسلم\n\n10 - حدثنا شعبة.\n", encoding="utf-8")
    doc = read_document(tmp_path / "a.txt")
    assert doc.path(doc.text.index("أبو عامر")) == ["كتاب الإيمان", "باب أمور الإيمان", "حديث 8"]
    assert doc.path(doc.text.index("شعبة")) == ["كتاب الإيمان", "باب المسلم", "حديث 10"]


def test_other_headings_keep_their_place_beside_parts():
    blocks = [Block("Quy chế", 1), Block("Lời nói đầu", 2), Block("Chương I", 2), Block("Điều 1. Tên", 3),
              Block("Ghi chú", 4), Block("Phụ lục", 2), Block("Bảng 1", 3)]
    _, headings, _ = assemble(structured(blocks))
    path = lambda text: Document("a", "a", "x"*99, headings).path(next(h.start for h in headings if h.text == text))
    assert path("Điều 1. Tên") == ["Quy chế", "Chương I", "Điều 1. Tên"] and path("Ghi chú") == [
        "Quy chế", "Chương I", "Điều 1. Tên", "Ghi chú"]
    assert path("Phụ lục")[:2] == ["Quy chế",
                                   "Phụ lục"] and path("Bảng 1")[-1] == "Bảng 1" and "Chương I" not in path("Bảng 1")


def test_files_without_parts_are_not_changed():
    for blocks in ([], [Block("x")], [Block("QUY ĐỊNH", 0), Block("Một\nhai", 0), Block("a", 3)],
                   html_blocks("<h1>A</h1><p>b<h3>c</h3>")[0]):
        assert structured(blocks) == blocks


def test_a_table_of_contents_is_no_structure(tmp_path):
    style = '<w:style w:type="paragraph" w:styleId="T"><w:name w:val="toc 1"/></w:style>'
    line = ('<w:p><w:pPr><w:pStyle w:val="T"/></w:pPr><w:r><w:rPr><w:b/></w:rPr><w:t>Điều 1. Phạm '
            'vi</w:t><w:tab/><w:t>3</w:t></w:r></w:p>')
    doc = read(tmp_path, line + p("Điều 1. Phạm vi", run="<w:b/>") + p("Luật này quy định về lao động."), styles=style)
    assert [h.text for h in doc.headings] == ["Điều 1. Phạm vi"] and doc.headings[0].start > 0


def test_a_long_text_without_empty_lines_is_read_in_time(tmp_path):
    few, many = ([Block("Điều 1. Tên\n" + "\n".join(["một dòng chữ"]*n))] for n in (20_000, 80_000))
    ratio = processor_seconds(lambda: structured(many)) / processor_seconds(lambda: structured(few))
    # four times the lines; a quadratic rule takes sixteen times as long
    assert ratio < 10


def test_clauses_belong_to_articles_only():
    text = "1. Mở đầu\n\nĐiều 1. Tên\n1. Một:\na) hai;\nđ) ba.\n2. Bốn"
    assert [c.text
            for c in clauses(text, [Heading(11, 1, "Điều 1. Tên")])] == ["Khoản 1", "Điểm a", "Điểm đ", "Khoản 2"]
    assert clauses("Cách làm\n1. Một", [Heading(0, 1, "Cách làm")]) == []


# ---- Titles

@pytest.mark.parametrize("title, want",
                         [("Word Document", "a"), ("untitled", "a"), ("Untitled Document", "a"),
                          ("Microsoft Word - QD_45.doc", "a"), ("Microsoft Word - Quy chế lương", "Quy chế lương"),
                          ("bieu mau 3.docx", "a"), ("Document1", "a"),
                                         ("Tài liệu1", "a"), ("Quy chế lương", "Quy chế lương"), ("Word", "a"),
                          ("Documents that matter", "Documents that matter"), ("2024", "2024"), ("", "a")])
def test_titles_that_a_program_made_up_are_none(tmp_path, title, want):
    file = WordFile()
    file.add_paragraph("Nội dung.")
    file.core_properties.title = title
    file.save(tmp_path / "a.docx")
    (tmp_path / "a.html").write_text(f"<meta charset='utf-8'><title>{title}</title>Nội dung.", encoding="utf-8")
    assert [read_document(tmp_path / f"a.{kind}").title for kind in ("docx", "html")] == [want, want]


# ---- Queries by rules

def test_rules_write_queries_for_the_chunks_of_a_law(tmp_path):
    from transformers import AutoTokenizer

    from bgem3_nb.backbone import embedded_path
    from bgem3_nb.queries import rule_queries
    from bgem3_nb.sources import law_articles
    articles = [a for a in law_articles() if a["id"].startswith("bo-luat-lao-dong")][:40]
    lines = [line for a in articles for line in (f"Điều {a['number']}. {a['title']}", *a["body"].split("\n"))]
    write_docx(tmp_path / "a.docx", "".join(
        p(line.replace("&", "&amp;"), run="<w:b/>" if line.startswith("Điều ") and line[-1] != "." else "")
        for line in ["Chương I", "QUY ĐỊNH", *lines]))
    doc = read_document(tmp_path / "a.docx")
    assert sum(h.text.startswith("Điều ") for h in doc.headings) == 40
    chunks = chunk_document(doc, AutoTokenizer.from_pretrained(embedded_path(progress=False)))
    assert all(any(h.startswith("Điều ") for h in c.headings) for c in chunks)
    made = rule_queries(chunks, language="vi", types=["keywords"], progress=False)
    assert made.failed == [] and not [r["query"] for r in made.rows
                                      if re.search(r"(Điều|Khoản|Chương) \w+$|Điểm [a-zđ]$", r["query"])]
