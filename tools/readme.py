"""Make README.md from nbs/index.ipynb, without Quarto: prose, code and text outputs, with links that work on the
repository's page.

    python tools/readme.py            write README.md
    python tools/readme.py --check    exit 1 when README.md is not what would be written
"""
import base64
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat

root = Path(__file__).parent.parent
HIDDEN = re.compile(r"^#\|\s*(hide|include:\s*false)\b", re.M)
SILENT = re.compile(r"^#\|\s*echo:\s*false\b", re.M)   # outputs without their code


def text_of(output):
    "What an output shows as text; Markdown stays Markdown."
    data = output.get("data", {})
    if "text/markdown" in data: return data["text/markdown"]
    text = output.get("text") or data.get("text/plain", "")
    return f"```\n{text.rstrip()}\n```" if text.strip() else ""


def readme():
    "The text of README.md, and the pictures that go beside it: {path: bytes}."
    config = ConfigParser()
    config.read(root / "settings.ini", encoding="utf-8")
    source = root / config["DEFAULT"]["nbs_path"] / config["DEFAULT"]["readme_nb"]
    parts, pictures = [f"<!-- Made from nbs/{source.name} by tools/readme.py. Edit the notebook. -->"], {}
    for cell in nbformat.read(source, as_version=4).cells:
        if cell.cell_type == "markdown": parts.append(re.sub(r"(\]\(|src=\")(?!\w+:|[/#])", r"\1nbs/", cell.source))
        if cell.cell_type != "code" or HIDDEN.search(cell.source): continue
        code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
        if not SILENT.search(cell.source): parts.append(f"```python\n{code}\n```")
        for output in cell.outputs:
            if picture := output.get("data", {}).get("image/png"):
                name = f"nbs/images/readme_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(picture)
                alt = re.search(r"^#\|\s*fig-alt:\s*\"?(.*?)\"?$", cell.source, re.M)
                parts.append(f"![{alt[1] if alt else ''}]({name})")
            elif text := text_of(output): parts.append(text)
    return "\n\n".join(p for p in parts if p.strip()).replace("```{mermaid}", "```mermaid") + "\n", pictures


def main():
    text, pictures = readme()
    files = {"README.md": text.encode("utf-8"), **pictures}
    if "--check" in sys.argv:
        stale = [n for n, content in files.items() if not (root / n).is_file() or (root / n).read_bytes() != content]
        if stale: sys.exit(f"{', '.join(stale)}: not what nbs/index.ipynb says; run `make readme`")
        return
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)


if __name__ == "__main__": main()
