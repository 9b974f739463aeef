"""Reports: HTML pages with everything inside, made from what runs left in their folders.

A page needs no network. Its charts are SVG, which a script inside the page makes answer to the
pointer, the finger and the keyboard; without it everything is still there to read.
"""

from ssl_jax.report.charts import nice_ticks
from ssl_jax.report.comparison import write_comparison
from ssl_jax.report.single import write_report

__all__ = ["nice_ticks", "write_comparison", "write_report"]
