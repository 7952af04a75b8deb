"""The page of experiments/any_model.py."""

from collections.abc import Iterable, Mapping
from typing import Any

from harness.any_model.applications import NETWORKS, TENSORFLOW
from harness.any_model.judge import FAULTS, OUTCOMES, REFUSED
from harness.tables import make_paragraph, make_table

# Points by which a file may agree less often with the float network than TensorFlow's own file.
ACCEPTED_DEFICIT = 5.0


def render(record: Mapping[str, Any]) -> str:
    """The page in Markdown, from the content of any_model.json, which may have one of its two parts only."""
    parts = ["# Any Keras model"]
    if "random" in record:
        parts.append(_render_random(record["random"]))
    if "applications" in record:
        parts.append(_render_applications(record["applications"]))
    return "\n\n".join(parts)


def list_faults(record: Mapping[str, Any]) -> list[str]:
    """Every fault in a line: of random models, and of networks whose files agree too seldom with the float network."""
    faults = [
        f"random model {fault['seed']}, {fault['way']}: {fault['outcome']}: {fault['detail']}"
        for fault in record.get("random", {}).get("faults", ())
    ]
    for name, network in record.get("applications", {}).get("networks", {}).items():
        least = find_least_agreement(network)
        for way, result in network["ways"].items():
            faults += [f"{name}, {way}: {outcome}: {result[outcome]}" for outcome in FAULTS if outcome in result]
            if result.get("agreement_percent", least) < least:
                faults.append(f"{name}, {way}: agrees on {result['agreement_percent']:.1f} %, {least:.1f} expected")
    return faults


def find_least_agreement(network: Mapping[str, Any]) -> float:
    """Agreement in percent that every file of a network must have."""
    return network["ways"][TENSORFLOW]["agreement_percent"] - ACCEPTED_DEFICIT


def count_outcomes(random: Mapping[str, Any]) -> dict[str, int]:
    """{outcome: number of files and refusals} over all ways."""
    return {name: sum(way.get(name, 0) for way in random["outcomes"].values()) for name in OUTCOMES}


def make_outcomes_table(random: Mapping[str, Any]) -> str:
    """One row per way, and one for all."""
    rows = [[way, *(counts.get(name, 0) for name in OUTCOMES)] for way, counts in random["outcomes"].items()]
    return make_table([*rows, ["all", *count_outcomes(random).values()]], ["way", *OUTCOMES])


def make_reasons_table(reasons: Iterable[Mapping[str, Any]]) -> str:
    """One row per reason of a refusal."""
    return make_table([[reason["count"], reason["reason"].replace("|", "\\|")] for reason in reasons], ["", "reason"])


def make_applications_table(networks: Mapping[str, Any]) -> str:
    """One row per network: agreement with the float network in percent."""
    ways = next(iter(networks.values()))["ways"]

    def format_cell(result):
        return f"{result['agreement_percent']:.1f}" if "agreement_percent" in result else next(iter(result))

    rows = [[name, *(format_cell(network["ways"][way]) for way in ways)] for name, network in networks.items()]
    return make_table(rows, ["network", *ways])


def _render_random(random):
    counts = count_outcomes(random)
    steps, error = random["steps"], random["error"]
    last = random["first_seed"] + random["models"] - 1
    introduction = make_paragraph(
        f"""`python experiments/any_model.py --models={random["models"]}`: {random["models"]:,} random models, seeds
        {random["first_seed"]} to {last}. Each is a chain of two to five parts
        of `experiments/harness/any_model/parts.py` with one or two heads,
        some with two inputs, pixels as inputs, or a fixed batch; each takes {random["ways_per_model"]} of
        {len(random["outcomes"])} ways to a file, drawn from its seed."""
    )
    meaning = make_paragraph(
        """Right: the file computes what its quantized Keras model computes, up to the rounding of kernels, on all
        images, and its error against the float model is one that so many bits explain. Refused: a ValueError in one
        line before any work. Wrong: a file that departs, or a refusal of the library to hand one out. Refused late: an
        error after quantization or training. Crashed: any other error."""
    )
    text = [
        "## Random models",
        introduction,
        meaning,
        make_outcomes_table(random),
        make_paragraph(f"Faults: {sum(counts[name] for name in FAULTS)}."),
    ]
    if steps and error:
        steps_share, error_share = (100 * distances["largest_share_of_bound"] for distances in (steps, error))
        text.append(
            make_paragraph(
                f"""Of the right files, outputs are {steps["median"]:.1f} steps of their grid from those of the
                quantized model (median of the largest difference of each file), {steps_share:.0f} % of what is accepted
                at most; the error against the float model is {error["median"]:.3f} of the outputs (median; root mean
                squares), {error_share:.0f} % of what is accepted at most."""
            )
        )
    if random["faults"]:
        lines = [f"- {fault['way']}, seed {fault['seed']}: {fault['detail']}" for fault in random["faults"]]
        text += ["### Faults", "\n".join(make_paragraph(line) for line in lines)]
    text += [
        "### Reasons of refusals",
        make_paragraph(f"{counts[REFUSED]:,} refusals; names are replaced by '...' and numbers by N."),
        make_reasons_table(random["reasons"]),
    ]
    return "\n\n".join(text)


def _render_applications(record):
    introduction = make_paragraph(
        f"""`python experiments/any_model.py --norandom --data_dir=...`: networks with random weights for ten classes at
        96x96, without softmax; normalizations have the statistics of {record["calibration_images"]} photographs, which
        serve for calibration too, and the classifier's biases make the mean logits zero. The table has the share of
        {record["test_images"]} other photographs, in percent, on which a file chooses the class of the float network.
        TensorFlow is the converter's own int8 file of the same fused network, per channel. min_max, mse, relative and
        ClusterQAT (64 clusters, not trained) are per channel too. Every file must be at most
        {ACCEPTED_DEFICIT:g} points below TensorFlow's. Photographs: Imagenette."""
    )
    text = ["## Networks of keras.applications", introduction, make_applications_table(record["networks"])]
    refusals = [
        f"- {name}, {way}: {message}"
        for name, network in record["networks"].items()
        for way, result in network["ways"].items()
        for outcome, message in result.items()
        if outcome != "agreement_percent"
    ]
    missing = [f"- Not measured: {name}." for name in NETWORKS if name not in record["networks"]]
    tolerances = {network["tolerance"] for network in record["networks"].values()}
    changed = [
        f"- {name}: fused with the tolerance {network['tolerance']:g}, since rounding adds up over its layers."
        for name, network in record["networks"].items()
        if network["tolerance"] > min(tolerances)
    ]
    if lines := [*refusals, *changed, *missing]:
        text.append("\n".join(map(make_paragraph, lines)))
    return "\n\n".join(text)
