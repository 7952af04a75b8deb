"""Zip archives from elsewhere, before anything in them is unpacked."""

import zipfile

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def check_compression(archive: zipfile.ZipFile) -> None:
    """Checks that members are stored or deflated, which alone unpack to no more bytes than they state.

    Raises:
      ValueError: If one is not; names it.
    """
    for member in archive.infolist():
        if member.compress_type not in _METHODS:
            raise ValueError(
                f"its member {member.filename!r} is compressed by method {member.compress_type}; zip it with deflate, "
                "or without compression"
            )
