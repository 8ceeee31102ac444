"""The next tokens as they are shown: which of them the graph explains, and for or against what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qkattr.characters import readable
from qkattr.errors import quoted
from qkattr.result import Traced


def predictions(result: Traced) -> list[dict[str, Any]]:
    """The next tokens, each with its `role`: "target" (its logit is explained), "for" and "against"
    (the graph explains the logit of the first less that of the second), or ""."""
    subtracted = {p["against"] for p in result.predictions if p["against"] >= 0}
    return [{**p, "role": _role(p, subtracted)} for p in result.predictions]


def _role(prediction: Mapping[str, Any], subtracted: set[int]) -> str:
    if prediction["against"] >= 0:
        return "for"
    if prediction["id"] in subtracted:
        return "against"
    return "target" if prediction["target"] else ""


def shown(result: Traced, most: int) -> list[dict[str, Any]]:
    """The likeliest next tokens and, however unlikely, all that have a role; each with a `note`
    that says its role in words."""
    listed = predictions(result)
    text = {p["id"]: quoted(readable(p["token"])) for p in listed}
    other = next((p["against"] for p in listed if p["role"] == "for"), None)
    one = next((p["id"] for p in listed if p["role"] == "for"), None)
    notes = {
        "target": "traced",
        "for": f"for: traced is its logit less that of {text.get(other)}",
        "against": f"against: its logit is subtracted from that of {text.get(one)}",
        "": "",
    }
    return [{**p, "note": notes[p["role"]]} for i, p in enumerate(listed) if i < most or p["role"]]
