"""What a file is, by its first bytes: for messages about files that hold no weights."""

__all__ = ["describe_content"]

_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: `git lfs pull` gets it"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x89HDF", "an HDF5 file, as Keras writes: its weights are not read here"),
    (b"\x93NUMPY", "a single NumPy array: save a dictionary of named ones with numpy.savez"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml")


def describe_content(head: bytes) -> str:
    """In words, what a file that starts with these bytes (some hundreds) looks like."""
    if not head:
        return "the file is empty"
    if head[257:262] == b"ustar":
        return "it is a tar archive (torch < 0.2 wrote such files too): unpack it first"
    for magic, words in _KINDS:
        if head.startswith(magic):
            return f"it is {words}"
    text = head.lstrip().lower()
    if text.startswith(_PAGES):
        return "it is a web page, not the file itself: the download has failed"
    if text.startswith((b"{", b"[")):
        return (
            "it is JSON text, as the index of weights in several files is; name a file of tensors"
        )
    if head[0] == 0x80 and len(head) > 1 and head[1] <= 5:
        return "it is a pickle that torch.save did not write, and pickles of others are not opened"
    return f"it starts with {head[:24]!r}"
