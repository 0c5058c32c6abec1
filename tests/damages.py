"""What may happen to a file on a disk."""


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncate": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "flip": flip,
    "zero": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "delete": lambda path: path.unlink(),
}
