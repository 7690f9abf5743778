"""Writes listings.json: searches for rooms to rent, a listing that fits each, and listings that differ in one or two features.

    python data/rental/generate.py              # the committed file
    python data/rental/generate.py --rows 5000 --seed 1 --to more.json

Every text is put together from the lists below; nothing is collected from anywhere.
"""
import argparse
import json
import os
import random
from pathlib import Path

# Districts of three cities. A wrong place is another district of the same city.
PLACES = {
    "TP.HCM": ["Quận 1", "Quận 3", "Quận 5", "Quận 7", "Quận 10", "Quận 12", "Bình Thạnh", "Gò Vấp", "Phú Nhuận", "Tân Bình", "Thủ Đức"],
    "Hà Nội": ["Ba Đình", "Hai Bà Trưng", "Đống Đa", "Cầu Giấy", "Thanh Xuân", "Hoàng Mai", "Long Biên", "Hà Đông"],
    "Đà Nẵng": ["Hải Châu", "Thanh Khê", "Sơn Trà", "Liên Chiểu"],
}
KINDS = {"phòng trọ": 20, "phòng khép kín": 24, "căn hộ mini": 30, "studio": 28}   # usual size, m²
# (what a listing says, what it says where the feature is missing, how it is asked for)
AMENITIES = [
    ("wc riêng", "wc chung", "wc riêng"), ("có máy lạnh", "không máy lạnh", "máy lạnh"), ("có ban công", "không ban công", "ban công"),
    ("bếp riêng", "bếp dùng chung", "bếp riêng"), ("có gác lửng", "không gác", "có gác"), ("máy giặt riêng", "không máy giặt", "máy giặt"),
    ("cửa sổ lớn", "không cửa sổ", "có cửa sổ"), ("có thang máy", "chỉ thang bộ", "thang máy"), ("hầm để xe", "không chỗ để xe", "chỗ để xe"),
    ("nước nóng năng lượng", "không nước nóng", "nước nóng"),
]
FURNITURE = [("đầy đủ nội thất", "full nội thất"), ("nội thất cơ bản", "nội thất cơ bản"), ("phòng trống, chưa có đồ", "phòng trống")]
REQUIREMENTS = [
    ("không chung chủ", "ở cùng chủ nhà", "không chung chủ"), ("giờ giấc tự do", "đóng cửa lúc 23 giờ", "giờ tự do"),
    ("được nuôi thú cưng", "không nhận thú cưng", "nuôi được thú cưng"), ("chỉ cho nữ thuê", "chỉ cho nam thuê", "cho nữ"),
    ("nhận ở ngắn hạn", "hợp đồng từ 12 tháng", "thuê ngắn hạn"),
]
NEAR = ["gần chợ", "gần trường đại học", "gần bệnh viện", "gần bến xe", "gần công viên", "gần siêu thị", "trong hẻm yên tĩnh", "mặt tiền đường lớn"]
ASKING = [
    "Tìm {kind} {place}, {area}, {price}, {wishes}", "Cần thuê {kind} ở {place} tầm {price}, {wishes}", "{kind} {place} {price} {wishes}",
    "Mình muốn tìm {kind} khu {place}, rộng {area}, giá {price}, {wishes}", "Có {kind} nào {place} khoảng {price} mà {wishes} không ạ?",
    "{kind} {place} {area} {price} {wishes}", "Cho hỏi còn {kind} {place} giá {price}, {wishes} không?", "{place} {price} {area} {wishes}",
]


def price(tenths, rng):
    "A monthly rent, in one of the ways in which people write it: 5,5 triệu, 5.5tr, 5tr5."
    whole, rest = divmod(tenths, 10)
    if not rest: return rng.choice([f"{whole} triệu", f"{whole}tr"])
    return rng.choice([f"{whole},{rest} triệu", f"{whole}.{rest}tr", f"{whole}tr{rest}"])


def draw(rng):
    "The features of one listing."
    kind, city = rng.choice(list(KINDS)), rng.choices(list(PLACES), [6, 4, 2])[0]
    area = max(12, KINDS[kind] + 2 * rng.randint(-4, 6))
    return {"kind": kind, "city": city, "place": rng.choice(PLACES[city]), "area": area, "price": 5 * max(3, round(area * rng.uniform(1.2, 2.6) / 5)),
            "amenities": {a: rng.random() < .8 for a in rng.sample(range(len(AMENITIES)), 3)}, "requirements": {rng.randrange(len(REQUIREMENTS)): True},
            "furniture": rng.randrange(3) if rng.random() < .5 else None, "floor": rng.randint(1, 6) if rng.random() < .3 else None}


