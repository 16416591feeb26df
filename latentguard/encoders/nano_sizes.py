"""Numbers of the nano models' networks that judging without torch needs, too."""

from __future__ import annotations

GRID = 32
"""Cells per side at which the trunk was trained: 256 px at factor 8."""
SMALLEST = 8
"""Rows or columns below which a grid is not halved."""
OCTAVES = (0.056, 0.068, 0.079, 0.09)
"""Deviation of the octaves of pictures of 64 x 64 pixels in [0, 1], the finest first: the geometric
mean over 300 photos of Caltech-101."""
VIEW = (-1.0, 2.0)
"""What a view is cut to before its octaves are measured. Pictures are in about [0, 1]; beside one
huge cell all others would vanish."""
COARSE = 0.143
"""Deviation of what is coarser than all of them."""
