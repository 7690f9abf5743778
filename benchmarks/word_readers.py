"""What readers of Word files make of the things that break them: one small file for each.

    python benchmarks/word_readers.py                      our reader and every other one that is installed here
    python benchmarks/word_readers.py --only ours docling  these
    python benchmarks/word_readers.py --files a.docx ...   also how many of the words that three readers find each
                                                           one has

The others are not needed by the package; `pip install mammoth markitdown docx2python pypandoc_binary
"docling-slim[format-docx]"` into another environment. Prints a table in Markdown: + as expected, - not, ! the reader
stops with an error.
"""
import argparse
import html
import re
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
NS = ('xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" '
      'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships" '
      'xmlns:wps="http://schemas.microsoft.com/office/word/2010/wordprocessingShape" '
      'xmlns:w14="http://schemas.microsoft.com/office/word/2010/wordml" '
      'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"')
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
MAIN = "application/vnd.openxmlformats-officedocument.wordprocessingml"


def p(text: str, properties: str = "", run: str = "") -> str:
    "A paragraph of one run."
    words = f'<w:t xml:space="preserve">{text}</w:t>'
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:rPr>{run}</w:rPr>{words}</w:r></w:p>"


def table(*rows: list[str]) -> str:
    "A table from the content of its cells; a cell that begins with `<w:sdt>` is taken as it is."
    cell = lambda c: c if c.startswith("<w:sdt>") else f"<w:tc>{c}</w:tc>"
    grid = "<w:gridCol/>"*max(map(len, rows))
    return f"<w:tbl><w:tblPr/><w:tblGrid>{grid}</w:tblGrid>" + "".join(f"<w:tr>{''.join(map(cell, row))}</w:tr>"
                                                                       for row in rows) + "</w:tbl>"


def level(i: int, form: str, text: str, more: str = "") -> str:
    "A level of a list."
    about = f'<w:start w:val="1"/><w:numFmt w:val="{form}"/>{more}<w:lvlText w:val="{text}"/>'
    return f'<w:lvl w:ilvl="{i}">{about}</w:lvl>'


def numbered(num: int, i: int) -> str:
    return f'<w:numPr><w:ilvl w:val="{i}"/><w:numId w:val="{num}"/></w:numPr>'


