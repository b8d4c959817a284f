"""All formats."""

import formats_commands
import formats_genomics
import formats_series
import formats_vision
import formats_weights

FORMATS = [
    *formats_genomics.FORMATS,
    *formats_series.FORMATS,
    *formats_vision.FORMATS,
    *formats_weights.FORMATS,
    *formats_commands.FORMATS,
]
