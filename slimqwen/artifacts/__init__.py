"""Writing of artefacts: atomically, under a lock, with a record of ownership and a fingerprint.

An artefact is written under a hidden name and renamed when it is complete: however a stage is interrupted, nothing
incomplete looks finished. A folder holds a record of the files written into it, and a file begins with a mark, so that
nothing else is ever replaced or removed. One process makes an artefact at a time.
"""

from slimqwen.artifacts.disk import full_disk_explained
from slimqwen.artifacts.identity import fingerprint, fingerprint_value
from slimqwen.artifacts.lock import alone, alone_in
from slimqwen.artifacts.ownership import (
    check_file_replaceable,
    check_replaceable,
    claim_folder,
    discard,
    remove_ours,
    tidy,
)
from slimqwen.artifacts.record import MARKER, TEXT_MARK, is_marked
from slimqwen.artifacts.writing import (
    atomic_file,
    atomic_folder,
    joined_folder,
    make_file,
    make_folder,
    makes_file,
    makes_folder,
    resumable_folder,
    rewrite_bytes,
    rewrite_text,
    scratch_folder,
    write_json,
    write_text,
)

__all__ = [
    "MARKER",
    "TEXT_MARK",
    "alone",
    "alone_in",
    "atomic_file",
    "atomic_folder",
    "check_file_replaceable",
    "check_replaceable",
    "claim_folder",
    "discard",
    "fingerprint",
    "fingerprint_value",
    "full_disk_explained",
    "is_marked",
    "joined_folder",
    "make_file",
    "make_folder",
    "makes_file",
    "makes_folder",
    "remove_ours",
    "resumable_folder",
    "rewrite_bytes",
    "rewrite_text",
    "scratch_folder",
    "tidy",
    "write_json",
    "write_text",
]
