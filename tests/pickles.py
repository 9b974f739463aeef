"""Pickles written opcode by opcode: harmful ones, and small ones of huge objects."""


class Crafted:
    """A pickle written opcode by opcode."""

    def __init__(self, *parts):
        self.data = b"\x80\x02" + b"".join(parts) + b"."


def called(module, name, *arguments):
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def number(value):
    return f"I{value}\n".encode()


def text(value):
    return f"V{value}\n".encode()


HOSTILE = {
    # An array of objects, whose bytes would be used as pointers.
    "pointers": called("numpy", "dtype", text("O8"), number(0), number(1)),
    "pointers in a dtype's state": called("numpy", "dtype", text("f8"))
    + b"("
    + number(3)
    + text("|")
    + b"NN"
    + number(-1)
    + number(-1)
    + number(63)
    + b"tb",
    "a changed factory": b"ctorch._utils\n_rebuild_tensor_v2\n}("
    + text("array")
    + number(1)
    + b"ub",
    "a changed class": called("torch._utils", "_rebuild_tensor_v2", number(1)) + b"}b",
    "an attribute of a builtin": called("builtins", "getattr", b"cos\nsystem\n", text("x")),
    "an array without numbers": called(
        "numpy.core.multiarray",
        "_reconstruct",
        b"cnumpy\nndarray\n",
        b"(" + number(0) + b"t",
        b"Vb\n",
    ),
    "deep": b"(" * 50_000 + b"t" * 50_000,
}

# Small files that would take the process down, or gigabytes, or forever.
SHARED = b"]q\0" + b"".join(  # each list has the last one twice
    b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(60)
)
EXPENSIVE = {
    "nested tuples as a key": b"})" + b"\x85" * 100_000 + b"Ns",
    "a huge memo index": b"]r\xff\xff\xff\x7f",
    "an endless repr": SHARED + called("numpy", "dtype", b"h\x3c"),
    "an endless name of a storage": SHARED + b"(Vstorage\nctorch\nFloatStorage\nh\x3cVcpu\nK\x01tQ",
    "integers with the same hash": b"}("
    + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(9000))
    + b"u",
    "many uses of the same bytes": b"("
    + text("x" * 500_000).replace(b"\n", b"\nq\0")
    + b"c_codecs\nencode\nq\x01"
    + b"(h\x01h\0\x85Rl" * 5000
    + b"t",
}
EXPENSIVE["an endless repr of a key"] = EXPENSIVE["an endless repr"] + b"0}h\x3cNs"
