"""Lets every write of the storage layer fail, one after the other: python tests/helpers/write_points.py FOLDER

For each, the disk is full from that write on, and then the process is killed there; afterwards the same work completes.
Prints the number of writes. It forks for every fault, which is fast as long as TensorFlow is not imported: the storage
layer needs one of its exceptions only.
"""

import os
import signal
import sys
import types
from pathlib import Path

from write_faults import FULL, KILL, Writes

package = types.ModuleType("tf_repvgg")
package.__path__ = [str(Path(__file__).parents[2] / "tf_repvgg")]
tensorflow = types.ModuleType("tensorflow")
tensorflow.errors = types.SimpleNamespace(OpError=type("OpError", (Exception,), {}))
sys.modules.update({"tf_repvgg": package, "tensorflow": tensorflow})

from tf_repvgg import storage  # noqa: E402

INPUTS = {"bits": 4}
NAMES = {"input.json", "metrics.jsonl", "file.tflite", "ckpt-5/state", "ckpt-5/position.json"}


def write_as_programs_do(folder):
    """Every kind of write: a record, a folder of files, a line, a result that is kept, a file."""
    storage.claim_folder(folder)
    storage.write_json(folder / "input.json", {"dataset": "digits"})
    if not (folder / "ckpt-5").exists():
        with storage.atomic_write(folder / "ckpt-5") as temporary:
            temporary.mkdir()
            for name in ("state", "position.json"):
                (temporary / name).write_bytes(name.encode() * 1000)
    if not (folder / "metrics.jsonl").exists():
        storage.append_line(folder / "metrics.jsonl", '{"epoch": 1}')
    work = storage.FinishedWork(folder / ".unfinished", is_sealed=True)
    if work.find("int4", INPUTS) is None:
        work.keep("int4", INPUTS, {"top1": 91.25}, b"TFL3" * 100)
    storage.write_bytes(folder / "file.tflite", work.read_content("int4"))
    work.remove()


def run_with_fault(folder, number=0, ending=FULL):
    """Exit status and message of a process whose write of that number fails; the number of writes if none does."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        status, message = 0, ""
        try:
            writes = Writes(str(folder), number, ending)
            write_as_programs_do(folder)
            message = str(writes.count)
        except OSError as error:
            status, message = 2, str(error)
        os.write(writing, message.encode())
        os._exit(status)
    os.close(writing)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reading) as pipe:
        return status, pipe.read()


def read_files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def main():
    root = Path(sys.argv[1])
    (root / "whole").mkdir()
    status, count = run_with_fault(root / "whole")
    expected = read_files(root / "whole")
    assert status == 0 and set(expected) == NAMES, (status, expected)
    for number in range(1, int(count) + 1):
        folder = root / str(number)
        folder.mkdir()
        status, message = run_with_fault(folder, number, FULL)
        assert status == 2 and "No space left on device" in message, (number, status, message)
        status, _ = run_with_fault(folder, number, KILL)
        assert status in (0, -signal.SIGKILL), (number, status)  # 0: the first process has done a part of the writes
        for name, content in read_files(folder).items():
            is_temporary = ".partial/" in name or name.startswith(".unfinished/")
            assert is_temporary or content == expected[name], f"{name} is not whole after a fault at write {number}"
        status, message = run_with_fault(folder)
        assert status == 0 and read_files(folder) == expected, (number, message)
    print(count)


if __name__ == "__main__":
    main()
