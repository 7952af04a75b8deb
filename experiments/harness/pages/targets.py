"""The page of experiments/targets.py."""

from harness.tables import IMAGES, make_paragraph, make_table
from tf_repvgg.quantization.uniform import GRANULARITIES

_HEADERS = (
    "weights",
    "LiteRT",
    "TFLite Micro",
    "bit for bit",
    "file kB",
    "packed kB",
    "over bound",
    "Vela kB",
    "of int8",
    "ms",
    "on NPU",
)


def render(record: dict) -> str:
    """The page in Markdown, from the content of targets.json."""
    introduction = make_paragraph(
        f"""`python experiments/targets.py`: {record["config"]}, {record["exports"][0]["images"]:,} test images, top-1
        in percent. "bit for bit": share of the images on which TFLite Micro computes the same from tables as from the
        int8 file. "packed": the file with tables for TFLite Micro; "over bound" is its size over indices and tables
        and everything that is not weights. Vela's columns are the bytes of the weights as it encodes them, their
        share of the int8 weights, the milliseconds that it estimates for {record["accelerator"]}, and the operators
        that it puts on the NPU. {IMAGES}"""
    )
    return f"# Runtimes\n\n{introduction}\n\n{make_runtimes_table(record)}"


def make_runtimes_table(record: dict) -> str:
    """One row per file; a cell is empty where the file was not made ready for a runtime."""
    files = [file for export in record["exports"] for file in export["files"]]
    return make_table([_make_row(file, record["accelerator"]) for file in files], _HEADERS)


def _make_row(file, accelerator):
    micro, vela = file["targets"].get("tflm_lut", {}), file["targets"][accelerator]
    packed = micro or file["targets"].get("litert_int4", {})
    grid = "codebook" if file["ptq"] == "codebook" else "uniform"
    return [
        f"{grid}, {file['weight_bits']} bit, {GRANULARITIES[file['granularity']]}",
        f"{file['top1_percent']:.2f}",
        f"{micro['top1_percent']:.2f}" if micro else "",
        f"{micro['equal_to_int8_file_on_same_kernels_percent']:.0f} %" if micro else "",
        f"{file['file_bytes'] / 1000:.0f}",
        f"{packed['file_bytes'] / 1000:.0f}" if packed else "",
        f"{micro['file_over_bound']:.3f}" if micro else "",
        f"{vela['encoded_weight_bytes'] / 1000:.0f}",
        f"{100 * vela['encoded_over_raw']:.0f} %",
        f"{vela['inference_ms_estimated']:.2f}",
        f"{vela['npu_operators']} of {vela['npu_operators'] + vela['cpu_operators']}",
    ]
