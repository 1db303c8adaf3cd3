"""Draw the README's picture from the demo's report: its verdict and its first figure, with the page's own style.

resta demo && python .github/picture.py resta-demo/verify/report.html .github/demo.svg
"""

import re
import sys
from pathlib import Path

WIDTH = 860
FRAME = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<foreignObject width="{width}" height="{height}"><div xmlns="http://www.w3.org/1999/xhtml" class="picture">
<style>{style}
.picture {{ font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); padding: 1rem; }}
</style>
{body}
</div></foreignObject>
</svg>
"""


def part(page: str, pattern: str) -> str:
    """Return the first part of a page that matches."""
    found = re.search(pattern, page, re.DOTALL)
    if found is None:
        raise SystemExit(f"the report has no part like {pattern}")
    return found[0]


def main(report: Path, out: Path) -> None:
    """Write the picture. The page is HTML whose parts are XML but for the named entities."""
    page = report.read_text(encoding="utf-8").replace("&nbsp;", "\u00a0")
    style = part(page, r"(?<=<style>).*?(?=</style>)")
    body = part(page, r'<(\w+) class="verdict.*?</\1>') + part(page, r'<figure class="rows">.*?</figure>')
    body = body.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    height = 210 + 28 * body.count("<li>")
    svg = FRAME.format(width=WIDTH, height=height, style=style.replace("&", "&amp;").replace("<", "&lt;"), body=body)
    out.write_text("\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