def write_docx(path: Path, body: str, styles: str = "", numbering: str = "", footnotes: str = "",
               strict: bool = False) -> Path:
    "A Word file with these parts; `strict` writes the Strict variant of the format."
    parts = {"styles": styles, "numbering": numbering, "footnotes": footnotes}
    parts = {name: f"<w:{name} {NS}>{xml}</w:{name}>" for name, xml in parts.items() if xml or name == "styles"}
    relation = lambda i, kind, target: f'<Relationship Id="rId{i}" Type="{OFFICE}/{kind}" Target="{target}"/>'
    relations = lambda inner: f'<Relationships xmlns="{PACKAGE}/relationships">{inner}</Relationships>'
    types = "".join(f'<Override PartName="/word/{name}.xml" ContentType="{MAIN}.{name}+xml"/>' for name in parts)
    files = {"[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" '
             f'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Default Extension="xml" '
             f'ContentType="application/xml"/>'
             f'<Override PartName="/word/document.xml" ContentType="{MAIN}.document.main+xml"/>{types}</Types>',
             "_rels/.rels": relations(relation(1, "officeDocument", "word/document.xml")),
             "word/_rels/document.xml.rels": relations("".join(relation(i, name, f"{name}.xml")
                                                               for i, name in enumerate(parts, 1))),
             "word/document.xml": f"<w:document {NS}><w:body>{body}<w:sectPr/></w:body></w:document>",
             **{f"word/{name}.xml": xml for name, xml in parts.items()}}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, xml in files.items():
            if strict:
                xml = re.sub(r"http://schemas\.openxmlformats\.org/(officeDocument|wordprocessingml)/2006/",
                             r"http://purl.oclc.org/ooxml/\1/", xml)
            out.writestr(name, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>{xml}')
    return path


HEADINGS = ('<w:style w:type="paragraph" w:styleId="Heading2"><w:name w:val="heading 2"/><w:pPr><w:numPr><w:numId '
            'w:val="7"/></w:numPr>'
            '<w:outlineLvl w:val="1"/></w:pPr></w:style>')
LIST = (f'<w:abstractNum w:abstractNumId="3"><w:multiLevelType w:val="multilevel"/>'
        + level(0, "decimal", "Điều %1.", '<w:pStyle w:val="Heading2"/>') + level(1, "lowerLetter", "%2)")
        + '</w:abstractNum><w:num w:numId="7"><w:abstractNumId w:val="3"/></w:num>')
ARTICLE = '<w:pStyle w:val="Heading2"/>'
CHECKBOX = ('<w:sdt><w:sdtPr><w14:checkbox><w14:checked w14:val="{}"/></w14:checkbox></w:sdtPr>'
            '<w:sdtContent><w:r><w:t>{}</w:t></w:r></w:sdtContent></w:sdt><w:r><w:t>{}</w:t></w:r>')
MERGE = '<w:tcPr><w:vMerge w:val="{}"/></w:tcPr>'
BOX = '<w:txbxContent>' + p("Lưu ý trong khung") + '</w:txbxContent>'
NOTES = ('<w:footnote w:id="2">' + p("Sahih al-Bukhari, số 6018.") + '</w:footnote>')
CONTROLLED = f"<w:sdt><w:sdtPr/><w:sdtContent><w:tc>{p('Kế toán')}</w:tc></w:sdtContent></w:sdt>"
LETTERED = (p("Phạm vi", ARTICLE) + p("người", numbered(7, 1)) + p("việc", numbered(7, 1))
            + p("Đối tượng", ARTICLE) + p("ngày", numbered(7, 1)))
DRAWN = ('<w:p><w:r><mc:AlternateContent>'
         f'<mc:Choice Requires="wps"><w:drawing><wps:txbx>{BOX}</wps:txbx></w:drawing></mc:Choice>'
         f'<mc:Fallback><w:pict>{BOX}</w:pict></mc:Fallback></mc:AlternateContent></w:r></w:p>')
CASES: dict[str, tuple[dict, Callable[[str], bool]]] = {     # what write_docx gets; whether the text is as it should be
    "paragraphs of a cell stay apart": ({"body": table([p("Kế toán"), p("Nghỉ 12 ngày") + p("Thưởng 13 triệu")])},
                                        lambda t: re.search(r"12 ngày\W+Thưởng 13", t)),
    "a table in a table": ({"body": table([p("Kế toán"), table([p("Bậc 1"), p("12 triệu")]) + p("")])},
                           lambda t: re.search(r"Kế toán\W+Bậc 1\W+12 triệu", t)),
    "cells in content controls": ({"body": table([p("Phòng"), CONTROLLED])},
                                  lambda t: re.search(r"Phòng\W+Kế toán", t)),
    "the number of a heading, Điều %1.": (
        {"body": p("Phạm vi", ARTICLE) + p("Đối tượng", ARTICLE), "styles": HEADINGS, "numbering": LIST},
        lambda t: re.search(r"Điều 1\.\s*Phạm vi\W+Điều 2\.\s*Đối tượng", t)),
    "the letters of items, a new a) in each": (
        {"body": LETTERED, "styles": HEADINGS, "numbering": LIST},
        lambda t: re.search(r"a\)\s*người\W+b\)\s*việc", t) and re.search(r"a\)\s*ngày", t)),
    "the text of a footnote": ({
        "body": '<w:p><w:r><w:t>xác thực</w:t></w:r><w:r><w:footnoteReference w:id="2"/></w:r></w:p>',
        "footnotes": NOTES}, lambda t: "xác thực" in t and "số 6018" in t),
    "a text box, once": ({"body": p("Trước") + DRAWN},
                         lambda t: t.count("Lưu ý trong khung") == 1),
    "signs of the font Symbol": ({"body": '<w:p><w:r><w:t xml:space="preserve">từ </w:t></w:r><w:r><w:sym '
                                          'w:font="Symbol" w:char="F0B3"/></w:r><w:r><w:t xml:space="preserve"> 18 '
                                          'tuổi</w:t></w:r></w:p>'}, lambda t: "≥ 18 tuổi" in t),
    "checkboxes": ({"body": "<w:p>" + CHECKBOX.format(1, "☒", "Nam") + CHECKBOX.format(0, "☐", "Nữ") + "</w:p>"},
                   lambda t: re.search(r"(☒|\[x\]) *Nam +(☐|\[ \]) *Nữ", t)),
    "hidden text is left out": ({"body": p("thấy") + p("không thấy được", run="<w:vanish/>")},
                                lambda t: "thấy" in t and "được" not in t),
    "tracked: inserted in, deleted out": ({"body": '<w:p><w:ins w:id="1" w:author="a"><w:r><w:t>nghỉ '
                                                   'phép</w:t></w:r></w:ins><w:del w:id="2" '
                                                   'w:author="a"><w:r><w:delText>không '
                                                   'lương</w:delText></w:r></w:del></w:p>'},
                                          lambda t: "nghỉ phép" in t and "không" not in t),
    "the result of a field": ({"body": '<w:p><w:r><w:t xml:space="preserve">theo </w:t></w:r><w:fldSimple w:instr=" '
                                       'REF x "><w:r><w:t>Điều 7</w:t></w:r></w:fldSimple></w:p>'},
                              lambda t: "theo Điều 7" in t),
    "Strict Open XML": ({"body": p("Quy chế"), "strict": True}, lambda t: "Quy chế" in t),
}


def ours(path):
    from bgem3_nb.documents import read_document
    return read_document(path).text


def mammoth(path):
    import mammoth
    with open(path, "rb") as file: page = mammoth.convert_to_html(file).value
    page = re.sub("<input[^>]*checkbox[^>]*>", lambda m: " ☒ " if "checked" in m[0] else " ☐ ", page)
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def markitdown(path):
    from markitdown import MarkItDown
    return MarkItDown(enable_plugins=False).convert(str(path)).text_content


def docx2python(path):
    from docx2python import docx2python as read
    with read(path) as file: return html.unescape(re.sub(r"</?span[^>]*>", "", file.text))


def python_docx(path):
    "Its own iterator over paragraphs and tables, in cells too."
    import docx
    from docx.table import Table
    def lines(part):
        for item in part.iter_inner_content():
            if isinstance(item, Table):
                yield from (" | ".join("\n".join(lines(cell)) for cell in row.cells) for row in item.rows)
            else: yield item.text
    return "\n".join(lines(docx.Document(str(path))))


def pandoc(path):
    import pypandoc
    return pypandoc.convert_file(str(path), "markdown", extra_args=["--wrap=none"])


def docling(path):
    from docling.backend.msword_backend import MsWordDocumentBackend
    from docling.datamodel.base_models import InputFormat
    from docling.datamodel.document import InputDocument
    given = InputDocument(path_or_stream=Path(path), format=InputFormat.DOCX, backend=MsWordDocumentBackend,
                          filename=Path(path).name)
    return MsWordDocumentBackend(in_doc=given, path_or_stream=Path(path)).convert().export_to_markdown()


READERS = {"ours": (ours, "python-docx"), "mammoth": (mammoth, "mammoth"), "markitdown": (markitdown, "markitdown"),
           "docx2python": (docx2python, "docx2python"), "python-docx": (python_docx, "python-docx"),
           "pandoc": (pandoc, "pypandoc_binary"), "docling": (docling, "docling-slim")}


def text_of(name: str, path: Path) -> str | None:
    "The text that a reader makes of a file; None where it stops with an error."
    try: return READERS[name][0](path)
    except Exception: return None


def result(name: str, case: str, folder: Path) -> str:
    "+ as expected, - not, ! an error."
    given, right = CASES[case]
    text = text_of(name, write_docx(folder / "case.docx", **given))
    return "!" if text is None else "+" if right(text.replace("\\", "")) else "-"


def words_found(names: list[str], files: list[str]) -> dict[str, float]:
    "Of the different words of each file that three readers find, the share that each reader has."
    found, wanted = Counter(), 0
    for file in files:
        words = {name: set(re.findall(r"\w+", re.sub(r"\]\([^)]*\)|[*_\\]", " ", text_of(name, file) or "").lower()))
                 for name in names}
        agreed = {word for word, n in Counter(w for some in words.values() for w in some).items() if n >= 3}
        wanted += len(agreed)
        for name in names: found[name] += len(agreed & words[name])
    return {name: found[name]/max(1, wanted) for name in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(READERS))
    parser.add_argument("--files", nargs="*", default=[])
    args, versions = parser.parse_args(), {}
    for name in args.only or READERS:
        try: versions[name] = version(READERS[name][1])
        except PackageNotFoundError: continue
    print(*(f"{name}: {READERS[name][1]} {number}" for name, number in versions.items()), sep="\n", end="\n\n")
    print("| case | " + " | ".join(versions) + " |", "|---|" + ":-:|"*len(versions), sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            print(f"| {case} | " + " | ".join(result(name, case, Path(folder)) for name in versions) + " |")
    if args.files:
        print(f"\n{len(args.files)} files, words found: " + ", ".join(
            f"{name} {share:.1%}" for name, share in words_found(list(versions), args.files).items()))


if __name__ == "__main__": main()
