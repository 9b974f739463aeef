"""Reports: self-contained HTML pages, made from the files in the folders of runs.

A page needs no network. A script inside it makes its SVG charts respond to pointer, touch and
keyboard; without the script everything is still readable.
"""

from ssl_jax.report.charts import nice_ticks
from ssl_jax.report.comparison import write_comparison
from ssl_jax.report.evaluation import evaluation_table
from ssl_jax.report.map import write_images
from ssl_jax.report.reading import images_settings
from ssl_jax.report.single import write_report

__all__ = [
    "evaluation_table",
    "images_settings",
    "nice_ticks",
    "write_comparison",
    "write_images",
    "write_report",
]
