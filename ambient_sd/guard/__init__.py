"""Score what a live pipeline samples, and mitigate memorization. It uses the maths and the families, and no training."""

from __future__ import annotations
