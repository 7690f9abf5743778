"""Writes `relevant` of rental.jsonl anew from its `accept`, and the listings into rental_corpus.jsonl.

    python data/gold/rental.py          # after a change of the questions or of ../rental/listings.json
"""
import json
import os
import re
from pathlib import Path

HERE = Path(__file__).parent
FIELDS = {   # what a listing says → (field, value)
    "wc riêng": ("wc riêng", True), "wc chung": ("wc riêng", False),
    "có máy lạnh": ("máy lạnh", True), "không máy lạnh": ("máy lạnh", False),
    "có ban công": ("ban công", True), "không ban công": ("ban công", False),
    "bếp riêng": ("bếp riêng", True), "bếp dùng chung": ("bếp riêng", False),
    "có gác lửng": ("gác lửng", True), "không gác": ("gác lửng", False),
    "máy giặt riêng": ("máy giặt", True), "không máy giặt": ("máy giặt", False),
    "cửa sổ lớn": ("cửa sổ", True), "không cửa sổ": ("cửa sổ", False),
    "có thang máy": ("thang máy", True), "chỉ thang bộ": ("thang máy", False),
    "hầm để xe": ("chỗ để xe", True), "không chỗ để xe": ("chỗ để xe", False),
    "nước nóng năng lượng": ("nước nóng", True), "không nước nóng": ("nước nóng", False),
    "không chung chủ": ("không chung chủ", True), "ở cùng chủ nhà": ("không chung chủ", False),
    "giờ giấc tự do": ("giờ tự do", True), "đóng cửa lúc 23 giờ": ("giờ tự do", False),
    "được nuôi thú cưng": ("thú cưng", True), "không nhận thú cưng": ("thú cưng", False),
    "chỉ cho nữ thuê": ("chỉ cho nữ", True), "chỉ cho nam thuê": ("chỉ cho nữ", False),
    "nhận ở ngắn hạn": ("ngắn hạn", True), "hợp đồng từ 12 tháng": ("ngắn hạn", False),
    "đầy đủ nội thất": ("nội thất", "đầy đủ"), "nội thất cơ bản": ("nội thất", "cơ bản"),
    "phòng trống": ("nội thất", "trống"), "chưa có đồ": ("nội thất", "trống"),
}
KINDS = ("phòng trọ", "phòng khép kín", "căn hộ mini", "studio")


def listings(path=HERE.parent / "rental" / "listings.json"):
    "Return the listings: id (number of the row in the file, from 0, and place in the row) to text."
    found = {}
    for i, row in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))):
        texts = [row["pos"], *(n["text"] for n in row["hard_neg"])]
        for k, text in enumerate(texts):
            found.setdefault(text, f"{i}/neg{k}" if k else f"{i}/pos")
    return {id: text for text, id in found.items()}


def fields(text):
    "Read the fields of a listing; what it does not mention has no field. Raises ValueError on an unknown part."
    head, *parts = text.split(", ")
    if area := re.fullmatch(r"(\d+)m²", parts[0]): head = f"{head} {parts.pop(0)}"
    area = re.search(r" (?:rộng )?(\d+)m²", head)
    head = head.replace(area[0], "").removeprefix("Cho thuê ").replace(": ", " ")
    kind = next(k for k in KINDS if k in head.lower())
    at = head.lower().index(kind)
    found = {"kind": kind, "place": (head[:at] + head[at + len(kind):]).strip(), "area": int(area[1])}
    for part in parts:
        price = re.fullmatch(r"giá (\d+)(?:[,.](\d))?(?: triệu|tr(\d)?)", part)
        if price: found["price"] = float(f"{price[1]}.{price[2] or price[3] or 0}")   # million đồng a month
        elif floor := re.fullmatch(r"tầng (\d+)", part): found["floor"] = int(floor[1])
        elif part in FIELDS: found.update([FIELDS[part]])
        elif part.startswith(("gần ", "trong hẻm", "mặt tiền")): found["near"] = part
        else: raise ValueError(f"{part!r} in the listing {text!r} is not known")
    return found


def accepts(accept, found):
    """Tell whether a listing meets all conditions: FIELD with a value, or with a list of values of which it must have
    one; FIELD_min and FIELD_max, included bounds. A field that the listing does not mention meets no condition."""
    def met(name, wanted):
        value = found.get(re.sub("_(min|max)$", "", name))
        if value is None: return False
        if name.endswith("_min"): return value >= wanted
        if name.endswith("_max"): return value <= wanted
        return value in wanted if isinstance(wanted, list) else value == wanted
    return all(met(name, wanted) for name, wanted in accept.items())


def relevant(accept, corpus):
    "Return the ids of the listings that meet the conditions."
    return [id for id, found in corpus.items() if accepts(accept, found)]


def _write(path, records):
    "Write lines of JSON, atomically."
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    os.replace(temporary, path)


def main():
    texts = listings()
    corpus = {id: fields(text) for id, text in texts.items()}
    path = HERE / "rental.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    _write(path, [r | {"relevant": relevant(r["accept"], corpus)} for r in records])
    _write(HERE / "rental_corpus.jsonl", [{"_id": id, "text": text} for id, text in texts.items()])


if __name__ == "__main__": main()
