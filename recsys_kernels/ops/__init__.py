"""The families of operators, one folder each."""

from importlib import import_module

# Each declares its operators in ``spec.py``, which must have run when the native library loads: its kernels register
# with the schemas. A new family is one more line.
FAMILIES = (
    "embedding_bag",
    "linear.int8",
    "linear.sparse",
)

for _family in FAMILIES:
    import_module(f".{_family}.spec", __name__)
