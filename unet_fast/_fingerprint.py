"""Hash of the native sources, so that a recorded result names the code that gave it. Imports nothing heavy: setup.py uses it."""

import hashlib
import pathlib
import subprocess


def source_fingerprint(root):
    """SHA-256 over CMakeLists.txt and every tracked file of csrc/, in byte order of their paths: each path, then its bytes.

    Args:
        root: folder that holds CMakeLists.txt and csrc/. Where it is no git work tree (a source distribution), every
            file of csrc/ counts.

    Returns:
        64 hexadecimal digits, or None where `root` holds no sources (an installed wheel).
    """
    root = pathlib.Path(root)
    if not (root / "CMakeLists.txt").is_file() or not (root / "csrc").is_dir():
        return None
    try:
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "CMakeLists.txt", "csrc"], capture_output=True, check=True
        ).stdout
        paths = [name.decode() for name in listed.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = []
    if not paths:
        files = [path for path in (root / "csrc").rglob("*") if path.is_file()]
        paths = ["CMakeLists.txt", *(path.relative_to(root).as_posix() for path in files)]
    digest = hashlib.sha256()
    for path in sorted(paths, key=str.encode):
        digest.update(path.encode())
        digest.update((root / path).read_bytes())
    return digest.hexdigest()
