"""Drawings of layouts, as SVG and as text: who owns what, where memory is, where accesses meet, where values travel."""

from tilus.layout.draw.access import access_svg, access_table
from tilus.layout.draw.banks import bank_svg, bank_table
from tilus.layout.draw.conversion import conversion_svg, conversion_table
from tilus.layout.draw.tiles import svg, text_table

__all__ = [
    "access_svg",
    "access_table",
    "bank_svg",
    "bank_table",
    "conversion_svg",
    "conversion_table",
    "svg",
    "text_table",
]
