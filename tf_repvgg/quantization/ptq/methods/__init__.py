"""The methods of post-training quantization, one file each, and `METHODS`, the only table that knows all of them.

A method is a function of a `Network` that changes it in place: the float form's weights as long as its function stays
the same (`equalize`), ranges of activations (`network.quantizers[name].set_range`), kernels and biases
(`network.set_kernel`). To add one:

1. write it in a file of its name here, with the formula's source in the docstring;
2. start from what is set, or from another method's function (`if not network.is_complete: mse(network)`);
3. take settings from `network.options`, draw with `options.seed`, loop over `network.progress(...)`;
4. say in `network.notes` what was left out;
5. add it to `METHODS` below; export/main.py --ptq, combinations and the documents know it from there;
6. add its name to the tests in tests/test_ptq.py that run over `METHODS`.
"""

from collections.abc import Callable
from typing import NamedTuple

from tf_repvgg.quantization.ptq.methods.adaquant import adaquant
from tf_repvgg.quantization.ptq.methods.adaround import adaround
from tf_repvgg.quantization.ptq.methods.bias_correct import bias_correct
from tf_repvgg.quantization.ptq.methods.bias_tune import bias_tune
from tf_repvgg.quantization.ptq.methods.codebook import codebook
from tf_repvgg.quantization.ptq.methods.codebook_adaquant import codebook_adaquant
from tf_repvgg.quantization.ptq.methods.dfq import dfq
from tf_repvgg.quantization.ptq.methods.dfq_data_free import dfq_data_free
from tf_repvgg.quantization.ptq.methods.equalize import equalize
from tf_repvgg.quantization.ptq.methods.min_max import min_max
from tf_repvgg.quantization.ptq.methods.mse import mse
from tf_repvgg.quantization.ptq.methods.octav import octav
from tf_repvgg.quantization.ptq.methods.percentile import percentile
from tf_repvgg.quantization.ptq.network import Network


class Method(NamedTuple):
    """One method and what is known of it.

    Attributes:
      function: Changes a `Network` in place.
      summary: What the method does, in one line for documents.
      source: arXiv number of the paper; empty where there is none.
      needs_calibration: Whether the method looks at calibration images.
      sets_ranges: Whether the method sets all ranges of activations.
      learns: Whether the method trains, with `Options.iterations` steps.
    """

    function: Callable[[Network], None]
    summary: str
    source: str = ""
    needs_calibration: bool = True
    sets_ranges: bool = True
    learns: bool = False


METHODS = {
    "min_max": Method(min_max, "Ranges from the smallest to the largest value."),
    "percentile": Method(percentile, "Ranges that hold 99.99 % of the values (`percentile`)."),
    "mse": Method(mse, "Ranges with the smallest mean squared error.", "1902.06822"),
    "octav": Method(
        octav,
        "Weights clipped where clipping and rounding noise together are smallest; activations as `mse`.",
        "2206.06501",
    ),
    "equalize": Method(
        equalize,
        "Scales moved between consecutive layers until the ranges of their channels match.",
        "1906.04721",
        needs_calibration=False,
        sets_ranges=False,
    ),
    "bias_correct": Method(bias_correct, "Biases corrected by the mean error of each layer's output.", "1906.04721"),
    "dfq": Method(dfq, "`equalize`, high-bias absorption where it helps, and `bias_correct`.", "1906.04721"),
    "dfq_data_free": Method(
        dfq_data_free,
        "`dfq` without images: ranges and means follow from the statistics of the merged batch normalizations.",
        "1906.04721",
        needs_calibration=False,
    ),
    "adaround": Method(
        adaround,
        "Rounding up or down learned layer by layer, starting from `mse`; then `bias_tune`.",
        "2004.10568",
        learns=True,
    ),
    "adaquant": Method(
        adaquant,
        "Codes, scales and biases learned layer by layer, starting from `mse`; then `bias_tune`.",
        "2006.10518",
        learns=True,
    ),
    "bias_tune": Method(
        bias_tune,
        "All biases trained together to match the outputs of the float network; kept only where the error shrinks.",
        "2006.10518",
        learns=True,
    ),
    "codebook": Method(codebook, "K-means codebooks, errors weighted by the second moment of the inputs."),
    "codebook_adaquant": Method(
        codebook_adaquant,
        "Codes, centroids and biases learned layer by layer, starting from `codebook`; then `bias_tune`.",
        "2006.10518",
        learns=True,
    ),
}
