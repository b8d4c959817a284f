"""All formats."""

import formats_genomics

FORMATS = [*formats_genomics.FORMATS]
