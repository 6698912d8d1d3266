"""Hooks of the documentation site."""

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name other objects as Sphinx does; a page shows the last part of such a name."""
    return _ROLE.sub(lambda found: f"<code>{found[1].rpartition('.')[2]}</code>", html)
