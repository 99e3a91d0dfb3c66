"""The language: decorated Python functions are parsed (never run) and become `tilus.ir.Function`."""
