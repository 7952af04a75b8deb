"""fit.json, as an object that answers the template's questions about its numbers."""

from collections.abc import Mapping

from harness.results.sources import name_machines


class Fit:
    """fit.json."""

    def __init__(self, record: Mapping) -> None:
        self._cells = record["cells"]
        self.correlations = [content["rank_correlation"] for content in record["correlations"].values()]
        self.images = record["cells"][0]["images"]
        self.machine = name_machines([record["machine"]])

    def top1(self, model: str, method: str, clusters: int, way: str) -> float:
        """Top-1 of TFLite Micro's files with the bytes of a uniform number of clusters."""
        return self._find(model, method, clusters, way)["top1_percent"]

    def file_bytes(self, model: str, clusters: int) -> int:
        """Bytes of TFLite Micro's file with a uniform number of clusters."""
        return self._find(model, "codebook", clusters, "uniform")["measured"]["file_bytes"]

    def _find(self, model, method, clusters, way):
        (cell,) = (
            cell
            for cell in self._cells
            if (cell["target"], cell["model"], cell["method"]) == ("tflm_lut", model, method)
            and (cell["clusters"], cell["way"]) == (clusters, way)
        )
        return cell

    def lead(self, model: str, method: str, clusters: int) -> float:
        """Fitted minus uniform top-1."""
        return self.top1(model, method, clusters, "fitted") - self.top1(model, method, clusters, "uniform")