def listing(f, rng):
    "The text of a listing."
    parts = [AMENITIES[a][0 if there else 1] for a, there in f["amenities"].items()]
    parts += [REQUIREMENTS[r][0 if met else 1] for r, met in f["requirements"].items()]
    if f["furniture"] is not None: parts.append(FURNITURE[f["furniture"]][0])
    if f["floor"]: parts.append(f"tầng {f['floor']}")
    parts.append(f"giá {price(f['price'], rng)}")
    rng.shuffle(parts)
    head = rng.choice(["{kind} {area}m² {place}", "Cho thuê {kind} {place}, {area}m²", "{place}: {kind} rộng {area}m²"]).format(**f)
    return ", ".join([head[0].upper() + head[1:], *parts] + [rng.choice(NEAR)] * (rng.random() < .6))


def search(f, asked, rng):
    "The text of a search, which names the place, the rent, and what is in `asked`."
    wishes = [AMENITIES[a][2] for a in asked["amenity"]] + [REQUIREMENTS[r][2] for r in asked["requirement"]]
    if "furniture" in asked: wishes.append(FURNITURE[f["furniture"]][1])
    if "floor" in asked: wishes.append(f"tầng {f['floor']}")
    rng.shuffle(wishes)
    form = rng.choice([a for a in ASKING if ("{area}" in a) == ("area" in asked)])
    text = form.format(kind=f["kind"], place=f["place"], area=f"{f['area']}m2", price=price(f["price"], rng), wishes=rng.choice([", ", " "]).join(wishes))
    return text[0].upper() + text[1:] if rng.random() < .7 else text


def changed(f, kinds, asked, rng):
    "The features of a listing that differs in these kinds of feature, each of which the search names."
    f = {k: dict(v) if isinstance(v, dict) else v for k, v in f.items()}
    for kind in kinds:
        if kind == "location": f["place"] = rng.choice([p for p in PLACES[f["city"]] if p != f["place"]])
        if kind == "price": f["price"] = max(10, f["price"] + rng.choice([-15, -10, 10, 15, 20]))
        if kind == "area": f["area"] += rng.choice([-1, 1] if f["area"] > 18 else [1]) * rng.randint(4, 8)
        if kind == "furniture": f["furniture"] = rng.choice([i for i in range(3) if i != f["furniture"]])
        if kind == "floor": f["floor"] = rng.choice([i for i in range(1, 7) if i != f["floor"]])
        if kind == "amenity": a = rng.choice(asked["amenity"]); f["amenities"][a] = False
        if kind == "requirement": r = rng.choice(asked["requirement"]); f["requirements"][r] = False
    return f


def row(rng):
    "A search, its listing, and three to five listings that are wrong in a known way."
    f = draw(rng)
    has = [a for a, there in f["amenities"].items() if there]
    asked = {"amenity": rng.sample(has, min(len(has), rng.randint(1, 2))), "requirement": [r for r in f["requirements"] if rng.random() < .5]}
    asked |= {name: True for name, p in (("area", .5), ("furniture", .7), ("floor", .7)) if rng.random() < p and f[name] is not None}
    kinds = ["location", "price"] + [k for k in ("amenity", "area", "requirement", "furniture", "floor") if asked.get(k)]
    wrong = [["location"], ["price"]] + [[k] for k in rng.sample(kinds[2:], min(2, len(kinds) - 2))] + [rng.sample(kinds, 2)] * (rng.random() < .5)
    negatives = [{"text": listing(changed(f, w, asked, rng), rng), "type": w, "weight": 0} for w in wrong]
    return {"query": search(f, asked, rng), "pos": listing(f, rng), "hard_neg": negatives}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=500)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--to", type=Path, default=Path(__file__).with_name("listings.json"))
    args = p.parse_args()
    rng = random.Random(args.seed)
    lines = ",\n".join(json.dumps(row(rng), ensure_ascii=False) for _ in range(args.rows))
    temporary = args.to.with_suffix(".tmp")
    temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(temporary, args.to)


if __name__ == "__main__": main()
