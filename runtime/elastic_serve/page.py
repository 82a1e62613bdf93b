"""The page at `/`, one file that loads nothing from elsewhere; what it may do is said in its headers."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from elastic_runtime.files.site import STYLE

PAGE = Path(__file__).with_name("page.html")


@cache
def html() -> bytes:
    """The page, with the style that it shares with sites."""
    head, style, rest = PAGE.read_text(encoding="utf-8").partition("<style>\n")
    return (head + style + STYLE.read_text(encoding="utf-8") + rest).encode()


@cache
def headers() -> dict[str, str]:
    """Only the page's own script and style run, and it talks to its own server alone."""
    text = html().decode()
    allowed = [
        f"{kind}-src {' '.join(_digest(body) for body in re.findall(rf'<{kind}>(.*?)</{kind}>', text, re.S))}"
        for kind in ("script", "style")
    ]
    policy = [
        "default-src 'none'",
        *allowed,
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "same-origin",
        "cache-control": "no-cache",
    }


def _digest(body: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"
