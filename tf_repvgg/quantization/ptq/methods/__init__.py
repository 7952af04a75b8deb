"""The methods of post-training quantization, one file each, and `METHODS`, the one table of them.

A method is a function that changes a `Network` in place: the weights of its float form, as long as that computes the
same function (`equalize`); ranges of activations (`network.quantizers[name].set_range`); kernels and biases
(`network.set_kernel`). To add a method:

1. Write it in a file of its name here, with the source of the formula in the docstring.
2. Start from what is set, or from another method (`if not network.is_complete: mse(network)`). Set ranges by
   `network.set_ranges(rule)`, which keeps the rule of a method before.
3. Take settings from `network.options`, seed random draws with `options.seed`, and loop over
   `network.show_progress(...)`.
4. Report in `network.notes` what was left out.
5. Add it to `METHODS` below: `quantize`, export/main.py --ptq, the tests and the documents read it from there.
"""

from collections.abc import Callable
from typing import NamedTuple

from tf_repvgg.quantization.ptq.methods.adaquant import adaquant
from tf_repvgg.quantization.ptq.methods.adaround import adaround
from tf_repvgg.quantization.ptq.methods.bias_correct import bias_correct
from tf_repvgg.quantization.ptq.methods.bias_tune import bias_tune
from tf_repvgg.quantization.ptq.methods.class_impressions import class_impressions
from tf_repvgg.quantization.ptq.methods.codebook import codebook
from tf_repvgg.quantization.ptq.methods.codebook_adaquant import codebook_adaquant
from tf_repvgg.quantization.ptq.methods.dfq import dfq
from tf_repvgg.quantization.ptq.methods.dfq_data_free import dfq_data_free
from tf_repvgg.quantization.ptq.methods.equalize import equalize
from tf_repvgg.quantization.ptq.methods.mean_correct import mean_correct
from tf_repvgg.quantization.ptq.methods.min_max import min_max
from tf_repvgg.quantization.ptq.methods.mse import mse
from tf_repvgg.quantization.ptq.methods.octav import octav
from tf_repvgg.quantization.ptq.methods.percentile import percentile
from tf_repvgg.quantization.ptq.methods.relative import relative
from tf_repvgg.quantization.ptq.network import Network


class Method(NamedTuple):
    """One method of post-training quantization.

    Attributes:
      function: Function that changes a `Network` in place.
      summary: One sentence for documents and help texts.
      source: arXiv number of the paper; empty if there is none.
      needs_calibration: Whether the method reads calibration images.
      sets_ranges: Whether the method leaves all ranges of activations set.
      learns: Whether the method trains, with `Options.iterations` steps.

    Example:
      >>> from tf_repvgg.quantization import ptq
      >>> ptq.METHODS["adaround"].source, ptq.METHODS["adaround"].learns
      ('2004.10568', True)
    """

    function: Callable[[Network], None]
    summary: str
    source: str = ""
    needs_calibration: bool = True
    sets_ranges: bool = True
    learns: bool = False


METHODS = {
    "min_max": Method(min_max, "Ranges from the smallest to the largest value; nothing is clipped."),
    "percentile": Method(
        percentile, "Ranges that hold 99.99 % of the values (`Options.percentile`); the rest is clipped."
    ),
    "mse": Method(mse, "Ranges with the smallest mean squared error of clipping and rounding together.", "1902.06822"),
    "relative": Method(
        relative,
        "Activation ranges with the smallest error relative to each image's values, so that no single image decides "
        "them; weights of `mse`.",
    ),
    "octav": Method(
        octav,
        "Weights clipped where the noise of clipping and rounding together is smallest; activation ranges of `mse`.",
        "2206.06501",
    ),
    "class_impressions": Method(
        class_impressions,
        "Calibration images pushed towards random classes by the network's gradients, so that methods that learn do "
        "not forget the classes that the images lack; then `min_max`.",
        "1808.01153",
        sets_ranges=False,
    ),
    "equalize": Method(
        equalize,
        "Channels divided by factors, through depthwise layers and sums too, until ranges match; then `min_max`.",
        "1906.04721",
        needs_calibration=False,
        sets_ranges=False,
    ),
    "bias_correct": Method(
        bias_correct,
        "Biases corrected by the mean error of each layer's output, starting from `min_max`; kept only if the error of "
        "the network's outputs shrinks.",
        "1906.04721",
    ),
    "mean_correct": Method(
        mean_correct,
        "Biases that restore the mean of each layer's output behind its activation, starting from `mse`; kept only if "
        "the error of the network's outputs shrinks.",
        "1906.04721",
    ),
    "dfq": Method(dfq, "`equalize`, high-bias absorption if it reduces the error, and `bias_correct`.", "1906.04721"),
    "dfq_data_free": Method(
        dfq_data_free,
        "`dfq` without images: ranges and means follow from the statistics of the merged normalizations.",
        "1906.04721",
        needs_calibration=False,
    ),
    "adaround": Method(
        adaround,
        "Rounding of each weight, up or down, learned layer by layer, starting from `mse`; then `bias_tune`.",
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
        "All biases trained together to match the float network's outputs, starting from `mse`; kept only if their "
        "error shrinks.",
        "2006.10518",
        learns=True,
    ),
    "codebook": Method(
        codebook,
        "K-means codebooks (`Options.number_of_clusters`), weighted by the second moment of the inputs; activation "
        "ranges of `min_max`.",
    ),
    "codebook_adaquant": Method(
        codebook_adaquant,
        "Codes, centroids and biases learned layer by layer, starting from `codebook`; then `bias_tune`.",
        "2006.10518",
        learns=True,
    ),
}
