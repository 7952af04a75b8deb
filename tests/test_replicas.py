"""Two replicas of a network: the same variables on both after every step, and the same training as on one device."""

METHODS = ("oabn", "oabn, not synchronized", "clusterqat", "clusterqat, trained centroids", "lsq", "distillation")


def test_replicas_stay_identical_and_train_like_one_device(run_program):
    """Kernels, OABN's variances and gammas, centroids, assignments, activation ranges, steps, and moving averages."""
    result = run_program("tests/helpers/replicas.py", *METHODS)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == [method for method in METHODS if "not synchronized" not in method]
