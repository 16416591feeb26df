"""What the commands end with; 0 is success."""

from __future__ import annotations

EXIT_MATCH = 1
EXIT_USAGE = 2
EXIT_UNREADABLE = 3
