"""Fingerprints of folders: equal if two runs have computed the same, whatever the time and the place."""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tensorflow as tf

# Times, and what depends on the folder or the moment.
_VOLATILE = re.compile(r"seconds|latency|machine|flags|date_saved|record_sha256|_ms_")
_IGNORED = re.compile(r"tfevents|^\.lock$|\.lock$")


def take_fingerprint(folder: Path) -> dict[str, str]:
    """{relative path of a file: digest of what a rerun must give again} for all files of a finished work.

    Times are left out. So are TensorBoard's files, of which every process starts another, and locks.
    """
    return {
        str(path.relative_to(folder)): hashlib.sha256(_read_lasting_content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _IGNORED.search(path.name)
    }


def hash_files(folder: Path, leave_out: Collection[str] = ()) -> dict[str, str]:
    """{relative path: SHA-256 of its bytes} for all regular files but locks, links not followed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.name not in {".lock", *leave_out}
    }


def describe_difference(fingerprint: dict[str, str], expected: dict[str, str]) -> str:
    """The files that differ, are missing, or are there although they should not be; empty if there is none."""
    names = sorted(name for name in fingerprint.keys() | expected.keys() if fingerprint.get(name) != expected.get(name))
    return ", ".join(names)


def _read_lasting_content(path):
    content = path.read_bytes()
    if path.suffix == ".keras":
        return _dump(_read_model(content))
    if path.suffix == ".npz":
        with np.load(io.BytesIO(content)) as arrays:
            return _dump({name: _describe_array(arrays[name]) for name in sorted(arrays)})
    if ".tfrecord" in path.name:  # in which the order of features differs between processes
        examples = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
        return b"".join(tf.train.Example.FromString(e).SerializeToString(deterministic=True) for e in examples)
    if path.suffix in (".json", ".jsonl"):
        return _dump([_leave_out_volatile(json.loads(line)) for line in _split_records(path, content.decode())])
    if path.suffix == ".html":  # latencies move its curves; the rest of its numbers are in export.json
        text = content.decode()
        return _dump([text.endswith("</html>\n") or text.endswith("</html>"), re.findall(r'<\w+ id="(\w+)"', text)])
    return content


def _split_records(path, text):
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _leave_out_volatile(value):
    if isinstance(value, dict):
        return {key: _leave_out_volatile(entry) for key, entry in value.items() if not _VOLATILE.search(key)}
    return [_leave_out_volatile(entry) for entry in value] if isinstance(value, list) else value


def _read_model(content) -> dict[str, Any]:
    record: dict[str, Any] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        record["config"] = json.loads(archive.read("config.json"))
        with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as weights:

            def add(name, node):
                if isinstance(node, h5py.Dataset):
                    record[name] = _describe_array(node[()])

            weights.visititems(add)
    return record


def _describe_array(array):
    array = np.asarray(array)
    return [str(array.dtype), list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]


def _dump(record):
    return json.dumps(record, sort_keys=True, default=str).encode()
