"""Folders that were changed on purpose, and a disk that is full."""

import json
import resource

from bayeslora.files.writing import sha256_of
from bayeslora.storage.manifest import FILES, MANIFEST, digest_of


def reseal(folder, **changes):
    """Make the manifest agree with files that were changed on purpose."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) | changes
    manifest["sha256"] = {name: sha256_of(folder / name) for name in FILES}
    manifest["digest"] = digest_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


class FullAfter:
    """Inside, no file can grow beyond so many bytes: the kernel refuses with EFBIG, as with ENOSPC on a full disk."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
