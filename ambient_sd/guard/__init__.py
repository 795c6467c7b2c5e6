"""The guard wing: score what a live pipeline samples, and mitigate. It uses the maths and no other wing."""

from __future__ import annotations
